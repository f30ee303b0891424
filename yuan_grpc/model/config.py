"""The configuration of a Yuan 2.0 checkpoint."""

from typing import Any

from transformers import PretrainedConfig

ARCHITECTURE = "YuanForCausalLM"
TOKENIZER_MODE = "yuan"
EOD_TOKEN_ID = 77185

UNSUPPORTED = {
    "use_shareqk": "the shared-query-key variant has no localized filtering",
    "use_moe": "the mixture-of-experts models have other layers",
}
"""Flags that change the forward pass in ways this model does not compute: refused when set, with the reason."""

PLAIN = {"rope_type": "default", "rope_theta": 10_000.0}
YARN = {"rope_type": "yarn", "rope_theta": 1_000_000.0, "factor": 128.0, "original_max_position_embeddings": 8192}
"""The two ways to rotate, in the words of transformers, with the published numbers."""

PUBLISHED_NAMES = {
    "rope_theta": "rope_theta",
    "rotary_base": "rope_theta",
    "yarn_scale_factor": "factor",
    "original_max_position_embeddings": "original_max_position_embeddings",
}
"""Where else a `config.json` may have an entry of `rope_parameters`: in a field of its own."""

FIXED = {
    "attn_factor": 1,
    "beta_fast": 32,
    "beta_slow": 1,
    "extrapolation_factor": 1,
    "partial_rotary_factor": 1,
    "rotary_interleaved": False,
    "rotary_percent": 1,
    "truncate": True,
}
"""What else can be said of a rotation, in a field of its own or in `rope_scaling`, with the only value it has here."""


class YuanConfig(PretrainedConfig):
    """The fields of `config.json`, with the published models' values where a file is silent.

    `rope_parameters` holds all there is to know of the rotation, whichever fields said it; `max_position_embeddings`
    is how many positions there are, with YaRN those it extends to.

    Raises:
        ValueError: a field asks for a variant that would be computed wrongly, or the sizes do not fit each other.
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
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        max_position_embeddings: int | None = None,
        model_max_length: int | None = None,
        use_yarn: bool | None = None,
        tie_word_embeddings: bool = True,
        eod_token_id: int = EOD_TOKEN_ID,
        **kwargs: Any,
    ) -> None:
        for flag, reason in UNSUPPORTED.items():
            if kwargs.get(flag):
                raise ValueError(f"config.json sets `{flag}`, which is not supported: {reason}")
        if hidden_act != "silu":
            raise ValueError(f"`hidden_act` must be 'silu', not {hidden_act!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = hidden_size // num_attention_heads if head_dim is None else head_dim
        self._check_heads()
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        limit = max_position_embeddings or model_max_length
        self.rope_parameters = _rope_parameters(kwargs, use_yarn)
        self.use_yarn = self.rope_parameters["rope_type"] == "yarn"
        if self.use_yarn:
            self.max_position_embeddings = _extended(limit, self.rope_parameters, kwargs)
        else:
            self.max_position_embeddings = limit or 8192
        self.eod_token_id = eod_token_id
        kwargs.pop("num_key_value_heads", None)  # every Yuan has as many as it has heads
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, eod_token_id)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)

    def _check_heads(self) -> None:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"`hidden_size` must be `num_attention_heads` × `head_dim`, not {self.hidden_size} for "
                f"{self.num_attention_heads} × {self.head_dim}"
            )
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even, for its halves are rotated together, not {self.head_dim}")


def check_split(config: YuanConfig, ranks: int) -> None:
    """Whether an MLP can be split over tensor-parallel ranks, for vLLM would find out while it loads, by an assertion.

    It does check the heads in time. Where they come out even, LFA's hidden / 2 does, for a head's dimension is even.

    Raises:
        ValueError: the ranks do not divide the field it names.
    """
    if config.intermediate_size % ranks:
        raise ValueError(
            f"`intermediate_size` must be divisible by the tensor-parallel size, and {config.intermediate_size} is not "
            f"divisible by {ranks}"
        )


def check_stages(config: YuanConfig, stages: int) -> None:
    """Whether every stage of a pipeline has a layer.

    Raises:
        ValueError: there are fewer layers than stages.
    """
    if stages > config.num_hidden_layers:
        raise ValueError(
            f"`pipeline_parallel_size` must be at most `num_hidden_layers`, {config.num_hidden_layers}, not {stages}: "
            "every stage must have a layer"
        )


def _rope_parameters(fields: dict[str, Any], use_yarn: bool | None) -> dict[str, Any]:
    """What config.json says of the rotation, over the published numbers. Takes the fields that say it.

    The length that YaRN extends from is left out where the file does not state it.
    """
    _check_fixed(fields, "config.json")
    said = _entries(fields, "rope_scaling") | _entries(fields, "rope_parameters")
    if said.get("rope_type") == "yarn" and use_yarn is False:
        raise ValueError("`use_yarn` must not be false where `rope_scaling` has the `rope_type` 'yarn'")
    variant = YARN if use_yarn or said.get("rope_type") == "yarn" else PLAIN
    for name in said.keys() - variant.keys() - FIXED.keys():
        raise ValueError(f"`rope_scaling` sets `{name}`, which Yuan's rotation of type {variant['rope_type']!r} lacks")
    for field, name in PUBLISHED_NAMES.items():
        if (value := fields.pop(field, None)) is not None:
            said.setdefault(name, value)
    parameters = {name: said.get(name, value) for name, value in variant.items()}
    parameters["rope_type"] = variant["rope_type"]
    if "original_max_position_embeddings" not in said:
        parameters.pop("original_max_position_embeddings", None)
    for name in parameters.keys() - {"rope_type"}:
        value = parameters[name]
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 1:
            raise ValueError(f"`{name}` must be a number above 1, not {value!r}")
    return parameters


def _entries(fields: dict[str, Any], place: str) -> dict[str, Any]:
    """The entries of `rope_scaling` or `rope_parameters` that say something, under today's names."""
    said = fields.pop(place, None) or {}
    if not isinstance(said, dict):
        raise ValueError(f"`{place}` must be an object, not {said!r}")
    said = {{"type": "rope_type"}.get(name, name): value for name, value in said.items() if value is not None}
    if (rope_type := said.get("rope_type", "default")) not in ("default", "yarn"):
        raise ValueError(f"`{place}` must have the `rope_type` 'default' or 'yarn', not {rope_type!r}")
    _check_fixed(said, place)
    return said


def _check_fixed(said: dict[str, Any], place: str) -> None:
    for name, value in FIXED.items():
        if said.get(name, value) not in (value, None):
            raise ValueError(f"`{name}` in `{place}` must be {value!r} for a Yuan model, not {said[name]!r}")


def _extended(limit: int | None, parameters: dict[str, Any], fields: dict[str, Any]) -> int:
    """How many positions YaRN extends to; fills in the length that it extends from.

    A published file has the latter in `max_position_embeddings` and the former, if at all, in
    `scaled_max_position_embeddings`. A file in the words of transformers has the former in `max_position_embeddings`
    and the latter in `original_max_position_embeddings`.
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
            f"`max_position_embeddings` of a YaRN model must be at least `original_max_position_embeddings`, "
            f"{original}, not {positions}"
        )
    return positions
