"""YuanConfig: defaults, alternative fields, and rejected values."""

from typing import Any

import pytest

from yuan_grpc.model.config import (
    UNSUPPORTED,
    Yuan2Config,
    YuanConfig,
    check_overrides,
    check_split,
    check_stages,
)

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


M32 = {"moe_config": {"moe_num_experts": 32, "moe_top_k": 2}, "attention_projection_size": 4096}


@pytest.mark.parametrize("model_type", ["yuan", "yuan2"])
def test_a_checkpoint_of_yuan_2_m32_is_rejected_as_that(model_type: str) -> None:
    class_ = {"yuan": YuanConfig, "yuan2": Yuan2Config}[model_type]
    assert class_.model_type == model_type
    with pytest.raises(
        ValueError, match=r"config.json sets `moe_config`, .* Yuan 2\.0-M32 and Yuan 3\.0 have layers of"
    ):
        class_(num_attention_heads=16, **M32)


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
        ({"use_moe": True}, "sets `use_moe`, which is not supported"),
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
