"""A 16- or 32-bit model folder → a quantised one on disk, tensor by tensor; memory holds one shard of the result.

With calibration text it is written layer by layer instead: see `model.calibration`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from workstation.architecture import ModelShape, read_shape
from workstation.errors import ConfigError, ModelFolderError, StartupError
from workstation.model.calibration import CalibratedRounding, CalibrationText, layer_number
from workstation.model.loader import Progress, checked_entries
from workstation.model.staging import Reader
from workstation.model.targets import TORCH_DTYPES
from workstation.model_folder import file_in_folder, model_folder
from workstation.quant.at_load import SMALLER_GROUPS, forms_at_load
from workstation.quant.destination import CONFIG, Destination, fingerprint
from workstation.quant.detect import describe
from workstation.quant.forms import PLAIN, WeightForms
from workstation.quant.pack import quantised_tensors
from workstation.quant.written import WRITABLE, Tensors, description, written_tensors
from workstation.safetensors_header import DTYPE_BITS, SINGLE_FILE, TensorEntry

SHARD_BYTES = 2 << 30
CALIBRATED = ("int4", *SMALLER_GROUPS)


@dataclass(frozen=True, slots=True)
class Shard:
    """A file of the result: the stored tensors it is made of, and what it will hold."""

    file: str
    entries: tuple[TensorEntry, ...]
    tensors: Tensors

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(*tensor) for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Report:
    """Bytes of all tensors before and after, and how many shards an earlier run had written."""

    source_bytes: int
    written_bytes: int
    shards: int
    found: int


def quantise_folder(
    source: Path, destination: Path, to: str, *, device: torch.device, calibration: CalibrationText | None = None,
    force: bool = False, progress: Progress | None = None,
) -> Report:
    """Write `source` with its linear layers in the form `--quantization` would give them, in the formats of `quant.written`.

    Head, embedding, norms and biases stay as they are stored. What an earlier run of the same work wrote is kept.

    Args:
        destination: a new folder, or what an earlier run left of it.  to: one of WRITABLE.
        device: does the rounding.  force: write a finished folder anew.
        calibration: for GPTQ rounding (`quant.gptq_rounding`); None: scales are searched for.
        progress: called with (bytes of source done, bytes in all) after each tensor.

    Raises ConfigError (to, destination, calibration), ModelFolderError (source), StartupError (disk).
    """
    source = model_folder(source)
    if calibration is not None and to not in CALIBRATED:
        raise ConfigError(f"--rounding gptq goes with --to {', '.join(CALIBRATED)}, got {to!r}", param="rounding")
    shape, forms, entries = _planned(source, to)
    work: dict[str, object] = {"to": to, "source": fingerprint(entries, file_in_folder(source, CONFIG).read_bytes())}
    if calibration is not None:
        entries = sorted(entries, key=lambda entry: layer_number(entry.name))
        work |= {"rounding": "gptq", "calibration": calibration.origin}
    shards = list(_cut(entries, forms))
    work["shards"] = [shard.file for shard in shards]
    try:
        with Destination(destination, source, work, force=force) as place:
            missing = [shard for shard in shards if not place.has_shard(shard.file, shard.tensors)]
            place.check_disk(sum(shard.nbytes for shard in missing))
            rounding = None
            if calibration is not None and missing:
                found = {name: place.folder / shard.file for shard in shards if shard not in missing for name in shard.tensors}
                rounding = CalibratedRounding(shape, forms, entries, calibration.make(), found, device)
            _write_all(shards, missing, place, _Conversion(forms, device, rounding), progress)
            place.finish(_described(forms, entries), _index(shards))
    except (OSError, SafetensorError) as error:
        raise StartupError(f"{destination} cannot be written: {error}; the same command goes on where this one "
                           "stopped") from error
    return Report(sum(entry.nbytes for entry in entries), sum(shard.nbytes for shard in shards), len(shards),
                  len(shards) - len(missing))


def _planned(source: Path, to: str) -> tuple[ModelShape, WeightForms, list[TensorEntry]]:
    if to not in WRITABLE:
        raise ConfigError(f"--to must be {', '.join(WRITABLE)}, got {to!r}; other forms are not written", param="to")
    shape = read_shape(source)
    made = describe(shape)
    if made is not None:
        raise ConfigError(f"{source} is quantised already ({made.method}); quantise the 16-bit model", param="src")
    forms = forms_at_load(shape, to)
    if not forms.parts:
        raise ConfigError(f"no layer of {source} can be quantised to {to}", param="to")
    return shape, forms, checked_entries(source, shape, WeightForms())


def _cut(entries: list[TensorEntry], forms: WeightForms) -> Iterator[Shard]:
    runs: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        nbytes = sum(_nbytes(*tensor) for tensor in _written(entry, forms).values())
        if runs[-1] and size + nbytes > SHARD_BYTES:
            runs.append([])
            size = 0
        runs[-1].append(entry)
        size += nbytes
    for number, run in enumerate(runs, 1):
        file = SINGLE_FILE if len(runs) == 1 else f"model-{number:05d}-of-{len(runs):05d}.safetensors"
        yield Shard(file, tuple(run), {name: item for entry in run for name, item in _written(entry, forms).items()})


def _written(entry: TensorEntry, forms: WeightForms) -> Tensors:
    module = _quantised_module(entry, forms)
    if module is None:
        return {entry.name: (entry.dtype, entry.shape)}
    rows, columns = entry.shape
    return written_tensors(module, forms.part(module), rows, columns, entry.dtype)


def _quantised_module(entry: TensorEntry, forms: WeightForms) -> str | None:
    module, _, last = entry.name.rpartition(".")
    return module if last == "weight" and forms.part(module) is not PLAIN else None


def _nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    return prod(shape) * DTYPE_BITS[dtype] // 8


def _write_all(
    shards: list[Shard], missing: list[Shard], place: Destination, conversion: _Conversion, progress: Progress | None,
) -> None:
    total = sum(entry.nbytes for shard in shards for entry in shard.entries)
    done = total - sum(entry.nbytes for shard in missing for entry in shard.entries)
    with Reader() as reader, torch.inference_mode():
        for shard in missing:
            tensors: dict[str, torch.Tensor] = {}
            for entry in shard.entries:
                tensors |= conversion.tensors(reader, entry)
                done += entry.nbytes
                if progress is not None:
                    progress(done, total)
            save_file(tensors, place.part(shard.file), metadata={"format": "pt"})
            place.keep(shard.file)


@dataclass(frozen=True, slots=True)
class _Conversion:
    """A stored tensor → those written for it. rounding: of the linear layers, where there is calibration text."""

    forms: WeightForms
    device: torch.device
    rounding: CalibratedRounding | None

    def tensors(self, reader: Reader, entry: TensorEntry) -> dict[str, torch.Tensor]:
        module = _quantised_module(entry, self.forms)
        if module is not None and self.rounding is not None:
            return self.rounding.take(module)
        stored = TORCH_DTYPES[entry.dtype]
        tensor = torch.empty(entry.shape, dtype=stored)
        reader.read(entry, stored, tensor)
        if module is None:
            return {entry.name: tensor}
        try:
            made = quantised_tensors(module, tensor.to(self.device), self.forms.part(module), entry.dtype)
        except ValueError as error:
            raise ModelFolderError(f"tensor {entry.name} in {entry.file} {error}") from error
        return {name: item.cpu() for name, item in made.items()}


def _described(forms: WeightForms, entries: list[TensorEntry]) -> dict[str, object]:
    linears = [entry for entry in entries if len(entry.shape) == 2 and entry.name.endswith("_proj.weight")]
    layers = {entry.name.removesuffix(".weight"): entry.shape[1] for entry in linears}
    return description(forms.parts, layers, set(layers) - set(forms.parts), linears[0].dtype)


def _index(shards: list[Shard]) -> dict[str, object] | None:
    if len(shards) == 1:
        return None
    return {"metadata": {"total_size": sum(shard.nbytes for shard in shards)},
            "weight_map": {name: shard.file for shard in shards for name in shard.tensors}}
