"""A server with a scripted model: the real routes, templates and parsers, an engine that says what a prompt asks it to say.

Agents' prompts exceed the demo model's window, so its template and tokenizer stand here in front of a script. A user's message
that holds `CALL {"name": …, "arguments": …}` is answered with that call, and the call's result with a sentence that repeats it;
one that holds `SAY "…"` with that text; anything else with a greeting. `python tests/clients/scripted.py PORT [WINDOW]` logs
a line for each HTTP request to stdout.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from fakes import FakeEngine

import workstation.demo
from workstation.engine.request import EngineRequest
from workstation.server.options import ServedModel, ServerOptions
from workstation.server.serve import run
from workstation.server.served_model import load_served_model

WINDOW = 200_000
ORDERS = re.compile(r'CALL (?=\{)|SAY (?=\\?")')
RESULT, RESULT_END = "<tool_response>", "</tool_response>"


class Script:
    """What the model says next."""

    def __init__(self, model: ServedModel) -> None:
        self._tokenizer = model.tokenizer
        self._end = model.eos_token_ids[0]

    def __call__(self, request: EngineRequest, index: int) -> list[int]:
        text = self._say(self._tokenizer.decode(request.prompt_token_ids))
        return [*self._tokenizer.encode(text, add_special_tokens=False), self._end]

    def _say(self, prompt: str) -> str:
        orders = list(ORDERS.finditer(prompt))
        if not orders:
            return "Hello from the scripted model."
        rest = prompt[orders[-1].end():]
        order = _json(rest)
        if isinstance(order, str):
            return order
        _, answered, result = rest.rpartition(RESULT)
        if answered:
            return f"The tool said: {result.partition(RESULT_END)[0].strip()[:400]}"
        return f"<tool_call>\n{json.dumps(order)}\n</tool_call>"


def _json(text: str) -> Any:
    """The JSON value a text begins with; some clients quote what they are given once more."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except ValueError:
        return json.JSONDecoder().raw_decode(text.replace('\\\\', '\\').replace('\\"', '"'))[0]


def main(port: int, window: int = WINDOW) -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    folder = Path(workstation.demo.__file__).parent / "model"
    model = load_served_model(folder, ("demo",), window=window)
    engine = FakeEngine(window=window, logits_width=model.tokenizer.vocab_size, reply=Script(model), delay=0.001)
    run(ServerOptions(port=port, access_log=True), engine, lambda: model)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
