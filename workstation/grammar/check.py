"""Tries grammars, one a line, in a process that may be killed: `python -m workstation.grammar.check FOLDER WIDTH`.

A hostile grammar can run for hours, take all memory or overflow the stack inside the library. Here it costs this process
alone, whose stack and memory are smaller than the engine's: what passes here passes there.
stdin: {"source": a grammar, "where": a field, "schema": the JSON schema that stands there, or null}. stdout, a line each:
{"error": null, "source": the grammar translated} or {"error": what is wrong, "param": where, as precisely as it can be told}.
The first line out says ready.
"""

from __future__ import annotations

import ctypes
import json
import resource
import signal
import sys
import threading
from typing import Any

from workstation.errors import WorkstationError
from workstation.grammar.lark import Lark, translated
from workstation.grammar.library import Vocabulary
from workstation.grammar.schema import subschemas

STACK_BYTES = 1024 * 1024  # threads that make masks in the engine have twice that
DATA_BYTES = 2 * 1024 * 1024 * 1024
PR_SET_PDEATHSIG = 1


def verdict(vocabulary: Vocabulary, line: str) -> dict[str, Any]:
    """The answer to one line."""
    asked = json.loads(line)
    try:
        source = translated(asked["source"])
        vocabulary.compile(source)
    except WorkstationError as error:
        message, where = error.message, asked["where"]
        if asked["schema"] is not None:
            message, where = _culprit(vocabulary, asked["schema"], where, message)
        return {"error": f"{where}: {message}", "param": where}
    return {"error": None, "source": source}


def _culprit(vocabulary: Vocabulary, schema: Any, where: str, message: str) -> tuple[str, str]:
    """(message, path) of the smallest part of a schema that fails by itself."""
    shared = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema, dict) and key in schema}
    found = schema
    while True:
        for path, part in subschemas(found):
            fault = _fault(vocabulary, {**shared, **part} if isinstance(part, dict) else part)
            if fault is not None:
                found, where, message = part, where + path, fault
                break
        else:
            return message, where + _keyword(vocabulary, found, shared)


def _keyword(vocabulary: Vocabulary, schema: Any, shared: dict[str, Any]) -> str:
    """The only keyword without which a schema compiles."""
    keys = list(schema) if isinstance(schema, dict) else []
    found = [key for key in keys if key not in shared
             and _fault(vocabulary, {**shared, **{other: schema[other] for other in keys if other != key}}) is None]
    return f".{found[0][:64]}" if len(found) == 1 else ""


def _fault(vocabulary: Vocabulary, schema: Any) -> str | None:
    if schema is False:
        return None
    lark = Lark()
    try:
        vocabulary.compile(lark.source(lark.schema(schema)))
    except WorkstationError as error:
        return error.message
    return None


def _serve(folder: str, width: int) -> None:
    try:
        vocabulary = Vocabulary(folder, width)
    except WorkstationError as error:
        print(json.dumps({"error": error.message}), flush=True)
        return
    print(json.dumps({"error": None}), flush=True)
    for line in sys.stdin:
        print(json.dumps(verdict(vocabulary, line)), flush=True)


def main() -> None:
    """Arguments: the model's folder, the width of its logits."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=_serve, args=(sys.argv[1], int(sys.argv[2])))
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
