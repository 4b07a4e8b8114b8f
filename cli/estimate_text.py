"""An estimate for people: verdict, bar, tables. Plain text, at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence

from workstation.estimate import Estimate, Fit, advice, longest, verdict
from workstation.measurements import Basis
from workstation.memory import gib

BAR_WIDTH = 60
GB = 1e9


def show(found: Estimate) -> str:
    """All sections, the verdict first."""
    parts = [verdict(found), "\n".join(f"  - {line}" for line in advice(found)), _bar(found), _parts(found),
             _cheat_sheet(found), _frontier(found), _forms(found.forms), _speed(found)]
    return "\n\n".join(part for part in parts if part)


def _pieces(found: Estimate) -> list[tuple[str, str, int]]:
    plan, weights = found.plan, found.question.weights
    return [
        ("#", f"weights ({weights.name}, from the {weights.source})", plan.weights),
        ("=", f"KV cache, {plan.kv_tokens:,} tokens of {found.kv_bytes_per_token:,} bytes", plan.kv),
        ("w", f"workspace of a step of {plan.max_num_batched_tokens:,} tokens", plan.workspace),
        ("l", "logits and sampling", plan.logits + plan.sampler), ("g", "CUDA graphs", plan.graphs),
        ("c", "CUDA context", plan.context), ("r", "kept for the display", plan.reserve),
    ]  # fmt: skip


def _bar(found: Estimate) -> str:
    total = found.machine.memory.total_bytes
    pieces = _pieces(found)
    scale = max(total, sum(size for _, _, size in pieces))
    drawn = "".join(sign * round(BAR_WIDTH * size / scale) for sign, _, size in pieces)[:BAR_WIDTH + 4]
    edge = round(BAR_WIDTH * total / scale)
    inside, outside = drawn[:edge].ljust(edge, "."), drawn[edge:]
    return f"[{inside}]{outside}  {gib(total)} on {found.machine.name}"


def _parts(found: Estimate) -> str:
    total = found.machine.memory.total_bytes
    pieces = [piece for piece in _pieces(found) if piece[2]]
    left = total - sum(size for _, _, size in pieces)
    rows = [(sign, what, gib(size), f"{size / total:6.1%}") for sign, what, size in pieces]
    rows.append((".", "left alone" if left >= 0 else "missing", gib(abs(left)), f"{abs(left) / total:6.1%}"))
    return _table(("", "part", "size", "of the card"), rows) + f"\n({found.machine.source})"


def _cheat_sheet(found: Estimate) -> str:
    count = found.model.shape.num_parameters
    true = {form.name: form.nbytes for form in found.model.others}
    return (
        f"parameters × bytes: {count / GB:.2f} billion = {count * 2 / GB:.1f} GB at 16 bits, {count / GB:.1f} at 8, "
        f"{count / 2 / GB:.1f} at 4;\n"
        f"on the device {true['16-bit'] / GB:.1f}, {true['fp8'] / GB:.1f} and {true['int4'] / GB:.1f} GB: the embedding and "
        "the head stay 16-bit, and scales are added."
    )


def _frontier(found: Estimate) -> str:
    rows = [(f"{row.context:,}", _count(row.auto), _count(row.fp8)) for row in found.frontier]
    kept = found.question.weights.name
    best = {name: f"{longest(found, name):,}" for name in ("auto", "fp8")}
    rows.append(("longest of one", best["auto"], best["fp8"]))
    return f"requests at once ({kept} weights)\n" + _table(("context", "16-bit KV", "FP8 KV"), rows)


def _count(number: int) -> str:
    return f"{number:,}" if number else "-"


def _forms(forms: Sequence[Fit]) -> str:
    by_form = {(form.form, form.kv_cache_dtype): form for form in forms}
    names = list(dict.fromkeys(form.form for form in forms))
    rows = []
    for name in names:
        plain, small = by_form[name, "auto"], by_form[name, "fp8"]
        rows.append((name + ("" if plain.served else " *"), f"{plain.weight_bytes / GB:.1f} GB", _fit(plain), _fit(small)))
    table = _table(("weights", "size", "16-bit KV: longest of one", "FP8 KV: longest of one"), rows)
    return f"{table}\n* not served by this version"


def _fit(form: Fit) -> str:
    return f"fits, {form.longest_context:,}" if form.fits else f"{gib(form.short_bytes)} short"


def _speed(found: Estimate) -> str:
    guess = found.prediction
    if guess is None:
        return "" if found.fit.fits else "no speed is predicted for what does not fit"
    source = "from measurements" if found.measured else "predicted, not measured"
    text = f"{source}: {guess.decode_tokens_per_s:.0f} tokens/s for one request at {guess.context:,} tokens"
    if guess.rows > 1:
        text += f", {guess.decode_tokens_per_s_all:,.0f} for {guess.rows} together"
    if guess.time_to_first_token_s is not None:
        text += f"; first token of a {guess.prompt_tokens:,}-token prompt after {guess.time_to_first_token_s:.2f} s"
    return text + (f"\n{_basis(found.measured, found.model.name, guess.prompt_tokens)}" if found.measured else "")


def _basis(basis: Basis, model: str, prompt: int) -> str:
    """What was measured, when, and that the formula carried it over."""
    decode, first = basis.decode, basis.first_token
    lines = [f"  decode: `ws bench {decode.bench}` of {decode.when}: {1e3 * (decode.decode_step_s or 0):.2f} ms a step of "
             f"{decode.rows:.1f} rows at {decode.context:,.0f} tokens"]
    if first is None:
        lines.append(f"  first token: not measured; `ws bench latency {model} --batch-size 1 --input-len {prompt}` does")
    else:
        many = f"{first.prompts} prompts" if first.prompts > 1 else "a prompt"
        lines.append(f"  first token: `ws bench {first.bench}` of {first.when}: {first.first_token_s:.3f} s for {many} of "
                     f"{first.prompt_tokens:,.0f} tokens")
    return "\n".join([*lines, "  carried over to what is asked by the ratio of the formula's two answers"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                     for row in [header, *rows])
