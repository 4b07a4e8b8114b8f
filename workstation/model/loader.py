"""Fill a Decoder: from safetensors, streamed straight into the weights on the device, or with random numbers.

Everything the headers tell is checked against the architecture before any memory is allocated; then each tensor is read
once, in file order. Host memory holds two staging buffers at most, never a second copy of the weights.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from workstation.architecture import ModelShape
from workstation.errors import ConfigError, ModelFolderError, OutOfMemoryError
from workstation.model.staging import Reader, make_reader
from workstation.model.tensor_names import EMBEDDING, HEAD, destinations, is_surplus
from workstation.model.transformer import Decoder
from workstation.safetensors_header import TensorEntry, read_checkpoint

log = logging.getLogger(__name__)

LOAD_FORMATS = ("auto", "safetensors", "dummy")
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
COMPARE_BYTES = 16 << 20

Progress = Callable[[int, int], None]


def load_model(
    folder: str | os.PathLike[str], shape: ModelShape, *, dtype: torch.dtype, device: torch.device, max_model_len: int,
    load_format: str = "auto", progress: Progress | None = None, seed: int = 0,
) -> Decoder:
    """Build a Decoder and fill its weights.

    Args:
        folder: the model folder (not opened for "dummy").  shape: from `architecture.read_shape`.
        dtype: float32, bfloat16 or float16, of weights and activations; stored weights are converted.
        max_model_len: rows of the rotary table; at most shape.max_position.
        load_format: "auto" and "safetensors" read the folder; "dummy" draws random weights on the device from `seed`.
        progress: called with (bytes done, bytes in all) after each tensor.

    Raises ModelFolderError naming the tensor or file, ConfigError naming the option, OutOfMemoryError.
    """
    _check_options(shape, dtype, max_model_len, load_format)
    if shape.unread_fields:
        log.warning("config.json has fields that are not used: %s", ", ".join(shape.unread_fields))
    entries = [] if load_format == "dummy" else checked_entries(folder, shape)
    with torch.inference_mode():
        try:
            decoder = Decoder(shape, dtype=dtype, device=device, max_model_len=max_model_len)
            if load_format == "dummy":
                fill_random(decoder, seed)
            else:
                _fill(destinations(decoder), entries, make_reader(device), progress)
        except RuntimeError as error:  # CUDA has a class of its own for this, the CPU's allocator has not
            if not isinstance(error, torch.OutOfMemoryError) and "not enough memory" not in str(error):
                raise
            raise OutOfMemoryError(f"the weights do not fit into the free memory of {device}; "
                                   "take a smaller or a quantised model, or free the device") from error
        decoder.pack_weights()
    return decoder


def checked_entries(folder: str | os.PathLike[str], shape: ModelShape) -> list[TensorEntry]:
    """The tensors to load, in file order, after checking that the checkpoint is exactly what `shape` needs.

    Raises ModelFolderError naming the tensor that is missing, surplus, misshapen, or of a dtype we do not read.
    """
    stored = read_checkpoint(folder)
    meta = Decoder(shape, dtype=torch.bfloat16, device=torch.device("meta"), max_model_len=1)
    expected = {name: tuple(tensor.shape) for name, tensor in destinations(meta).items()}
    for name, size in expected.items():
        if name not in stored:
            raise ModelFolderError(f"tensor {name} of shape {list(size)} is missing from the checkpoint")
    for name, entry in stored.items():
        if name in expected:
            _check_entry(entry, expected[name])
        elif not is_surplus(name, shape):
            raise ModelFolderError(f"tensor {name} {list(entry.shape)} in {entry.file} has no place in a "
                                   f"{shape.architecture} model with this config.json")
    if shape.tie_embeddings and HEAD in stored and not _same_data(stored[EMBEDDING], stored[HEAD]):
        raise ModelFolderError(f"config.json ties the embeddings (tie_word_embeddings), but {HEAD} differs "
                               f"from {EMBEDDING}")
    return sorted((stored[name] for name in expected), key=lambda entry: (entry.file, entry.start))


def fill_random(decoder: Decoder, seed: int) -> None:
    """Random weights of plausible size, drawn in place: matrices N(0, 1 / in_features), biases N(0, 0.02²), norms 1."""
    generator = torch.Generator(decoder.device).manual_seed(seed)
    for name, tensor in destinations(decoder).items():
        if tensor.dim() == 2:
            tensor.normal_(0.0, tensor.shape[1] ** -0.5, generator=generator)
        elif name.endswith(".bias"):
            tensor.normal_(0.0, 0.02, generator=generator)
        else:
            tensor.fill_(1.0)


def _check_options(shape: ModelShape, dtype: torch.dtype, max_model_len: int, load_format: str) -> None:
    if load_format not in LOAD_FORMATS:
        raise ConfigError(f"load_format must be one of {', '.join(LOAD_FORMATS)}, got {load_format!r}",
                          param="load_format")
    if dtype not in TORCH_DTYPES.values():
        raise ConfigError(f"dtype must be bfloat16, float16 or float32, got {dtype}", param="dtype")
    if not 1 <= max_model_len <= shape.max_position:
        raise ConfigError(f"max_model_len must be between 1 and {shape.max_position}, the model's window, "
                          f"got {max_model_len}", param="max_model_len")
    if shape.quantization is not None:
        method = shape.quantization.get("quant_method", "an unnamed method")
        raise ModelFolderError(f"the checkpoint is quantised with {method}, which is not supported yet; "
                               "use the model's bf16, fp16 or fp32 weights", param="quantization_config")


def _check_entry(entry: TensorEntry, expected: tuple[int, ...]) -> None:
    if entry.shape != expected:
        raise ModelFolderError(f"tensor {entry.name} in {entry.file} has the shape {list(entry.shape)}; "
                               f"config.json asks for {list(expected)}")
    if entry.dtype not in TORCH_DTYPES:
        raise ModelFolderError(f"tensor {entry.name} in {entry.file} is {entry.dtype}; "
                               f"only {', '.join(TORCH_DTYPES)} can be loaded")


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
    table: dict[str, torch.Tensor], entries: Iterable[TensorEntry], reader: Reader, progress: Progress | None,
) -> None:
    entries = list(entries)
    total = sum(entry.nbytes for entry in entries)
    done = 0
    with reader:
        for entry in entries:
            reader.read(entry, TORCH_DTYPES[entry.dtype], table[entry.name])
            done += entry.nbytes
            if progress is not None:
                progress(done, total)
