"""The published layout of a Yuan checkpoint: its weights' names and shapes."""

from yuan_grpc.model.config import YuanConfig

LAYER_WEIGHTS = (
    "input_layernorm.weight",
    "post_attention_layernorm.weight",
    "self_attn.q_proj.weight",
    "self_attn.k_proj.weight",
    "self_attn.v_proj.weight",
    "self_attn.o_proj.weight",
    "self_attn.lf_gate.conv1.weight",
    "self_attn.lf_gate.conv1.bias",
    "self_attn.lf_gate.conv2.weight",
    "self_attn.lf_gate.conv2.bias",
    "self_attn.lf_gate.output_layernorm.weight",
    "mlp.up_proj.weight",
    "mlp.gate_proj.weight",
    "mlp.down_proj.weight",
)
"""Every layer's weights, by their published names behind `model.layers.N.`."""

HEAD = "lm_head.weight"
DERIVED = "rotary_emb.inv_freq"
"""Stored by some checkpoints, and computed from the configuration here."""


def published_shapes(config: YuanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight a checkpoint of this configuration has; `lm_head.weight` is optional if tied."""
    hidden, width = config.hidden_size, config.intermediate_size
    of_layer: dict[str, tuple[int, ...]] = {name: (hidden, hidden) for name in LAYER_WEIGHTS}
    of_layer |= {name: (hidden,) for name in LAYER_WEIGHTS if "layernorm" in name}
    of_layer |= {
        "self_attn.lf_gate.conv1.weight": (hidden // 2, hidden, 2, 1),
        "self_attn.lf_gate.conv1.bias": (hidden // 2,),
        "self_attn.lf_gate.conv2.weight": (hidden, hidden // 2, 2, 1),
        "self_attn.lf_gate.conv2.bias": (hidden,),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}
