"""Yuan2.0-M32 without an engine: the attention router, and the places of an expert's weights."""

from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns when it is imported

TOKENS, HIDDEN, EXPERTS, WIDTH = 5, 6, 4, 3


def test_the_router_lets_the_experts_of_a_token_attend_to_each_other() -> None:
    from yuan_grpc.model.moe.router import AttentionRouter, load_projection

    router, x = AttentionRouter(HIDDEN, EXPERTS), torch.randn(TOKENS, HIDDEN)
    projections = torch.randn(3, EXPERTS, HIDDEN)
    for part in (2, 0, 1):
        load_projection(router.weight, projections[part], part)
    scores = router(x)
    for token, row in zip(x, scores, strict=True):
        q, k, v = (projection @ token for projection in projections)
        for expert in range(EXPERTS):
            shares = torch.exp(q[expert] * k) / torch.exp(q[expert] * k).sum()
            torch.testing.assert_close(row[expert], (shares * v).sum())


def test_the_router_scores_in_float32() -> None:
    from yuan_grpc.model.moe.router import AttentionRouter, attend

    router = AttentionRouter(HIDDEN, EXPERTS).bfloat16()
    router.weight.data.normal_()
    x = torch.randn(TOKENS, HIDDEN, dtype=torch.bfloat16)
    assert router(x).dtype == torch.float32
    assert torch.equal(router(x), attend((x @ router.weight.T).float()))


def recorder() -> Any:
    """Return a parameter with a loader that records its arguments."""
    param: Any = torch.nn.Parameter(torch.empty(0))
    param.calls = []
    param.weight_loader = lambda _, loaded, *place: param.calls.append((loaded, *place))
    return param


def test_weights_of_experts_are_loaded_in_any_order_in_one_pass() -> None:
    from yuan_grpc.model.checkpoint.layout import published_shapes
    from yuan_grpc.model.checkpoint.loader import Placement, load_checkpoint
    from yuan_grpc.model.checkpoint.mapping import parameter_of
    from yuan_grpc.model.config import YuanConfig

    moe = {"moe_num_experts": EXPERTS, "ffn_hidden_size": WIDTH}
    config = YuanConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, moe_config=moe)
    stored = {name: torch.randn(shape) for name, shape in published_shapes(config).items()}
    params: dict[str, Any] = {}

    def placement(name: str) -> Placement:
        target, parts, expert = parameter_of(name)
        return Placement(params.setdefault(target, recorder()), parts, expert)

    load_checkpoint(((name, stored[name]) for name in reversed(stored)), config, placement)
    experts = "model.layers.0.mlp.experts.routed_experts"
    loaded_w13, loaded_w2 = params[f"{experts}.w13_weight"].calls, params[f"{experts}.w2_weight"].calls
    assert len(loaded_w13) == 2 * EXPERTS
    assert len(loaded_w2) == EXPERTS
    for number in range(EXPERTS):
        published = f"model.layers.0.mlp.experts.{number}"
        parts = {part: loaded for loaded, _, part, expert in loaded_w13 if expert == number}
        assert torch.equal(parts["w1"], stored[f"{published}.w1.weight"][:WIDTH])  # under the activation
        assert torch.equal(parts["w3"], stored[f"{published}.w1.weight"][WIDTH:])
        ((w2, _, part, _),) = [call for call in loaded_w2 if call[3] == number]
        assert part == "w2"
        assert torch.equal(w2, stored[f"{published}.w2.weight"])
    router = {part: loaded for loaded, part in params["model.layers.0.mlp.router.weight"].calls}
    for part, name in enumerate(("query", "key", "value")):
        assert torch.equal(router[part], stored[f"model.layers.0.mlp.gate.{name}.weight"])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.0.mlp.experts.1.w2.weight", "the checkpoint lacks model.layers.0.mlp.experts.1.w2.weight"),
        ("model.layers.0.mlp.gate.value.weight", "the checkpoint lacks model.layers.0.mlp.gate.value.weight"),
    ],
)
def test_a_missing_weight_of_an_expert_or_a_router_is_named(name: str, message: str) -> None:
    from yuan_grpc.model.checkpoint.layout import published_shapes
    from yuan_grpc.model.checkpoint.loader import load_checkpoint
    from yuan_grpc.model.config import YuanConfig

    config = YuanConfig(
        vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, moe_config={"moe_num_experts": 2}
    )
    weights = ((stored, torch.empty(shape)) for stored, shape in published_shapes(config).items() if stored != name)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(weights, config, lambda _: None)


def test_only_the_first_dimensions_of_a_wider_head_are_rotated() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from yuan_grpc.model.config import YuanConfig
    from yuan_grpc.model.rotary import rotary_embedding

    config = YuanConfig(hidden_size=32, num_attention_heads=2, attention_projection_size=64, max_position_embeddings=64)
    with set_current_vllm_config(VllmConfig()):
        rotary: Any = rotary_embedding(config)
    q = torch.randn(64, 2, 32)
    rotated, _ = rotary.forward_native(torch.arange(64), q.flatten(1).clone(), q.flatten(1).clone())
    rotated = rotated.view_as(q)
    assert torch.equal(rotated[..., 16:], q[..., 16:])
    frequencies = 10_000.0 ** (-torch.arange(0, 16, 2) / 16)
    angles = torch.arange(64)[:, None, None] * frequencies
    a, b = q[..., :8], q[..., 8:16]
    expected = torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)
    torch.testing.assert_close(rotated[..., :16], expected, atol=1e-5, rtol=1e-5)
