"""Names of the parameters that the published weights are loaded into."""

import re
from collections.abc import Mapping
from typing import NamedTuple

JOINED_MODULES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "self_attn.lf_gate.conv1": ("self_attn.input_proj", (0, 1)),
    "self_attn.v_proj": ("self_attn.input_proj", (2,)),
    "self_attn.q_proj": ("self_attn.qk_proj", (0,)),
    "self_attn.k_proj": ("self_attn.qk_proj", (1,)),
    "mlp.up_proj": ("mlp.up_gate_proj", (0,)),
    "mlp.gate_proj": ("mlp.up_gate_proj", (1,)),
    "mlp.gate.query": ("mlp.router", (0,)),
    "mlp.gate.key": ("mlp.router", (1,)),
    "mlp.gate.value": ("mlp.router", (2,)),
}
"""Published module -> the module here that contains it, and its parts there. A convolution has one part per tap."""

QUANTIZED_MODULES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    **JOINED_MODULES,
    "self_attn.lf_gate.conv1": ("self_attn.input_proj.conv1", (0, 1)),
    "self_attn.v_proj": ("self_attn.input_proj.v_proj", ()),
}
"""The same for a quantized checkpoint."""


EXPERT = re.compile(r"(?P<experts>.*\.mlp\.experts)\.(?P<number>\d+)\.w(?P<weight>[12])\.weight")
EXPERT_PARAMETERS = {"1": ("routed_experts.w13_weight", ("w1", "w3")), "2": ("routed_experts.w2_weight", ("w2",))}
"""Number of an expert's weight -> the parameter of the layer that has this weight of all experts, and its parts there.

The rows of a published w1 are those of the activation, then those that its result is multiplied with.
"""


class Target(NamedTuple):
    """The parameter that a published weight is loaded into."""

    name: str
    parts: tuple[int, ...] | tuple[str, ...] = ()
    """The weight's parts there; () means the whole parameter."""
    expert: int | None = None
    """The expert that the weight belongs to."""


def parameter_of(published: str, modules: Mapping[str, tuple[str, tuple[int, ...]]] = JOINED_MODULES) -> Target:
    """Return where a published weight is loaded to, with the modules of `JOINED_MODULES` or `QUANTIZED_MODULES`."""
    if match := EXPERT.fullmatch(published):
        param, shards = EXPERT_PARAMETERS[match["weight"]]
        return Target(f"{match['experts']}.{param}", shards, int(match["number"]))
    path, _, kind = published.rpartition(".")
    if kind == "bias":  # only convolutions have one; here it is a parameter next to the product
        return Target(f"{path}_bias")
    for module, (joined, parts) in modules.items():
        if path.endswith(f".{module}"):
            return Target(f"{path.removesuffix(module)}{joined}.{kind}", parts)
    return Target(published)
