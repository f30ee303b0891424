"""The published layout of a Yuan checkpoint: its weights' names and shapes."""

from yuan_grpc.model.config import YuanConfig

HEAD = "lm_head.weight"
DERIVED = "rotary_emb.inv_freq"
"""Stored by some checkpoints, and computed from the configuration here."""


def published_shapes(config: YuanConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every weight a checkpoint of this configuration has; `lm_head.weight` is optional if tied."""
    hidden, width = config.hidden_size, config.intermediate_size
    of_layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (hidden, hidden),
        "self_attn.v_proj.weight": (hidden, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
        "self_attn.lf_gate.conv1.weight": (hidden // 2, hidden, 2, 1),
        "self_attn.lf_gate.conv1.bias": (hidden // 2,),
        "self_attn.lf_gate.conv2.weight": (hidden, hidden // 2, 2, 1),
        "self_attn.lf_gate.conv2.bias": (hidden,),
        "self_attn.lf_gate.output_layernorm.weight": (hidden,),
        "mlp.up_proj.weight": (width, hidden),
        "mlp.gate_proj.weight": (width, hidden),
        "mlp.down_proj.weight": (hidden, width),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}
