"""Names and shapes of the weights of a published Yuan checkpoint."""

from typing import Protocol

HEAD = "lm_head.weight"
DERIVED = "rotary_emb.inv_freq"
"""Suffix of a weight that some checkpoints store, but that the model computes from its configuration."""


class Sizes(Protocol):
    """The fields of a configuration that determine the shapes."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...


def published_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight of a checkpoint; a tied `lm_head.weight` is optional."""
    hidden, width = config.hidden_size, config.intermediate_size
    layer_shapes: dict[str, tuple[int, ...]] = {
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
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}
