"""Names and shapes of the weights of a published Yuan checkpoint."""

from typing import Any, Protocol

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
    def attention_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def moe_config(self) -> dict[str, Any] | None: ...
    @property
    def num_hidden_layers(self) -> int: ...


def published_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    """Return the name and shape of every weight of a checkpoint; a tied `lm_head.weight` is optional."""
    hidden, attention = config.hidden_size, config.attention_size
    layer_shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (attention, hidden),
        "self_attn.k_proj.weight": (attention, hidden),
        "self_attn.v_proj.weight": (attention, hidden),
        "self_attn.o_proj.weight": (hidden, attention),
        "self_attn.lf_gate.conv1.weight": (hidden // 2, hidden, 2, 1),
        "self_attn.lf_gate.conv1.bias": (hidden // 2,),
        "self_attn.lf_gate.conv2.weight": (hidden, hidden // 2, 2, 1),
        "self_attn.lf_gate.conv2.bias": (hidden,),
        "self_attn.lf_gate.output_layernorm.weight": (hidden,),
    } | _mlp_shapes(config)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in layer_shapes.items()}
    return shapes | {"model.norm.weight": (hidden,), HEAD: (config.vocab_size, hidden)}


def _mlp_shapes(config: Sizes) -> dict[str, tuple[int, ...]]:
    hidden, width, moe = config.hidden_size, config.intermediate_size, config.moe_config
    if moe is None:
        return {
            "mlp.up_proj.weight": (width, hidden),
            "mlp.gate_proj.weight": (width, hidden),
            "mlp.down_proj.weight": (hidden, width),
        }
    experts, width = moe["moe_num_experts"], moe["ffn_hidden_size"]
    shapes: dict[str, tuple[int, ...]] = {
        f"mlp.gate.{projection}.weight": (experts, hidden) for projection in ("query", "key", "value")
    }
    for expert in range(experts):
        shapes[f"mlp.experts.{expert}.w1.weight"] = (2 * width, hidden)
        shapes[f"mlp.experts.{expert}.w2.weight"] = (hidden, width)
    return shapes
