"""`ws`: the LLM server for one big GPU. `LLM` and `SamplingParams` load lazily, so importing this costs nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "BeamSearchParams", "SamplingParams", "StructuredOutputsParams", "__version__"]

if TYPE_CHECKING:
    from workstation.engine.request import BeamSearchParams, SamplingParams, StructuredOutputsParams
    from workstation.llm import LLM


def __getattr__(name: str) -> Any:
    if name == "LLM":
        from workstation.llm import LLM

        return LLM
    if name in ("SamplingParams", "BeamSearchParams", "StructuredOutputsParams"):
        from workstation.engine import request

        return getattr(request, name)
    raise AttributeError(f"module 'workstation' has no attribute {name!r}")
