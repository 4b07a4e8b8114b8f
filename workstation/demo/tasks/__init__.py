"""The demo model's tasks: seeded generators of conversations whose answer is known exactly. Imports no torch.

One file a skill family. A generator is called as `generator(rng, split)` and returns a `Task`; the split decides which
operands, names, schemas and wordings it may draw, so that nothing held out is ever trained on (see `base.held_out`).
"""

from __future__ import annotations

from workstation.demo.tasks.base import Split, Task
from workstation.demo.tasks.registry import SKILLS, generate

__all__ = ["SKILLS", "Split", "Task", "generate"]
