"""Fill a Decoder: from safetensors, streamed straight into the weights on the device, or with random numbers.

Everything the headers tell is checked against the architecture before any memory is allocated; then each tensor is read
once, in file order. Host memory holds two staging buffers at most, never a second copy of the weights; weights that are
quantised while loading pass through one buffer on the device, of the largest tensor's size.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from workstation.architecture import ModelShape
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError
from workstation.kernels.paging import KVScales
from workstation.model.staging import Reader, make_reader
from workstation.model.targets import Scratch, Target
from workstation.model.tensor_names import EMBEDDING, HEAD, is_surplus, targets
from workstation.model.transformer import Decoder
from workstation.quant.detect import weight_forms
from workstation.quant.forms import WeightForms
from workstation.safetensors_header import TensorEntry, read_checkpoint

log = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
COMPARE_BYTES = 16 << 20

Progress = Callable[[int, int], None]


def read_forms(
    folder: str | os.PathLike[str], shape: ModelShape, *, load_format: str = "auto", quantization: str | None = None,
) -> WeightForms:
    """The form each linear layer will have, from config.json and, unless load_format is "dummy", the headers.

    quantization: the form that the linear layers of a 16- or 32-bit checkpoint take while it is loaded.

    Raises ModelFolderError, ConfigError as `quant.detect.weight_forms` does.
    """
    return weight_forms(shape, None if load_format == "dummy" else read_checkpoint(folder), quantization)


def load_model(
    folder: str | os.PathLike[str], shape: ModelShape, *, dtype: torch.dtype, device: torch.device, max_model_len: int,
    load_format: str = "auto", forms: WeightForms | None = None, kv_scales: Sequence[tuple[float, float]] = (),
    progress: Progress | None = None, seed: int = 0,
) -> Decoder:
    """Build a Decoder and fill its weights.

    Args:
        folder: the model folder (not opened for "dummy").  shape: from `architecture.read_shape`.
        dtype: float32, bfloat16 or float16, of activations and of what is not quantised; stored weights are converted.
        max_model_len: rows of the rotary table; at most shape.max_position.
        load_format: "auto" and "safetensors" read the folder; "dummy" draws random weights on the device from `seed`.
        forms: from `read_forms`, which None calls without `quantization`.
        kv_scales: (key, value) of an FP8 KV cache, a pair a layer; without them all are 1.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises ModelFolderError naming the tensor or file, ConfigError naming the option, OutOfMemoryError.
    """
    _check_options(shape, dtype, max_model_len, load_format)
    if shape.unread_fields:
        log.warning("config.json has fields that are not used: %s", ", ".join(shape.unread_fields))
    forms = forms or read_forms(folder, shape, load_format=load_format)
    entries = [] if load_format == "dummy" else checked_entries(folder, shape, forms)
    with torch.inference_mode():
        try:
            decoder = Decoder(shape, dtype=dtype, device=device, max_model_len=max_model_len, forms=forms)
            if load_format == "dummy":
                fill_random(decoder, seed)
            else:
                _fill(targets(decoder), entries, device, progress)
        except RuntimeError as error:  # CUDA has a class of its own for this, the CPU's allocator has not
            if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                raise
            raise OutOfMemoryError(f"the weights do not fit into the free memory of {device}; "
                                   "take a smaller or a quantised model, or free the device") from error
        decoder.pack_weights()
    for layer, pair in zip(decoder.layers, kv_scales, strict=bool(kv_scales)):
        layer.attention.kv_scales = KVScales(*pair)
    return decoder


def checked_entries(folder: str | os.PathLike[str], shape: ModelShape, forms: WeightForms) -> list[TensorEntry]:
    """The tensors to load, in file order, after checking that the checkpoint is exactly what `shape` and `forms` need.

    Raises ModelFolderError naming the tensor that is missing, surplus, misshapen, or of a dtype we do not read.
    """
    stored = read_checkpoint(folder)
    meta = Decoder(shape, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=1, forms=forms)
    expected = targets(meta)
    for name, target in expected.items():
        if name not in stored:
            raise ModelFolderError(f"tensor {name} of shape {_shapes(target)} is missing from the checkpoint")
    for name, entry in stored.items():
        if name in expected:
            _check_entry(entry, expected[name])
        elif name not in forms.unused and not is_surplus(name, shape):
            raise ModelFolderError(f"tensor {name} {list(entry.shape)} in {entry.file} has no place in a "
                                   f"{shape.architecture} model with this config.json")
    if shape.tie_embeddings and HEAD in stored and not _same_data(stored[EMBEDDING], stored[HEAD]):
        raise ModelFolderError(f"config.json ties the embeddings (tie_word_embeddings), but {HEAD} differs "
                               f"from {EMBEDDING}")
    return sorted((stored[name] for name in expected), key=lambda entry: (entry.file, entry.start))


def fill_random(decoder: Decoder, seed: int) -> None:
    """Random weights of plausible size, drawn in place: matrices of variance 1 / in_features, norms 1."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    decoder.embedding.normal_(0.0, decoder.shape.hidden_size**-0.5, generator=generator)
    for linear in decoder.linears():
        linear.randomise(generator)
    for norm in decoder.norms():
        norm.fill_(1.0)


def _check_options(shape: ModelShape, dtype: torch.dtype, max_model_len: int, load_format: str) -> None:
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}",
                          param="load_format")
    if dtype not in DTYPES:
        raise ConfigError(f"dtype must be bfloat16, float16 or float32, got {dtype}", param="dtype")
    if not 1 <= max_model_len <= shape.max_position:
        raise ConfigError(f"max_model_len must be between 1 and {shape.max_position}, the model's window, "
                          f"got {max_model_len}", param="max_model_len")


def _check_entry(entry: TensorEntry, target: Target) -> None:
    if entry.shape not in target.shapes:
        raise ModelFolderError(f"tensor {entry.name} in {entry.file} has the shape {list(entry.shape)}; "
                               f"config.json asks for {_shapes(target)}")
    if entry.dtype not in target.dtypes:
        raise ModelFolderError(f"tensor {entry.name} in {entry.file} is {entry.dtype}; "
                               f"only {', '.join(target.dtypes)} can be loaded")


def _shapes(target: Target) -> str:
    return " or ".join(str(list(shape)) for shape in target.shapes)


def _same_data(first: TensorEntry, second: TensorEntry) -> bool:
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    with Path(first.path).open("rb") as one, Path(second.path).open("rb") as other:
        one.seek(first.start)
        other.seek(second.start)
        for start in range(0, first.nbytes, COMPARE_BYTES):
            count = min(COMPARE_BYTES, first.nbytes - start)
            if one.read(count) != other.read(count):
                return False
    return True


def _fill(
    table: dict[str, Target], entries: list[TensorEntry], device: torch.device, progress: Progress | None,
) -> None:
    scratch = Scratch(table, entries, device)
    _read_all(table, entries, make_reader(device), scratch, progress)
    _refuse_broken(table, entries)


def _read_all(
    table: dict[str, Target], entries: list[TensorEntry], reader: Reader, scratch: Scratch, progress: Progress | None,
) -> None:
    total = sum(entry.nbytes for entry in entries)
    done = 0
    with reader:
        for entry in entries:
            table[entry.name].read(reader, entry, scratch)
            done += entry.nbytes
            if progress is not None:
                progress(done, total)


def _refuse_broken(table: dict[str, Target], entries: list[TensorEntry]) -> None:
    """Raise ModelFolderError for the first quantised tensor or scale that cannot be one; waits once."""
    found = [(entry, broken) for entry in entries if (broken := table[entry.name].is_broken()) is not None]
    if not found:
        return
    for (entry, _), broken in zip(found, torch.stack([flag for _, flag in found]).tolist(), strict=True):
        if broken:
            raise ModelFolderError(f"tensor {entry.name} in {entry.file} {table[entry.name].complaint}")
