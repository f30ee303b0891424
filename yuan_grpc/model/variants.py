"""Fields of `config.json` that distinguish the models that call themselves `YuanForCausalLM`.

Yuan 2.0 has one MLP per layer. Yuan2.0-M32 has experts and wider heads. Yuan 3.0 is refused.
"""

from collections.abc import Mapping
from typing import Any

YUAN_3 = "Yuan 3.0 has other layers, and this is the model of Yuan 2.0"
UNSUPPORTED = {
    "use_shareqk": "the shared-query-key variant has no localized filtering",
    "num_kv_heads": YUAN_3,
    "per_layer_experts_blocks": YUAN_3,
    "router_type": YUAN_3,
    "use_bias": YUAN_3,
    "use_lfa_bias": YUAN_3,
    "vision_config": YUAN_3,
}
"""Fields that change the forward pass in ways this model does not implement, with the reason to reject them."""

ROUTER = "attn_router"
"""The only router that a checkpoint of Yuan 2.0 has."""


def reject_unsupported(fields: Mapping[str, Any]) -> None:
    """Check the fields that select another architecture.

    Raises:
        ValueError: one is set; the message names it and the reason.
    """
    for flag, reason in UNSUPPORTED.items():
        if fields.get(flag):
            raise ValueError(f"config.json sets `{flag}`, which is not supported: {reason}")


def parse_experts(use_moe: bool | None, fields: dict[str, Any] | None, width: int) -> dict[str, Any] | None:
    """Return `moe_config` with all fields that the model reads, or None for a model without experts.

    Args:
        use_moe: the field of `config.json`. Some files have only `moe_config`.
        fields: `moe_config` of `config.json`.
        width: `intermediate_size`, for files that do not state the width of an expert.

    Raises:
        ValueError: a field selects a variant that would be computed wrongly; the message names it.
    """
    if not fields:
        if use_moe:
            raise ValueError("`use_moe` must be false where `moe_config` is absent, not true")
        return None
    if not isinstance(fields, dict):
        raise ValueError(f"`moe_config` must be an object, not {fields!r}")
    _check_variant(fields)
    experts = fields.get("moe_num_experts") or fields.get("num_experts") or 0
    if use_moe is False and experts:
        raise ValueError(f"`use_moe` must be true where `moe_config` has {experts} experts, not false")
    if not experts and not use_moe:
        return None
    parsed = {
        "moe_num_experts": experts,
        "moe_top_k": fields.get("moe_top_k", 2),
        "ffn_hidden_size": fields.get("ffn_hidden_size") or width,
        "norm_topk_prob": bool(fields.get("norm_topk_prob", True)),
        "gated_linear_unit": True,
        "router_type": ROUTER,
    }
    _check_numbers(parsed)
    return parsed


def _check_variant(fields: dict[str, Any]) -> None:
    if fields.get("per_layer_experts_blocks"):
        raise ValueError(f"`moe_config` sets `per_layer_experts_blocks`, which is not supported: {YUAN_3}")
    if (router := fields.get("router_type") or ROUTER) != ROUTER:
        raise ValueError(f"`router_type` in `moe_config` must be '{ROUTER}', not {router!r}: {YUAN_3}")
    if not fields.get("gated_linear_unit", True):
        raise ValueError(
            "`gated_linear_unit` in `moe_config` must be true, not false: the experts of Yuan2.0-M32 are gated"
        )


def _check_numbers(parsed: dict[str, Any]) -> None:
    for name in ("moe_num_experts", "moe_top_k", "ffn_hidden_size"):
        value = parsed[name]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"`{name}` in `moe_config` must be a positive integer, not {value!r}")
    experts, top_k = parsed["moe_num_experts"], parsed["moe_top_k"]
    if top_k > experts:
        raise ValueError(f"`moe_top_k` in `moe_config` must be at most `moe_num_experts`, {experts}, not {top_k}")
