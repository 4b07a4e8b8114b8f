"""`ws quantize SRC DST --to FORM`: write a quantised copy of a 16-bit model to disk."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from workstation.errors import ConfigError

ROUNDINGS = ("search", "gptq")


def command(
    src: Annotated[str, typer.Argument(help="Catalogue name, folder or hub id of a 16- or 32-bit model.")],
    dst: Annotated[Path, typer.Argument(help="A new folder, or one that an earlier run of the same command began.")],
    to: Annotated[str, typer.Option(metavar="FORM", help="fp8, int8, int4 (int4-g64, int4-g32: smaller groups) or nf4.")],
    rounding: Annotated[str, typer.Option(
        help="Of int4: search (of scales, without text) or gptq (on calibration text: closer, and takes longer).",
    )] = "search",
    calibration: Annotated[Path | None, typer.Option(
        metavar="FILE", help="With --rounding gptq, a text like those the model will read; else it writes one itself.",
    )] = None,
    force: Annotated[bool, typer.Option("--force", help="Write a folder anew that ws quantize wrote before.")] = False,
    device: Annotated[str, typer.Option(help="Does the rounding: auto, cuda, cuda:N or cpu.")] = "auto",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
    download_dir: Annotated[str | None, typer.Option(metavar="FOLDER", help="Hugging Face's cache unless given.")] = None,
    hf_token: Annotated[str | None, typer.Option(metavar="TOKEN", help="For gated models; HF_TOKEN is unseen by `ps`.")] = None,
) -> None:
    """Quantise a model's linear layers and write it in a format that ws, transformers and vLLM read.

    A run that was stopped goes on where it was.
    """
    from workstation.catalog import load_catalogue
    from workstation.cli.plan import choose_device, note, settle
    from workstation.cli.progress import LoadingBar
    from workstation.hub import resolve_model
    from workstation.memory import gib

    _check_rounding(rounding, calibration)
    flags = {"revision": revision, "download_dir": download_dir, "hf_token": hf_token}
    settings, entry = settle(src, flags, os.environ)
    chosen = choose_device(device, is_demo=True)  # rounding is quick enough on a CPU to go there unasked
    found = resolve_model(
        src, load_catalogue(), revision=settings["revision"], download_dir=settings["download_dir"],
        token=settings["hf_token"], say=note,
    )  # fmt: skip
    import torch

    from workstation.cli.calibration_text import calibration_text
    from workstation.model.quantised_folder import quantise_folder

    text = None
    if rounding == "gptq":
        is_demo = entry is not None and entry.is_bundled
        text = calibration_text(calibration, src, found.folder, {**flags, "device": chosen}, is_demo=is_demo)
    try:
        with LoadingBar("quantising") as bar:
            report = quantise_folder(found.folder, dst, to, device=torch.device(chosen), calibration=text, force=force,
                                     progress=bar.update)
    except KeyboardInterrupt:
        note(f"stopped; the same command goes on with {dst}")
        raise
    if report.found:
        note(f"{report.found} of {report.shards} files were there already")
    share = report.written_bytes / report.source_bytes
    note(f"{gib(report.source_bytes)} became {gib(report.written_bytes)} ({share:.0%}); try it: ws serve {dst}")
    typer.echo(str(dst))


def _check_rounding(rounding: str, calibration: Path | None) -> None:
    if rounding not in ROUNDINGS:
        raise ConfigError(f"--rounding must be {' or '.join(ROUNDINGS)}, got {rounding!r}", param="rounding")
    if calibration is not None and rounding != "gptq":
        raise ConfigError("--calibration goes with --rounding gptq", param="calibration")
