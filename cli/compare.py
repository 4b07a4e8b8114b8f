"""`ws eval --compare`: one model in each form its weights and its KV cache may take, measured on the same tokens."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from workstation.cli.plan import Launch, note, plan_launch
from workstation.errors import ConfigError

REFERENCE = "16-bit"
# Form → what it changes of a launch.
FORMS: dict[str, dict[str, str]] = {
    REFERENCE: {}, "fp8": {"quantization": "fp8"}, "int8": {"quantization": "int8"}, "int4": {"quantization": "int4"},
    "int4-g64": {"quantization": "int4-g64"}, "int4-g32": {"quantization": "int4-g32"}, "nf4": {"quantization": "nf4"},
    "kv-fp8": {"kv_cache_dtype": "fp8"},
}  # fmt: skip
MAX_TEXT_TOKENS, TEXT_WINDOW = 32_768, 2_048


@dataclass(frozen=True, slots=True)
class Row:
    """What a form costs: see `workstation.engine.fidelity`. Scores are shares of tasks answered exactly; None for a text."""

    form: str
    bytes_per_weight: float
    perplexity: float
    agreement: float | None
    divergence: float | None
    divergence_everywhere: float | None
    tokens: int
    score: float | None = None
    skills: dict[str, float] | None = None


def compare(
    model: str, flags: dict[str, Any], *, forms: Sequence[str], items: int, seed: int, skills: Sequence[str], text: Path | None,
) -> list[Row]:
    """Load the model once a form, the 16-bit one first. Raises ConfigError (an unknown form, a quantised model, the text)."""
    unknown = [name for name in forms if name not in FORMS]
    if unknown:
        raise ConfigError(f"--form {unknown[0]!r} is not one of {', '.join(FORMS)}", param="form")
    launch = plan_launch(model, {**flags, "kv_cache_dtype": "auto"}, os.environ)
    _refuse_quantised(launch)
    wanted = (REFERENCE, *(name for name in FORMS if name in forms and name != REFERENCE))
    measured = _Measured(launch, items, seed, skills, text)
    rows = []
    for name in wanted:
        note(f"{name}: loading")
        rows.append(measured.row(name))
    return rows


def table(rows: Sequence[Row]) -> str:
    """For people."""
    cells = [("form", "bytes a weight", "tasks right", "perplexity", "agreement", "KL", "KL everywhere")]
    for row in rows:
        cells.append((
            "KV cache in FP8" if row.form == "kv-fp8" else row.form, f"{row.bytes_per_weight:.3f}", _shown(row.score, ".1%"),
            f"{row.perplexity:.4f}", _shown(row.agreement, ".2%"), _shown(row.divergence, ".5f"),
            _shown(row.divergence_everywhere, ".5f")))  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in cells)


def _shown(value: float | None, how: str) -> str:
    return "-" if value is None else format(value, how)


def as_json(rows: Sequence[Row]) -> dict[str, Any]:
    return {"tokens": rows[0].tokens, "forms": {row.form: asdict(row) for row in rows}}


class _Measured:
    """The documents, made once, and what the 16-bit form gave for them."""

    def __init__(self, launch: Launch, items: int, seed: int, skills: Sequence[str], text: Path | None) -> None:
        self._launch, self._items, self._seed, self._skills, self._text = launch, items, seed, skills, text
        self._documents: list[Any] = []
        self._reference: Any = None

    def row(self, form: str) -> Row:
        from workstation.cli.offline import start
        from workstation.engine.fidelity import bytes_per_weight, fidelity, final_states

        llm = start(self._launch, **FORMS[form])
        engine = llm.engine
        self._documents = self._documents or self._read(llm)
        states = final_states(engine, self._documents)
        found = fidelity(engine, self._documents, states, self._reference)
        self._reference = self._reference or states
        scores = None if self._text else self._scores(llm)
        row = Row(form, bytes_per_weight(engine.model.shape, engine.model.forms), found.perplexity, found.agreement,
                  found.divergence, found.everywhere, found.tokens, *(scores or (None, None)))
        del llm, engine
        free()
        return row

    def _read(self, llm: Any) -> list[Any]:
        from workstation.demo.evaluate import held_out_documents
        from workstation.engine.fidelity import Document

        if self._text is None:
            found = held_out_documents(self._encoder(), self._items, self._seed, self._skills)
            return [Document(tokens, first) for tokens, first in found]
        tokens = llm.get_tokenizer().encode(_text(self._text))
        if len(tokens) > MAX_TEXT_TOKENS:
            note(f"the first {MAX_TEXT_TOKENS:,} of {len(tokens):,} tokens of {self._text} are read")
        window = min(TEXT_WINDOW, llm.engine.info.max_model_len)
        cut = [tokens[start:start + window] for start in range(0, min(len(tokens), MAX_TEXT_TOKENS), window)]
        documents = [Document(part) for part in cut if len(part) > 1]
        if not documents:
            raise ConfigError(f"--text {self._text} holds fewer than two tokens", param="text")
        return documents

    def _scores(self, llm: Any) -> tuple[float, dict[str, float]]:
        from workstation.cli.evaluate import answerer
        from workstation.demo import evaluate

        answer = answerer(llm, evaluate.MAX_NEW_TOKENS)
        scores = evaluate.evaluate(self._encoder(), answer, self._items, self._seed, self._skills)
        return evaluate.average(scores), {name: result.share for name, result in scores.items()}

    def _encoder(self) -> Callable[[str], list[int]]:
        from workstation.cli.evaluate import encoder

        return encoder(self._launch.model.folder)


def _refuse_quantised(launch: Launch) -> None:
    from workstation.architecture import read_shape

    if launch.config.quantization or read_shape(launch.model.folder).quantization:
        raise ConfigError("--compare needs 16-bit weights, and no --quantization: it makes all forms itself", param="compare")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path} cannot be read as UTF-8: {error}", param="text") from error


def free() -> None:
    """A form's memory is given back before the next is loaded."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
