"""Values of `config.json` that all Yuan models share: sizes that a file may omit, and settings with one value."""

import pytest

from yuan_grpc.model.config import YuanConfig

FIXED = {
    "attn_factor": (1, 2),
    "beta_fast": (32, 33),
    "beta_slow": (1, 2),
    "extrapolation_factor": (1, 0),
    "partial_rotary_factor": (1, 0.5),
    "rotary_interleaved": (False, True),
    "rotary_percent": (1, 0.5),
    "truncate": (True, False),
}
"""The value of the published models, and another one."""


def test_sizes_that_a_file_omits_are_those_of_the_2b_model() -> None:
    config = YuanConfig()
    assert (config.vocab_size, config.hidden_size, config.intermediate_size) == (135040, 2048, 8192)
    assert (config.num_hidden_layers, config.num_attention_heads) == (24, 32)


@pytest.mark.parametrize("name", FIXED)
def test_a_rotation_setting_with_one_value_is_accepted_with_it_only(name: str) -> None:
    published, other = FIXED[name]
    for scaled in ({name: published}, {"rope_scaling": {"type": "yarn", name: published}}):
        assert YuanConfig(**scaled).num_hidden_layers == 24
    for fields in ({name: other}, {"rope_scaling": {"type": "yarn", name: other}}):
        with pytest.raises(ValueError, match=f"`{name}` in .* must be {published!r} for a Yuan model, not {other!r}"):
            YuanConfig(**fields)
