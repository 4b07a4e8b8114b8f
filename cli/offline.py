"""Commands that run the engine in this process: MODEL and flags → `workstation.LLM`."""

from __future__ import annotations

import os
from typing import Any

from workstation.cli.plan import Launch, plan_launch


def load(model: str, flags: dict[str, Any], **engine: Any) -> Any:
    """An `LLM` for a catalogue name, folder or hub id, with the precedence of `ws serve`.

    Args:
        flags: settings by name; None means "not typed".  engine: further arguments of `LLM`, such as skip_tokenizer_init.
    """
    return start(plan_launch(model, flags, os.environ), **engine)


def start(launch: Launch, **engine: Any) -> Any:
    """An `LLM` for a planned launch."""
    from workstation import LLM

    return LLM(**{**launch.llm_arguments(), **engine})
