"""A pytest plugin: Triton's interpreter readies its language once a launch and module.

It does so again for every function that a kernel calls, which took a third of these tests' time.
"""

from __future__ import annotations

from typing import Any

from triton.runtime import interpreter

_ready: set[int] = set()  # ids of the globals of modules that this launch has met
_ready_language = interpreter._patch_lang
_launch = interpreter.GridExecutor.__call__


def _ready_language_once(fn: Any) -> Any:
    if id(fn.__globals__) in _ready:
        return None
    _ready.add(id(fn.__globals__))
    return _ready_language(fn)


def _launch_anew(executor: Any, *arguments: Any, **options: Any) -> Any:
    _ready.clear()
    return _launch(executor, *arguments, **options)


interpreter._patch_lang = _ready_language_once
interpreter.GridExecutor.__call__ = _launch_anew
