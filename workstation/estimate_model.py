"""MODEL → its shape and the bytes of its weights, in every form: from headers when at hand, else from the shape. No torch.

MODEL is a catalogue name, a folder, a config.json, or a hub id (config.json and the headers of its safetensors only).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from workstation import hub
from workstation.architecture import ModelShape, read_shape
from workstation.catalog import ModelEntry, demo_folder
from workstation.errors import ConfigError, ModelFolderError
from workstation.model_folder import parse_json_object
from workstation.quant.at_load import CHOICES, SMALLER_GROUPS
from workstation.quant.code_layers import code_part
from workstation.quant.codes import NV_SIZE, CodePacking, CodeScheme
from workstation.quant.detect import FORMATS, weight_forms
from workstation.quant.forms import HEAD_MODULE, SCRATCH_BYTES, Form, WeightForms, all_linears, scratch_bytes, weight_bytes
from workstation.quant.kv_cache import checkpoint_scheme, is_fp8
from workstation.safetensors_header import TensorEntry, read_checkpoint

DENSE_BYTES = 2  # 32-bit checkpoints are served in bfloat16 on a GPU
# How a checkpoint's own method is called here, when it is not served.
_FOUR_BIT = {"awq": "int4", "gptq": "int4", "compressed-tensors": "int4", "mxfp4": "mxfp4", "modelopt": "nvfp4"}
AT_LOAD = ("16-bit", *CHOICES)  # what `ws serve` makes of a 16-bit checkpoint
_NAMES = {Form.FP8_CHANNEL: "fp8", Form.FP8_BLOCK: "fp8"}
_WIDENED = ("int4", *SMALLER_GROUPS, "int8", "nf4", "nvfp4")  # forms of which products of many rows widen a part at a time


@dataclass(frozen=True, slots=True)
class Weights:
    """One way to keep a model's weights.

    Attributes:
        name: "16-bit", "fp8", "int4", "nvfp4", …  nbytes: on the device.
        served: `ws serve` reads this form.  source: "headers" or "shape".
        scratch: bytes that products with such weights need beside them.
    """

    name: str
    nbytes: int
    source: str = "shape"
    scratch: int = 0
    served: bool = True


@dataclass(frozen=True, slots=True)
class EstimatedModel:
    """A model as far as an estimate needs it.

    Attributes:
        own: the weights as the checkpoint has them.  others: the same shape in the usual forms, smallest last.
        entry: from the catalogue, or None.  kv_cache: what the checkpoint says about its KV cache ("" for nothing).
        folder: where its config.json lies on this disk, or None.
    """

    name: str
    shape: ModelShape
    own: Weights
    others: tuple[Weights, ...]
    entry: ModelEntry | None = None
    kv_cache: str = ""
    folder: Path | None = None

    def kv_cache_dtype(self, asked: str) -> str:
        """`--kv-cache-dtype` as `ws serve` takes it for this model: "fp8", or "auto" for 16 bits."""
        return "fp8" if is_fp8(asked, self.kv_cache) else "auto"

    def weights(self, quantization: str | None) -> Weights:
        """The weights in a form by name; None means as the checkpoint has them. Raises ConfigError."""
        if quantization in (None, self.own.name):
            return self.own
        for form in self.others:
            if form.name == quantization:
                return form
            if form.name == "int4" and quantization in SMALLER_GROUPS:
                return _usual(self.shape, quantization)
        raise ConfigError(f"--quantization must be one of {', '.join(form.name for form in self.others)}, "
                          f"got {quantization!r}", param="quantization")


def find_model(
    model: str, entries: Mapping[str, ModelEntry], *, revision: str | None = None, token: str | None = None,
) -> EstimatedModel:
    """Read what an estimate needs, from the network only for a hub id that is neither known nor on this disk.

    Raises ModelNotFoundError, ModelFolderError (naming the field), StartupError (network), ConfigError (an entry without a
    shape whose architecture has not landed).
    """
    path = Path(model).expanduser()
    if model not in entries and path.is_file():
        found = _described(path.parent.name or path.name, read_shape(parse_json_object(path.read_bytes(), path.name)))
        return replace(found, folder=path.parent.resolve())
    entry = entries.get(model)
    if entry is None:
        hub.check_name(model, entries)
    folder = _folder(model, entry, revision)
    if folder is not None:
        return replace(_from_folder(entry.name if entry else model, folder, entry), folder=folder.resolve())
    if entry is not None and entry.shape:
        return _described(entry.name, read_shape(entry.shape), entry)
    if entry is not None and entry.needs:
        raise ConfigError(f"{entry.name} cannot be estimated: it needs {entry.needs}", param="model")
    repo = entry.model if entry else model
    remote = hub.read_remote(repo, revision=revision or (entry.revision if entry else None), token=token)
    return _described(entry.name if entry else model, read_shape(remote.config), entry, remote.tensors)


def _folder(model: str, entry: ModelEntry | None, revision: str | None) -> Path | None:
    """A folder on this disk that holds the model's config.json, or None."""
    if entry is not None and entry.is_bundled:
        return demo_folder()
    local = Path(entry.model if entry else model).expanduser()
    if local.is_dir() or local.is_absolute():
        return hub.checked_folder(local)
    return hub.cached_folder(str(local), revision or (entry.revision if entry else None), os.environ)


def _from_folder(name: str, folder: Path, entry: ModelEntry | None) -> EstimatedModel:
    shape = read_shape(folder)
    try:
        stored = read_checkpoint(folder)
    except ModelFolderError:
        if any(folder.glob("*.safetensors")) and folder.parent.name != "snapshots":
            raise
        stored = None  # a config alone, or a download that is not complete: the shape decides
    return _described(name, shape, entry, stored)


def _described(
    name: str, shape: ModelShape, entry: ModelEntry | None = None, stored: Mapping[str, TensorEntry] | None = None,
) -> EstimatedModel:
    own = _own_weights(shape, entry, stored)
    try:
        kv_cache = checkpoint_scheme(shape)
    except ModelFolderError:  # weights in a form that is estimated and not served
        kv_cache = ""
    return EstimatedModel(name, shape, own, usual_forms(shape), entry, kv_cache)


def _own_weights(
    shape: ModelShape, entry: ModelEntry | None, stored: Mapping[str, TensorEntry] | None,
) -> Weights:
    source = "headers" if stored else "shape"
    if shape.quantization is None:
        wanted = entry.quantization if entry and not stored else ""
        if not wanted:
            return Weights("16-bit", weight_bytes(shape, DENSE_BYTES), source)
        return _usual(shape, wanted)
    method = str(shape.quantization.get("quant_method", ""))
    try:
        forms = weight_forms(shape, stored)
        return Weights(_name(forms), weight_bytes(shape, DENSE_BYTES, forms), source, scratch_bytes(shape, DENSE_BYTES, forms))
    except ModelFolderError:
        if method not in _FOUR_BIT or not _says_four_bits(shape, method):
            raise
    name = _FOUR_BIT[method]
    if stored:
        return Weights(name, sum(tensor.nbytes for tensor in stored.values()), source, served=False)
    return Weights(name, form_bytes(shape, name), served=False)


def _name(forms: WeightForms) -> str:
    """What most layers are kept in."""
    names = [_NAMES.get(part.form, part.form.value) for part in forms.parts.values()]
    return max(names, key=names.count) if names else "16-bit"


def _says_four_bits(shape: ModelShape, method: str) -> bool:
    """Whether a description that is not served is of 4-bit weights; AWQ's default is 4, GPTQ names its bits."""
    text = str(shape.quantization).lower()
    if method in FORMATS:
        return "'num_bits': 4" in text or "nvfp4" in text
    bits = (shape.quantization or {}).get("bits", (shape.quantization or {}).get("w_bit", 4))
    return bits == 4 and not isinstance(bits, bool)


def usual_forms(shape: ModelShape) -> tuple[Weights, ...]:
    """The same shape in the forms people publish, largest first; the embedding and the head stay 16-bit."""
    return tuple(_usual(shape, name) for name in ("16-bit", "fp8", "int8", "nf4", "nvfp4", "int4"))


def _usual(shape: ModelShape, name: str) -> Weights:
    return Weights(name, form_bytes(shape, name), scratch=SCRATCH_BYTES if name in _WIDENED else 0)


def form_bytes(shape: ModelShape, name: str) -> int:
    """Bytes of all weights in a form.

    16-bit, and what `--quantization` makes, as `ws serve` keeps them: fp8 with a float32 scale a row, int8 with a 16-bit one,
    int4 with a 16-bit scale a group, nf4 with a float32 scale a group of 64; nvfp4, which checkpoints come in, with an FP8
    scale a group of 16. Raises ConfigError for another name.
    """
    if name == "16-bit":
        return weight_bytes(shape, DENSE_BYTES)
    if name in CHOICES:
        return weight_bytes(shape, DENSE_BYTES, weight_forms(replace(shape, quantization=None), None, name))
    if name != "nvfp4":
        raise ConfigError(f"the bytes of {name} weights cannot be told from a shape", param="quantization")
    parts = {module: code_part(CodeScheme(CodePacking.MODELOPT), module, linear.in_features) for linear in all_linears(shape)
             for module, _ in linear.parts if module != HEAD_MODULE and linear.in_features % NV_SIZE == 0}
    return weight_bytes(shape, DENSE_BYTES, WeightForms(parts))
