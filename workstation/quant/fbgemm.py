"""`quant_method: "fbgemm_fp8"`: X.weight F8_E4M3 [N, K], X.weight_scale [N, 1], activations scaled per token.

A token's largest value counts as `activation_scale_ub` at most when its scale is made; what lies beyond saturates.
"""

from __future__ import annotations

from workstation.config_fields import Fields
from workstation.quant.description import Description, Scheme, is_under, names_in
from workstation.quant.forms import HEAD_MODULE, Activations, Granularity

METHOD = "fbgemm_fp8"
DEFAULT_BOUND = 1200.0


def describe(config: Fields) -> Description:
    config.asked.add("quant_method")
    bound = config.number("activation_scale_ub", 1e-3, 1e9, DEFAULT_BOUND)
    kept = (HEAD_MODULE, *names_in(config, "modules_to_not_convert"))
    scheme = Scheme(Granularity.CHANNEL, activations=Activations(bound=bound))
    return Description(METHOD, (scheme,), lambda module: None if any(is_under(module, name) for name in kept) else scheme,
                       tuple(config.unasked()))
