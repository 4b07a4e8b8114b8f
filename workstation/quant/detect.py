"""A folder's description and its tensors, checked against each other → the form of every layer. No torch.

Formats match the names in their skip lists by five different rules, and some files describe themselves wrongly, so that
the tensors decide what the description leaves open: a 16-bit weight without a scale is 16-bit, an FP8 weight with its scale
is FP8, codes of integers or of a table are that, and a difference is logged. What has two readings is an error that names
the tensor.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from workstation.architecture import ModelShape
from workstation.config_fields import Fields
from workstation.errors import ConfigError, ModelFolderError
from workstation.model_folder import shown
from workstation.quant import awq, bitsandbytes, compressed_tensors, fbgemm, gptq, hf_fp8, modelopt
from workstation.quant.at_load import CHOICES, forms_at_load
from workstation.quant.code_layers import CodeLayers, code_part
from workstation.quant.codes import CODE_TENSORS, CodePacking, CodeScheme
from workstation.quant.description import WHERE, AnyScheme, Description, Scheme
from workstation.quant.forms import PLAIN, Form, Granularity, Part, WeightForms, all_linears
from workstation.quant.integer_layers import IntegerLayers, integer_part
from workstation.quant.integers import CODE_NAMES, NAMES, SIGNED, IntScheme
from workstation.safetensors_header import TensorEntry

log = logging.getLogger(__name__)

FORMATS: dict[str, Callable[[Fields], Description]] = {
    module.METHOD: module.describe for module in (compressed_tensors, hf_fp8, fbgemm, modelopt, gptq, awq, bitsandbytes)}
NOT_YET = {"mxfp4": "gpt-oss's expert weights, which wait for that architecture"}
PLAIN_DTYPES = ("F32", "BF16", "F16")
FP8_DTYPE, SIGNED_DTYPE = "F8_E4M3", "I8"
ZERO_POINTS = ("weight_zero_point", "input_zero_point")
MAX_ZERO_BYTES = 1 << 24
# Beside a linear layer: static scales of activations, and scales of the KV cache (`kv_cache.py` reads those).
_UNUSED_OF_LINEAR = ("input_scale", "activation_scale", "input_scale_ub", "input_global_scale",
                     "k_scale", "v_scale", "output_scale", "q_scale")
_UNUSED_OF_ATTENTION = ("k_scale", "v_scale", "q_scale", "prob_scale", "kv_scale", "attn.k_scale", "attn.v_scale",
                        "attn.q_scale")
_SCALES = ("weight_scale", "weight_scale_inv")


def describe(shape: ModelShape) -> Description | None:
    """The checkpoint's description, None for plain weights. Raises ModelFolderError for what is not served."""
    if shape.quantization is None:
        return None
    config = Fields(shape.quantization, WHERE)
    method = config.text("quant_method", "")
    if method not in FORMATS:
        named = shown(method) if method else "an unnamed method"
        named += f" ({NOT_YET[method]})" if method in NOT_YET else ""
        raise ModelFolderError(f"the checkpoint is quantised with {named}, which is not served; served are "
                               f"{', '.join(FORMATS)}, and plain bf16, fp16 or fp32 weights",
                               param="quantization_config")
    return FORMATS[method](config)


def weight_forms(
    shape: ModelShape, stored: Mapping[str, TensorEntry] | None, quantization: str | None = None,
) -> WeightForms:
    """The form of every linear layer.

    Args:
        stored: the checkpoint's headers; None when there is none (dummy weights), and the description alone decides.
        quantization: one of CHOICES quantises the layers of a 16- or 32-bit checkpoint while loading, the head and
            the embedding excepted; a checkpoint that is quantised already stays as it is.

    Raises ConfigError for another `quantization`, ModelFolderError for a description that is not served or that the
    tensors contradict.
    """
    if quantization not in (None, *CHOICES):
        raise ConfigError(f"quantization must be {', '.join(CHOICES)} or absent, got {shown(quantization)}; "
                          "a checkpoint's own format is found without it", param="quantization")
    description = describe(shape)
    if description is None:
        return forms_at_load(shape, quantization) if quantization else WeightForms()
    if description.unread:
        log.warning("%s has fields that are not used: %s", WHERE, ", ".join(description.unread))
    if stored is None:
        parts = {module: _described(module, scheme, columns) for module, (_, columns) in _sizes(shape).items()
                 if (scheme := description.scheme_of(module)) is not None}
        return WeightForms(parts, method=description.method)
    return _Checker(shape, description, stored).forms()


def _sizes(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """(rows, columns) of every module."""
    return {module: (rows, linear.in_features) for linear in all_linears(shape) for module, rows in linear.parts}


def _described(module: str, scheme: AnyScheme, columns: int) -> Part:
    """What the description alone makes of a module."""
    if isinstance(scheme, IntScheme):
        return integer_part(scheme, module, columns)
    if isinstance(scheme, CodeScheme):
        return code_part(scheme, module, columns)
    return _part(module, scheme, scheme.scale_names[0])


def _kind(scheme: AnyScheme) -> str:
    """What a layer's main tensor is called, or its type where that says more."""
    if isinstance(scheme, CodeScheme):
        return scheme.packing.value
    if isinstance(scheme, IntScheme):
        return f"{SIGNED_DTYPE} weights" if scheme.packing in SIGNED else NAMES[scheme.packing].codes
    return FP8_DTYPE


def _part(module: str, scheme: Scheme, scale: str) -> Part:
    # One scale a matrix becomes one a row, equal in all rows: parts of a fused layer may then differ in theirs.
    form = Form.FP8_BLOCK if scheme.granularity is Granularity.BLOCK else Form.FP8_CHANNEL
    return Part(form, f"{module}.{scale}", scheme.granularity, scheme.activations, scale_dtypes=scheme.scale_dtypes)


class _Checker:
    """Holds the description against the tensors, module by module."""

    def __init__(self, shape: ModelShape, description: Description, stored: Mapping[str, TensorEntry]) -> None:
        self._shape, self._description, self._stored = shape, description, stored
        self._modules = _sizes(shape)
        self._integers = IntegerLayers(stored)
        self._codes4 = CodeLayers(stored)
        self._differ: list[str] = []
        self._parts = {module: part for module in self._modules if (part := self._read(module)) is not PLAIN}

    def forms(self) -> WeightForms:
        parts = self._parts
        if not parts and self._description.schemes:
            raise ModelFolderError(
                f"config.json describes {self._description.method} weights, but no linear layer's weight is quantised; "
                "remove quantization_config to load them as they are", param="quantization_config")
        if self._differ:
            log.warning("the tensors of %d layers differ from what %s says about them, and the tensors are followed: %s",
                        len(self._differ), WHERE, ", ".join(self._differ[:4]) + ("…" if len(self._differ) > 4 else ""))
        return WeightForms(parts, frozenset(self._unused()), self._description.method)

    def _read(self, module: str) -> Part:
        scheme = self._description.scheme_of(module)
        packing = self._codes4.packing(module, scheme)
        if packing is not None:
            return self._four_bits(module, packing, scheme)
        weight = self._stored.get(f"{module}.weight")
        codes = [entry for name in CODE_NAMES if (entry := self._stored.get(f"{module}.{name}"))]
        if codes:
            return self._codes(module, codes[0], weight or (codes[1] if len(codes) > 1 else None), scheme)
        scales = [name for name in _SCALES if f"{module}.{name}" in self._stored]
        if weight is None:  # the loader names what is missing
            if isinstance(scheme, Scheme):
                return _part(module, scheme, (*scales, *scheme.scale_names)[0])
            return PLAIN if scheme is None else _described(module, scheme, self._modules[module][1])
        if weight.dtype in PLAIN_DTYPES:
            if scales:
                raise self._contradiction(weight, f"{module}.{scales[0]} says that it is quantised")
            if scheme is not None:
                self._differ.append(module)
            return PLAIN
        if weight.dtype == SIGNED_DTYPE:
            return self._signed(module, weight, scheme)
        if weight.dtype != FP8_DTYPE or isinstance(scheme, (IntScheme, CodeScheme)):
            raise self._contradiction(weight, f"{self._description.method} here stores {self._kinds()} or 16-bit weights")
        return self._fp8(module, weight, scheme, scales)

    def _four_bits(self, module: str, packing: CodePacking, scheme: AnyScheme | None) -> Part:
        codes = self._stored.get(f"{module}.{CODE_TENSORS[packing].codes}")
        scheme = scheme or (self._only(module, codes) if codes is not None else None)
        if codes is not None and (not isinstance(scheme, CodeScheme) or scheme.packing is not packing):
            raise self._contradiction(codes, f"its tensors are those of {packing}, and {WHERE} describes {self._kinds()}")
        described = scheme if isinstance(scheme, CodeScheme) else CodeScheme(packing)
        return self._codes4.part(module, described, *self._modules[module])

    def _codes(self, module: str, codes: TensorEntry, other: TensorEntry | None, scheme: AnyScheme | None) -> Part:
        if other is not None:
            raise self._contradiction(codes, f"{other.name} is there as well")
        scheme = scheme or self._only(module, codes)
        if not isinstance(scheme, IntScheme) or codes.name != f"{module}.{NAMES[scheme.packing].codes}":
            raise self._contradiction(codes, f"{WHERE} describes {self._kinds()}")
        return self._integers.part(module, scheme, *self._modules[module])

    def _signed(self, module: str, weight: TensorEntry, given: AnyScheme | None) -> Part:
        scheme = given or self._only(module, weight)
        if not isinstance(scheme, IntScheme) or scheme.packing not in SIGNED:
            raise self._contradiction(weight, f"{WHERE} describes {self._kinds()}")
        return self._integers.part(module, scheme, *self._modules[module])

    def _only(self, module: str, weight: TensorEntry) -> AnyScheme:
        """The one scheme there is, for a module that is said to be 16-bit and is not."""
        if len(self._description.schemes) != 1:
            raise self._contradiction(weight, f"{WHERE} says that it is not quantised")
        self._differ.append(module)
        return self._description.schemes[0]

    def _kinds(self) -> str:
        return " and ".join(sorted({_kind(item) for item in self._description.schemes}))

    def _fp8(self, module: str, weight: TensorEntry, given: Scheme | None, scales: list[str]) -> Part:
        scheme = given or self._only(module, weight)
        if not isinstance(scheme, Scheme):
            raise self._contradiction(weight, f"{WHERE} describes {self._kinds()}")
        if len(scales) != 1:
            raise self._contradiction(weight, f"it has {'two scales' if scales else 'no scale'}; "
                                              f"{module}.{' or '.join(scheme.scale_names)} must hold it")
        if scales[0] not in scheme.scale_names:
            raise self._contradiction(weight, f"its scale is {scales[0]}, and {self._description.method} with a scale a "
                                              f"{scheme.granularity} names it {' or '.join(scheme.scale_names)}")
        return _part(module, scheme, scales[0])

    @staticmethod
    def _contradiction(weight: TensorEntry, why: str) -> ModelFolderError:
        return ModelFolderError(f"tensor {weight.name} in {weight.file} is {weight.dtype}, but {why}",
                                param="quantization_config")

    def _unused(self) -> Iterator[str]:
        yield from self._integers.read
        yield from self._codes4.read
        names = [f"{module}.{name}" for module in self._modules for name in _UNUSED_OF_LINEAR]
        names += [f"model.layers.{layer}.self_attn.{name}"
                  for layer in range(self._shape.num_layers) for name in _UNUSED_OF_ATTENTION]
        yield from (name for name in names if name in self._stored)
        for linear in all_linears(self._shape):
            for module, _ in linear.parts:
                yield from self._zeros(module, linear.bias)

    def _zeros(self, module: str, has_bias: bool) -> Iterator[str]:
        """Tensors that say nothing while they are zero: zero points of FP8 weights, GPTQ's biases where none belong."""
        part = self._parts.get(module, PLAIN)
        names = [f"{module}.{name}" for name in ZERO_POINTS] if part.groups is None else []
        if part.activations.quantised and part.groups is not None and f"{module}.{ZERO_POINTS[1]}" in self._stored:
            yield f"{module}.{ZERO_POINTS[1]}"  # tokens are scaled by themselves, without one
        if part.groups is not None and not has_bias:
            names.append(f"{module}.bias")
        for name in names:
            entry = self._stored.get(name)
            if entry is not None and self._is_zero(entry):
                yield name

    @staticmethod
    def _is_zero(entry: TensorEntry) -> bool:
        """Whether it holds zeros only; another value would change the results."""
        if entry.nbytes > MAX_ZERO_BYTES:
            raise ModelFolderError(f"tensor {entry.name} in {entry.file} has {entry.nbytes} bytes; the limit for what must be "
                                   f"zero is {MAX_ZERO_BYTES}")
        if not Path(entry.path).is_file():  # only its header is on this disk
            return True
        with Path(entry.path).open("rb") as file:
            file.seek(entry.start)
            if any(file.read(entry.nbytes)):
                why = "config.json gives the layer no bias" if entry.name.endswith(".bias") else "FP8 weights are symmetric"
                raise ModelFolderError(f"tensor {entry.name} in {entry.file} is not zero, but {why}")
        return True
