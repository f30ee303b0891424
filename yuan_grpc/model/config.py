"""The configuration of a Yuan 2.0 or Yuan2.0-M32 checkpoint."""

from typing import Any

from transformers import PretrainedConfig

from yuan_grpc.model.variants import parse_experts, reject_unsupported

ARCHITECTURE = "YuanForCausalLM"
TOKENIZER_MODE = "yuan"
EOD_TOKEN_ID = 77185

DEFAULT = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 128.0, "original_max_position_embeddings": 8192}
"""The two rotation types, in the notation of transformers, with the published values."""

PUBLISHED_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_base": "rope_theta",
    "yarn_scale_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""Top-level fields of `config.json` that set an entry of `rope_parameters`."""

EXPERT_FIELDS = ("moe_config", "use_moe", "num_experts", "num_experts_per_tok")
"""Fields that are completed from `moe_config`."""
DERIVED_FIELDS = ("head_dim", "num_key_value_heads", "use_yarn", *EXPERT_FIELDS[1:])
"""Fields that are derived from others. An override of the others derives them again."""
VOCABULARY_MULTIPLE = 64
"""vLLM rounds the rows of the embedding up to a multiple of this number."""

FIXED_VALUES = {
    "attn_factor": 1,
    "beta_fast": 32,
    "beta_slow": 1,
    "extrapolation_factor": 1,
    "partial_rotary_factor": 1,
    "rotary_interleaved": False,
    "rotary_percent": 1,
    "truncate": True,
}
"""Other rotation settings, allowed at the top level and in `rope_scaling`, with the only supported value."""


class YuanConfig(PretrainedConfig):
    """The fields of `config.json`, with the published models' values as defaults.

    `rope_parameters` holds all settings of the rotation, whichever fields set them. `max_position_embeddings` is the
    number of positions. With YaRN, it is the extended number.

    Raises:
        ValueError: a field selects a variant that would be computed wrongly, or the sizes are inconsistent.
    """

    model_type = "yuan"

    def __init__(
        self,
        vocab_size: int = 135040,
        hidden_size: int = 2048,
        intermediate_size: int = 8192,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 32,
        head_dim: int | None = None,
        attention_projection_size: int | None = None,
        use_moe: bool | None = None,
        moe_config: dict[str, Any] | None = None,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int | None = None,
        model_max_length: int | None = None,
        use_yarn: bool | None = None,
        tie_word_embeddings: bool = True,
        eod_token_id: int = EOD_TOKEN_ID,
        **kwargs: Any,
    ) -> None:
        reject_unsupported(kwargs)
        if hidden_act != "silu":
            raise ValueError(f"`hidden_act` must be 'silu', not {hidden_act!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.attention_projection_size = attention_projection_size or None
        self.head_dim = self.attention_size // num_attention_heads if head_dim is None else head_dim
        self._check_heads()
        self.moe_config = parse_experts(use_moe, moe_config, intermediate_size)
        self.use_moe = self.moe_config is not None
        self.num_experts, self.num_experts_per_tok = self._expert_counts()
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        limit = max_position_embeddings or model_max_length
        self._accept_rotary_share(kwargs)
        self.rope_parameters = _rope_parameters(kwargs, use_yarn)
        self.use_yarn = self.rope_parameters["rope_type"] == "yarn"
        if self.use_yarn and self.rotary_dim != self.head_dim:
            raise ValueError("`use_yarn` must be false with `attention_projection_size`: no such model is published")
        if self.use_yarn:
            self.max_position_embeddings = _extended(limit, self.rope_parameters, kwargs)
        else:
            self.max_position_embeddings = limit or 8192
        self.eod_token_id = eod_token_id
        for name in ("num_key_value_heads", "num_experts", "num_experts_per_tok"):  # they follow from other fields
            kwargs.pop(name, None)
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, eod_token_id)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def update(self, config_dict: dict[str, Any]) -> None:
        """Override fields, as `--hf-overrides` does; check and derive the others as if the file had these values.

        Raises:
            ValueError: as for a file.
        """
        fields = {name: value for name, value in self.to_dict().items() if name not in DERIVED_FIELDS}
        if config_dict.keys() & {"rope_parameters", "rope_scaling", "use_yarn"}:
            del fields["rope_parameters"]
        else:
            replaced = {PUBLISHED_NAMES[name] for name in config_dict.keys() & PUBLISHED_NAMES.keys()}
            fields["rope_parameters"] = {n: v for n, v in self.rope_parameters.items() if n not in replaced}
        checked = vars(type(self)(**fields | config_dict))
        unchanged = {"dtype", "torch_dtype", "architectures"} - config_dict.keys()
        for name in checked.keys() - unchanged:
            if not name.startswith("_"):
                setattr(self, name, checked[name])

    @property
    def attention_size(self) -> int:
        """Return the total width of all heads, which is above `hidden_size` in Yuan2.0-M32."""
        return self.attention_projection_size or self.hidden_size

    @property
    def rotary_dim(self) -> int:
        """Return how many of a head's first dimensions are rotated; all of them in Yuan 2.0."""
        return self.hidden_size // self.num_attention_heads

    def _check_heads(self) -> None:
        heads, field = self.num_attention_heads, "hidden_size"
        if self.attention_projection_size:
            field = "attention_projection_size"
            if self.hidden_size % heads:
                raise ValueError(
                    f"`hidden_size` must be divisible by the number of heads, {heads}, not {self.hidden_size}"
                )
        if self.head_dim * heads != self.attention_size:
            raise ValueError(
                f"`{field}` must be `num_attention_heads` × `head_dim`, {heads} × {self.head_dim}, "
                f"not {self.attention_size}"
            )
        if self.head_dim < self.rotary_dim:
            raise ValueError(
                f"`attention_projection_size` must be at least {self.hidden_size}, not {self.attention_size}"
            )
        if self.head_dim % 2 or self.rotary_dim % 2:
            odd = self.head_dim if self.head_dim % 2 else self.rotary_dim
            raise ValueError(f"`head_dim` must be even, because its halves are rotated together, not {odd}")

    def _expert_counts(self) -> tuple[int, int]:
        """Return the number of experts per layer and per token."""
        if self.moe_config is None:
            return 0, 0
        return self.moe_config["moe_num_experts"], self.moe_config["moe_top_k"]

    def _accept_rotary_share(self, fields: dict[str, Any]) -> None:
        """Remove the fields for the rotated share of a head if their value is the supported one."""
        for name in ("partial_rotary_factor", "rotary_percent"):
            if fields.get(name) == self.hidden_size / self.attention_size:
                del fields[name]


class Yuan2Config(YuanConfig):
    """The same configuration under another name, which some published files have."""

    model_type = "yuan2"

    def __init__(self, **kwargs: Any) -> None:  # transformers would generate another one
        super().__init__(**kwargs)


def check_overrides(config: YuanConfig) -> None:
    """Check fields that were set one by one after the configuration was created, as nested `--hf-overrides` are.

    Completes `moe_config`, which may have only the fields that are overridden.

    Raises:
        ValueError: a field has an unsupported value, or does not fit the others.
    """
    checked = type(config)(**config.to_dict())
    for name in EXPERT_FIELDS:
        setattr(config, name, getattr(checked, name))
    for name in ("rope_parameters", "max_position_embeddings", *DERIVED_FIELDS):
        if getattr(checked, name) != (value := getattr(config, name)):
            raise ValueError(f"`{name}` must be {getattr(checked, name)} with the other fields, not {value}")


def check_split(config: YuanConfig, ranks: int, expert_parallel: bool = False) -> None:
    """Check that MLP and embedding can be split over tensor-parallel ranks; vLLM fails an assertion while loading.

    vLLM checks the heads early enough. If they can be split, so can LFA's hidden / 2, because `head_dim` is even.

    Raises:
        ValueError: the width of the MLP or of an expert, the experts or the padded `vocab_size` cannot be split.
    """
    if config.moe_config is None:
        _check_width("intermediate_size", config.intermediate_size, ranks)
    elif not expert_parallel:
        _check_width("ffn_hidden_size", config.moe_config["ffn_hidden_size"], ranks)
    elif config.num_experts < ranks:
        raise ValueError(f"`moe_num_experts` must be at least the number of ranks, {ranks}, not {config.num_experts}")
    rows = -(-config.vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
    if rows % ranks:
        raise ValueError(
            f"`vocab_size`, rounded up to a multiple of {VOCABULARY_MULTIPLE}, must be divisible by the "
            f"tensor-parallel size, {ranks}, not {rows}"
        )


def _check_width(field: str, width: int, ranks: int) -> None:
    if width % ranks:
        raise ValueError(f"`{field}` must be divisible by the tensor-parallel size, {ranks}, not {width}")


def check_stages(config: YuanConfig, stages: int) -> None:
    """Check that every pipeline stage has a layer.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if stages > config.num_hidden_layers:
        raise ValueError(
            f"`pipeline_parallel_size` must be at most `num_hidden_layers`, {config.num_hidden_layers}, not {stages}: "
            "every stage needs a layer"
        )


def _rope_parameters(fields: dict[str, Any], use_yarn: bool | None) -> dict[str, Any]:
    """Return the rotation settings of config.json with published values as defaults, and remove their fields.

    The length that YaRN extends from is missing if the file does not state it.
    """
    _check_fixed(fields, "config.json")
    settings = _entries(fields, "rope_scaling") | _entries(fields, "rope_parameters")
    if settings.get("rope_type") == "yarn" and use_yarn is False:
        raise ValueError("`use_yarn` must not be false where `rope_scaling` has the `rope_type` 'yarn'")
    defaults = YARN if use_yarn or settings.get("rope_type") == "yarn" else DEFAULT
    for name in settings.keys() - defaults.keys() - FIXED_VALUES.keys():
        raise ValueError(f"`rope_scaling` sets `{name}`, which Yuan's rotation of type {defaults['rope_type']!r} lacks")
    for field, name in PUBLISHED_NAMES.items():
        if (value := fields.pop(field, None)) is not None:
            settings.setdefault(name, value)
    parameters = {name: settings.get(name, value) for name, value in defaults.items()}
    parameters["rope_type"] = defaults["rope_type"]
    if "original_max_position_embeddings" not in settings:
        parameters.pop("original_max_position_embeddings", None)
    for name in parameters.keys() - {"rope_type"}:
        value = parameters[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 1:
            raise ValueError(f"`{name}` must be a number above 1, not {value!r}")
    return parameters


def _entries(fields: dict[str, Any], field: str) -> dict[str, Any]:
    """Remove `rope_scaling` or `rope_parameters` from the fields and return its non-null entries by current names."""
    entries = fields.pop(field, None) or {}
    if not isinstance(entries, dict):
        raise ValueError(f"`{field}` must be an object, not {entries!r}")
    entries = {{"type": "rope_type"}.get(name, name): value for name, value in entries.items() if value is not None}
    if (rope_type := entries.get("rope_type", "default")) not in ("default", "yarn"):
        raise ValueError(f"`{field}` must have the `rope_type` 'default' or 'yarn', not {rope_type!r}")
    _check_fixed(entries, field)
    return entries


def _check_fixed(entries: dict[str, Any], location: str) -> None:
    for name, value in FIXED_VALUES.items():
        if entries.get(name, value) not in (value, None):
            raise ValueError(f"`{name}` in `{location}` must be {value!r} for a Yuan model, not {entries[name]!r}")


def _extended(limit: int | None, parameters: dict[str, Any], fields: dict[str, Any]) -> int:
    """Return the number of positions that YaRN extends to, and fill in the length that it extends from.

    A published file states the original length in `max_position_embeddings` and the extended one, if at all, in
    `scaled_max_position_embeddings`. A file in the notation of transformers states the extended length in
    `max_position_embeddings` and the original one in `original_max_position_embeddings`.
    """
    scaled = fields.pop("scaled_max_position_embeddings", None)
    if "original_max_position_embeddings" not in parameters:
        original = YARN["original_max_position_embeddings"]
        if scaled is not None and limit is not None:
            original = limit
        elif limit == original:
            limit = None
        parameters["original_max_position_embeddings"] = original
    original = parameters["original_max_position_embeddings"]
    positions = int(scaled or limit or parameters["factor"] * original)
    if positions < original:
        raise ValueError(
            f"`max_position_embeddings` must be at least `original_max_position_embeddings`, {original}, "
            f"for a YaRN model, not {positions}"
        )
    return positions
