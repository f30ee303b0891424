"""Names of the parameters that the published weights are loaded into."""

from collections.abc import Mapping

JOINED_MODULES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "self_attn.lf_gate.conv1": ("self_attn.input_proj", (0, 1)),
    "self_attn.v_proj": ("self_attn.input_proj", (2,)),
    "self_attn.q_proj": ("self_attn.qk_proj", (0,)),
    "self_attn.k_proj": ("self_attn.qk_proj", (1,)),
    "mlp.up_proj": ("mlp.up_gate_proj", (0,)),
    "mlp.gate_proj": ("mlp.up_gate_proj", (1,)),
}
"""Published module -> the module here that contains it, and its parts there. A convolution has one part per tap."""

QUANTIZED_MODULES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    **JOINED_MODULES,
    "self_attn.lf_gate.conv1": ("self_attn.input_proj.conv1", (0, 1)),
    "self_attn.v_proj": ("self_attn.input_proj.v_proj", ()),
}
"""The same for a quantized checkpoint."""


def parameter_of(
    published: str, modules: Mapping[str, tuple[str, tuple[int, ...]]] = JOINED_MODULES
) -> tuple[str, tuple[int, ...]]:
    """Return the target parameter and the indices of its parts; () means the whole parameter."""
    path, _, kind = published.rpartition(".")
    if kind == "bias":  # only convolutions have one; here it is a parameter next to the product
        return f"{path}_bias", ()
    for module, (joined, parts) in modules.items():
        if path.endswith(f".{module}"):
            return f"{path.removesuffix(module)}{joined}.{kind}", parts
    return published, ()
