"""The configuration of a Yuan 2.0 checkpoint."""

from typing import Any

from transformers import PretrainedConfig

EOD_TOKEN_ID = 77185

UNSUPPORTED = {
    "use_yarn": "the YaRN variant rotates with frequencies of its own",
    "rope_scaling": "scaled rotary embeddings are not part of the base model",
    "use_shareqk": "the shared-query-key variant has no localized filtering",
}
"""Flags that change the forward pass in ways this model does not compute: refused when set, with the reason."""


class YuanConfig(PretrainedConfig):
    """The fields of `config.json`, with the published models' values where a file is silent.

    Raises:
        ValueError: a flag asks for a variant that would be computed wrongly, or the sizes do not fit each other.
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
        rope_theta: float | None = None,
        max_position_embeddings: int | None = None,
        model_max_length: int | None = None,
        tie_word_embeddings: bool = True,
        eod_token_id: int = EOD_TOKEN_ID,
        **kwargs: Any,
    ) -> None:
        for flag, reason in UNSUPPORTED.items():
            if kwargs.get(flag):
                raise ValueError(f"config.json sets `{flag}`, which is not supported: {reason}")
        if hidden_act != "silu":
            raise ValueError(f"`hidden_act` must be 'silu', not {hidden_act!r}")
        if head_dim is None:
            head_dim = hidden_size // num_attention_heads
        if head_dim * num_attention_heads != hidden_size:
            raise ValueError(
                f"`hidden_size` must be `num_attention_heads` × `head_dim`, not {hidden_size} for "
                f"{num_attention_heads} × {head_dim}"
            )
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_attention_heads
        self.head_dim = head_dim
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = {"rope_type": "default", "rope_theta": rope_theta or 10000.0}
        self.rope_parameters |= kwargs.pop("rope_parameters", None) or {}
        if (rope_type := self.rope_parameters["rope_type"]) != "default":
            raise ValueError(f"`rope_type` must be 'default', not {rope_type!r}: no scaling of vLLM's is Yuan's")
        self.max_position_embeddings = max_position_embeddings or model_max_length or 8192
        self.eod_token_id = eod_token_id
        kwargs.pop("num_key_value_heads", None)  # every Yuan has as many as it has heads
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            kwargs.setdefault(name, eod_token_id)
        super().__init__(tie_word_embeddings=tie_word_embeddings, **kwargs)
