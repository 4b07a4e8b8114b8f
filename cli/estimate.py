"""`ws estimate MODEL`: will it fit, how much context for how many, in which form, how fast. Loads nothing, imports no torch."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from typing import Annotated, Any

import typer

from workstation.config import EngineConfig
from workstation.errors import ConfigError, ModelFolderError
from workstation.settings import Setting

Json = Annotated[bool, typer.Option("--json", help="Print JSON (docs/estimate.md).")]


def command(
    model: Annotated[str, typer.Argument(help="Catalogue name, folder, config.json or hub id.")],
    gpu: Annotated[str | None, typer.Option(metavar="NAME", help="A card (rtx-pro-6000); else this machine's.")] = None,
    vram: Annotated[str | None, typer.Option(metavar="SIZE", help="Memory as CUDA reports it: 96G = 96 GiB.")] = None,
    context: Annotated[str | None, typer.Option("--context", "--max-model-len", metavar="N", help="Tokens of one.")] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="Requests of that context at once.")] = 1,
    quantization: Annotated[str | None, typer.Option(metavar="FORM", help="16-bit, fp8, int8, nf4, nvfp4 or int4.")] = None,
    kv_cache_dtype: Annotated[str | None, typer.Option(metavar="DTYPE", help="fp8, or auto: as ws serve would.")] = None,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", min=1, max=64, help="Cards.")] = 1,
    gpu_memory_utilization: Annotated[str | None, typer.Option(metavar="X", help="Share of the card in use.")] = None,
    max_num_seqs: Annotated[str | None, typer.Option(metavar="N", help="Sequences that run at once.")] = None,
    max_num_batched_tokens: Annotated[str | None, typer.Option(metavar="N", help="Token budget of a step.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    measured: Annotated[bool, typer.Option("--measured", help="Speed from this machine's last `ws bench` of it.")] = False,
    as_json: Json = False,
) -> None:  # fmt: skip
    """Say whether a model fits a card, how much context for how many, in which form, and how fast it will probably be."""
    from workstation.catalog import load_catalogue
    from workstation.cli.estimate_text import show
    from workstation.cli.plan import engine_config, settle
    from workstation.estimate import Question, estimate
    from workstation.estimate_model import find_model

    if measured:
        _check_measured(gpu, vram, tensor_parallel_size)
    machine = find_machine(gpu, vram)
    flags = {"max_model_len": context, "gpu_memory_utilization": gpu_memory_utilization, "max_num_seqs": max_num_seqs,
             "max_num_batched_tokens": max_num_batched_tokens, "revision": revision,
             "kv_cache_dtype": kv_cache_dtype}  # fmt: skip
    settings, _ = settle(model, flags, os.environ)
    try:
        found = find_model(model, load_catalogue(), revision=settings["revision"], token=settings["hf_token"])
    except ModelFolderError as error:
        raise ConfigError(error.message, param=error.param) from error
    served = replace(engine_config(settings, found.name, "cuda"), online=True)
    config = _with_rows(served, concurrency, max_num_seqs)
    weights = found.weights(quantization or settings["quantization"])
    kv = found.kv_cache_dtype(settings["kv_cache_dtype"])
    result = estimate(found, machine, Question(config, weights, kv, concurrency, tensor_parallel_size))
    if measured:
        from workstation.estimate_measured import with_measured
        from workstation.measurements import read

        result = with_measured(result, read())
    typer.echo(json.dumps(result.as_dict(), indent=2) if as_json else show(result))


def _check_measured(gpu: str | None, vram: str | None, cards: int) -> None:
    if gpu is not None or vram is not None:
        raise ConfigError("--measured is about this machine's card; leave --gpu and --vram out", param="measured")
    if cards > 1:
        raise ConfigError(f"--measured knows one card, got --tensor-parallel-size {cards}", param="measured")


def _with_rows(config: EngineConfig, concurrency: int, asked: str | None) -> EngineConfig:
    """More requests at once than the default runs means that many rows; a number of rows that was typed is kept."""
    if concurrency <= config.max_num_seqs:
        return config
    if asked is not None:
        raise ConfigError(f"--concurrency {concurrency} is more than --max-num-seqs {config.max_num_seqs} runs at once",
                          param="max_num_seqs")  # fmt: skip
    return replace(config, max_num_seqs=concurrency)


def find_machine(gpu: str | None, vram: str | None) -> Any:
    """The Machine asked for: a card by name, a size, or this machine's first card. Raises ConfigError."""
    from workstation.cards import find_card
    from workstation.estimate import Machine
    from workstation.memory import DeviceMemory

    if gpu is not None and vram is not None:
        raise ConfigError("--gpu and --vram both name the memory; give one", param="vram")
    if gpu is not None:
        card = find_card(gpu)
        memory = DeviceMemory("cuda", card.total_bytes, card.total_bytes, has_context=False)
        seen = card.seen_source if not card.is_derived else f"derived from {card.memory_gib} GB as sold"
        return Machine(card.name, memory, f"memory: {seen}; rates: {card.source}", card.bandwidth, card.dense16, card.dense8)
    if vram is not None:
        size = vram.upper().removesuffix("IB").removesuffix("B")
        total = Setting("vram", "length", None, "", low=1 << 30, high=1 << 44).parse(size, "--vram")
        if total is None:
            raise ConfigError(f"--vram must be a size such as 24G, got {vram!r}", param="vram")
        return Machine(f"a card of {vram}", DeviceMemory("cuda", total, total, has_context=False), "as given by --vram")
    return _this_machine()


def _this_machine() -> Any:
    from workstation import gpu as driver
    from workstation.cards import recognise
    from workstation.estimate import Machine
    from workstation.memory import DeviceMemory

    found = driver.sample(0)
    if found is None or not found.total_bytes:
        raise ConfigError("this machine has no GPU that a driver answers for; name a card with --gpu rtx-4090, or a size "
                          "with --vram 24G", param="gpu")  # fmt: skip
    card = recognise(found.name)
    total = min(found.total_bytes, card.total_bytes) if card and not card.is_derived else int(found.total_bytes * 0.99)
    free = min(total, found.free_bytes or total)
    memory = DeviceMemory("cuda", total, free, has_context=False, display=bool(found.display))
    rates = (card.bandwidth, card.dense16, card.dense8) if card else (None, None, None)
    return Machine(found.name, memory, "this machine's driver, less what CUDA keeps", *rates)
