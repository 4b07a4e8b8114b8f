"""`ws estimate --measured`: the speed this machine's last `ws bench` saw, carried over to what is asked. No torch.

    predicted = measured · formula(asked) / formula(measured)

with the formulas of `estimate_speed`: constants that are wrong for a card cancel as far as they are wrong for both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from workstation.architecture import ModelShape
from workstation.errors import ConfigError
from workstation.estimate import KV_BYTES, Estimate
from workstation.estimate_speed import Speed, decode_seconds, prompt_seconds
from workstation.measurements import Basis, Measurement, on_device


def find_basis(found: Estimate, results: Sequence[Measurement]) -> Basis:
    """The newest results for this model, form and device. Raises ConfigError when no decode step was measured."""
    form, device = found.question.weights.name, found.machine.name
    folder = str(found.model.folder) if found.model.folder else ""
    same = [result for result in on_device(results, device) if folder and result.folder == folder]
    fitting = [result for result in same if result.form == form]
    decode = next((result for result in reversed(fitting) if result.decode_step_s), None)
    if decode is None:
        others = ", ".join(sorted({result.form for result in same} - {form}))
        raise ConfigError(f"no `ws bench` of {found.model.name} in {form} on {device} is remembered; measure it with "
                          f"`ws bench latency {found.model.name}`{f' (measured: {others})' if others else ''}",
                          param="measured")  # fmt: skip
    return Basis(decode, next((result for result in reversed(fitting) if result.first_token_s), None))


def with_measured(found: Estimate, results: Sequence[Measurement]) -> Estimate:
    """The estimate with its prediction from measurements; what does not fit has none.

    Raises ConfigError when nothing was measured, or when the formula cannot be asked because the card's rates are unknown.
    """
    basis, guess = find_basis(found, results), found.prediction
    if guess is None:
        if found.fit.fits:
            raise ConfigError(f"what was measured cannot be carried over: the bandwidth of {found.machine.name} is not known",
                              param="measured")  # fmt: skip
        return found
    speed = found.machine.speed(found.question.weights.name)
    assert speed is not None  # there is a prediction
    shape, weight, kv = found.model.shape, found.fit.weight_bytes, found.question.kv_cache_dtype
    one, together = (_step(shape, weight, speed, basis.decode, rows, guess.context, kv) for rows in (1, guess.rows))
    first = _first(shape, weight, speed, basis.first_token, guess.prompt_tokens) if basis.first_token else None
    made = replace(guess, decode_tokens_per_s=1 / one, decode_tokens_per_s_all=guess.rows / together,
                   time_to_first_token_s=first)  # fmt: skip
    return replace(found, prediction=made, measured=basis)


def _step(shape: ModelShape, weight: int, speed: Speed, found: Measurement, rows: int, context: int, kv: str) -> float:
    """Seconds of a decode step of `rows` at `context`, from one of other rows and another context."""
    asked = decode_seconds(shape, weight, speed, rows=rows, context=context, kv_dtype_bytes=KV_BYTES[kv])
    then = decode_seconds(shape, weight, speed, rows=found.rows, context=found.context,
                          kv_dtype_bytes=KV_BYTES[found.kv_cache_dtype])  # fmt: skip
    return (found.decode_step_s or 0.0) * asked / then


def _first(shape: ModelShape, weight: int, speed: Speed, found: Measurement, tokens: int) -> float | None:
    """Seconds to the first token of one prompt, from those of prompts of another length; None without matrix rates."""
    if (found.prompts, found.prompt_tokens) == (1, tokens):
        return found.first_token_s
    asked = prompt_seconds(shape, weight, speed, tokens)
    then = prompt_seconds(shape, weight, speed, found.prompt_tokens, found.prompts)
    return (found.first_token_s or 0.0) * asked / then if asked and then else None
