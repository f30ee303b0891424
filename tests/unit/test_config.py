"""YuanConfig: defaults, alternative fields, and rejected values."""

from typing import Any

import pytest

from yuan_grpc.model.config import (
    Yuan2Config,
    YuanConfig,
    check_overrides,
    check_split,
    check_stages,
)
from yuan_grpc.model.variants import UNSUPPORTED

YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 128, "original_max_position_embeddings": 8192}


def config(**fields: Any) -> YuanConfig:
    """Return the configuration of a file with these fields."""
    return YuanConfig(**fields)


def scaling(**entries: Any) -> dict[str, Any]:
    """Return a `rope_scaling` of type YaRN."""
    return {"type": "yarn", **entries}


def test_defaults_are_the_published_values() -> None:
    default = config()
    assert (default.rms_norm_eps, default.tie_word_embeddings, default.use_yarn) == (1e-6, True, False)
    assert default.rope_parameters == {"rope_type": "default", "rope_theta": 10_000}
    assert (default.bos_token_id, default.eos_token_id, default.pad_token_id) == (77185, 77185, 77185)
    assert (default.head_dim, default.num_key_value_heads, default.max_position_embeddings) == (64, 32, 8192)
    assert config(model_max_length=4096).max_position_embeddings == 4096


def test_yarn_defaults_are_the_published_values() -> None:
    yarn = config(use_yarn=True)
    assert (yarn.use_yarn, yarn.rope_parameters, yarn.max_position_embeddings) == (True, YARN, 1_048_576)


def test_a_published_yarn_file_states_the_length_it_extends_from() -> None:
    assert config(use_yarn=True, max_position_embeddings=8192, model_max_length=8192).max_position_embeddings == 2**20
    extended = config(
        use_yarn=True, max_position_embeddings=4096, scaled_max_position_embeddings=65536, yarn_scale_factor=16
    )
    assert extended.max_position_embeddings == 65536
    assert extended.rope_parameters == YARN | {"factor": 16, "original_max_position_embeddings": 4096}


def test_a_yarn_file_in_transformers_notation_states_the_length_it_extends_to() -> None:
    entries = scaling(factor=4.0, original_max_position_embeddings=8192)
    yarn = config(use_yarn=True, max_position_embeddings=32768, rope_scaling=entries, rope_theta=5e5)
    assert yarn.max_position_embeddings == 32768
    assert yarn.rope_parameters == YARN | {"rope_theta": 5e5, "factor": 4}
    assert config(rope_scaling=entries).max_position_embeddings == 32768
    assert config(rope_scaling=entries, max_position_embeddings=8192).max_position_embeddings == 8192


@pytest.mark.parametrize("field", ["rope_theta", "rotary_base"])
def test_the_base_has_two_field_names(field: str) -> None:
    assert config(**{field: 5e5}).rope_parameters["rope_theta"] == 5e5
    assert config(use_yarn=True, **{field: 5e5}).rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    "fields",
    [{}, {"use_yarn": True}, {"rope_scaling": scaling(original_max_position_embeddings=8192)}],
    ids=["default", "published yarn", "yarn in transformers notation"],
)
@pytest.mark.parametrize("positions", [None, 8192, 16384])
def test_a_saved_configuration_loads_unchanged(fields: dict[str, Any], positions: int | None) -> None:
    original = config(max_position_embeddings=positions, **fields)
    loaded = config(**original.to_dict())
    assert loaded.to_dict() == original.to_dict()


def test_yarn_fields_are_ignored_without_yarn() -> None:
    fields = {"use_yarn": False, "yarn_scale_factor": 128, "rope_scaling": None, "attn_factor": 1.0}
    assert config(**fields).rope_parameters == config().rope_parameters


@pytest.mark.parametrize("flag", sorted(UNSUPPORTED))
def test_an_unsupported_variant_is_rejected(flag: str) -> None:
    with pytest.raises(ValueError, match=f"config.json sets `{flag}`, which is not supported"):
        config(**{flag: True})
    config(**{flag: False})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"rope_scaling": True}, "`rope_scaling` must be an object, not True"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "`rope_scaling` must have the `rope_type` .* 'linear'"),
        ({"use_yarn": True, "rope_scaling": {"rope_type": "dynamic"}}, "`rope_scaling` must have .* not 'dynamic'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, "`rope_parameters` must have .* not 'llama3'"),
        ({"rope_scaling": {"factor": 2.0}}, "`rope_scaling` sets `factor`, which Yuan's rotation of type 'default'"),
        ({"rope_scaling": scaling(mscale=0.7)}, "`rope_scaling` sets `mscale`, which .* 'yarn' lacks"),
        ({"rope_scaling": scaling(beta_fast=16)}, "`beta_fast` in `rope_scaling` must be 32 for a Yuan model, not 16"),
        ({"use_yarn": True, "attn_factor": 0.5}, r"`attn_factor` in `config.json` must be 1 .* not 0\.5"),
        ({"rotary_percent": 0.5}, "`rotary_percent` in `config.json` must be 1"),
        ({"use_yarn": False, "rope_scaling": scaling()}, "`use_yarn` must not be false where"),
        ({"use_yarn": True, "yarn_scale_factor": 0.5}, r"`factor` must be a number above 1, not 0\.5"),
        ({"rope_scaling": scaling(factor="128")}, "`factor` must be a number above 1, not '128'"),
        (
            {"use_yarn": True, "max_position_embeddings": 4096},
            "at least `original_max_position_embeddings`, 8192, .* not 4096",
        ),
    ],
)
def test_an_unsupported_rotation_is_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


M32: dict[str, Any] = {
    "num_attention_heads": 16,
    "attention_projection_size": 4096,
    "max_position_embeddings": 16384,
    "use_moe": True,
    "moe_config": {
        "moe_num_experts": 32,
        "moe_top_k": 2,
        "norm_topk_prob": True,
        "ffn_hidden_size": 8192,
        "gated_linear_unit": True,
        "router_type": "attn_router",
    },
}
"""The fields of Yuan2.0-M32."""

YUAN_3: dict[str, Any] = M32 | {
    "num_hidden_layers": 40,
    "num_kv_heads": 4,
    "use_bias": False,
    "use_lfa_bias": True,
    "moe_config": M32["moe_config"] | {"per_layer_experts_blocks": [32] * 40},
}
"""Fields that the published code of Yuan 3.0 reads, and that Yuan 2.0 lacks."""


def experts(**fields: Any) -> dict[str, Any]:
    """Return M32's fields with others in `moe_config`."""
    return M32 | {"moe_config": M32["moe_config"] | fields}


@pytest.mark.parametrize("model_type", ["yuan", "yuan2"])
def test_yuan_2_m32_has_wider_heads_and_experts(model_type: str) -> None:
    class_ = {"yuan": YuanConfig, "yuan2": Yuan2Config}[model_type]
    assert class_.model_type == model_type
    m32 = class_(**M32)
    assert (m32.head_dim, m32.rotary_dim, m32.attention_size) == (256, 128, 4096)
    assert (m32.use_moe, m32.num_experts, m32.num_experts_per_tok) == (True, 32, 2)
    assert class_(**m32.to_dict()).to_dict() == m32.to_dict()
    assert not config().use_moe
    assert config(moe_config={"moe_num_experts": 0}).moe_config is None


def test_fields_of_experts_have_defaults() -> None:
    m32 = config(intermediate_size=512, moe_config={"num_experts": 8})
    assert m32.moe_config == M32["moe_config"] | {"moe_num_experts": 8, "ffn_hidden_size": 512}
    assert m32.head_dim == m32.rotary_dim == 64


@pytest.mark.parametrize("name", ["partial_rotary_factor", "rotary_percent"])
def test_the_share_of_a_head_that_is_rotated_may_be_stated(name: str) -> None:
    assert config(**M32, **{name: 0.5}).rotary_dim == 128
    with pytest.raises(ValueError, match=rf"`{name}` in `config\.json` must be 1"):
        config(**M32, **{name: 0.25})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (YUAN_3, "sets `num_kv_heads`, which is not supported: Yuan 3.0"),
        (experts(per_layer_experts_blocks=[32, 31]), "`moe_config` sets `per_layer_experts_blocks`, .* Yuan 3.0"),
        (experts(router_type="linear"), "`router_type` in `moe_config` must be 'attn_router', not 'linear'"),
        (experts(gated_linear_unit=False), "`gated_linear_unit` in `moe_config` must be true, not false"),
        (experts(moe_top_k=33), "`moe_top_k` in `moe_config` must be at most `moe_num_experts`, 32, not 33"),
        (experts(moe_top_k=0), "`moe_top_k` in `moe_config` must be a positive integer, not 0"),
        (experts(moe_num_experts=True), "`moe_num_experts` in `moe_config` must be a positive integer, not True"),
        (experts(ffn_hidden_size="8192"), "`ffn_hidden_size` in `moe_config` must be a positive integer"),
        (M32 | {"use_moe": False}, "`use_moe` must be true where `moe_config` has 32 experts, not false"),
        ({"use_moe": True}, "`use_moe` must be false where `moe_config` is absent, not true"),
        ({"moe_config": True}, "`moe_config` must be an object, not True"),
        (M32 | {"use_yarn": True}, "`use_yarn` must be false with `attention_projection_size`"),
        (M32 | {"attention_projection_size": 1024}, "`attention_projection_size` must be at least 2048, not 1024"),
        (M32 | {"attention_projection_size": 4095}, "`attention_projection_size` must be .*, 16 × 255, not 4095"),
        (M32 | {"attention_projection_size": 16 * 129}, "`head_dim` must be even, .*, not 129"),
        (M32 | {"hidden_size": 2047}, "`hidden_size` must be divisible by the number of heads, 16, not 2047"),
    ],
)
def test_other_variants_of_the_name_are_rejected(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(**fields)


def test_overridden_experts_are_derived_again() -> None:
    overridden = config(**M32)
    overridden.update({"moe_config": {"moe_num_experts": 8}})
    assert (overridden.num_experts, overridden.use_moe) == (8, True)
    overridden.moe_config = {"moe_num_experts": 4, "moe_top_k": 3}  # as vLLM sets an object
    check_overrides(overridden)
    assert (overridden.num_experts, overridden.num_experts_per_tok) == (4, 3)
    assert overridden.moe_config["ffn_hidden_size"] == 8192


def test_experts_are_split_by_width_or_by_number() -> None:
    check_split(config(**M32), 4)
    check_split(config(**experts(moe_num_experts=5, ffn_hidden_size=8190)), 4, expert_parallel=True)
    with pytest.raises(
        ValueError, match="`ffn_hidden_size` must be divisible by the tensor-parallel size, 4, not 8190"
    ):
        check_split(config(**experts(ffn_hidden_size=8190)), 4)
    with pytest.raises(ValueError, match="`moe_num_experts` must be at least the number of ranks, 4, not 3"):
        check_split(config(**experts(moe_num_experts=3)), 4, expert_parallel=True)


@pytest.mark.parametrize(
    ("fields", "changed"),
    [
        ({"num_attention_heads": 16}, {"head_dim": 128, "num_key_value_heads": 16}),
        ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}),
        ({"use_yarn": True}, {"rope_parameters": YARN, "max_position_embeddings": 2**20}),
        ({"vocab_size": 200000}, {}),
    ],
    ids=["heads", "base", "yarn", "vocabulary"],
)
def test_fields_that_follow_from_overridden_ones_are_derived_again(
    fields: dict[str, Any], changed: dict[str, Any]
) -> None:
    overridden = config(architectures=["YuanForCausalLM"], dtype="bfloat16")
    before = overridden.to_dict()
    overridden.update(fields)
    check_overrides(overridden)
    after = overridden.to_dict()
    different = {name: value for name, value in after.items() if value != before.get(name)}
    assert different == {name: value for name, value in fields.items() if name in before} | changed


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"use_moe": True}, "`use_moe` must be false where `moe_config` is absent"),
        ({"hidden_act": "gelu"}, "`hidden_act` must be 'silu', not 'gelu'"),
        ({"rope_theta": 0}, "`rope_theta` must be a number above 1, not 0"),
        ({"head_dim": 48}, "`hidden_size` must be `num_attention_heads` × `head_dim`, 32 × 48, not 2048"),
        ({"beta_fast": 16}, "`beta_fast` in `config.json` must be 32"),
    ],
)
def test_overridden_fields_are_checked_like_those_of_a_file(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config().update(fields)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("hidden_act", "gelu", "`hidden_act` must be 'silu', not 'gelu'"),
        ("rope_parameters", {"rope_type": "linear", "factor": 2}, "must have the `rope_type` 'default' or 'yarn'"),
        ("head_dim", 48, "`hidden_size` must be .*, not 2048"),
        ("num_key_value_heads", 8, "`num_key_value_heads` must be 32 with the other fields, not 8"),
    ],
)
def test_fields_that_are_set_later_are_checked(field: str, value: object, message: str) -> None:
    changed = config()
    check_overrides(changed)
    setattr(changed, field, value)
    with pytest.raises(ValueError, match=message):
        check_overrides(changed)


def test_inconsistent_sizes_are_rejected() -> None:
    with pytest.raises(ValueError, match="`hidden_size` must be `num_attention_heads` × `head_dim`, 32 × 3, not 100"):
        config(hidden_size=100, num_attention_heads=32)
    with pytest.raises(ValueError, match="`head_dim` must be even"):
        config(hidden_size=96, num_attention_heads=32)


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_the_published_sizes_can_be_split(ranks: int) -> None:
    check_split(config(), ranks)
    check_split(config(hidden_size=8192, intermediate_size=32768, num_attention_heads=64), ranks)


def test_an_uneven_split_is_rejected() -> None:
    with pytest.raises(
        ValueError, match="`intermediate_size` must be divisible by the tensor-parallel size, 4, not 8190"
    ):
        check_split(config(intermediate_size=8190), 4)
    with pytest.raises(ValueError, match=r"`vocab_size`, rounded up to .* 64, must be divisible by .*, 3, not 135040"):
        check_split(config(intermediate_size=8190), 3)


def test_a_pipeline_with_more_stages_than_layers_is_rejected() -> None:
    check_stages(config(num_hidden_layers=3), 3)
    with pytest.raises(ValueError, match="`pipeline_parallel_size` must be at most `num_hidden_layers`, 3, not 4"):
        check_stages(config(num_hidden_layers=3), 4)
