"""What the architecture asks of vLLM's configuration."""

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from yuan_grpc.model import TOKENIZER_MODE

GRAMMAR_BACKEND = "xgrammar"
"""guidance takes fast tokenizers only, outlines counts this one's spaces twice, and lm-format-enforcer does not load.
vLLM's `auto` falls back to these, and where it does so first it stays with them."""


class YuanModelConfig(VerifyAndUpdateConfig):
    """vLLM's hook for one architecture, called while it puts its configuration together."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Reads the tokenizer with our class, for transformers' encodes differently without saying so.

        Raises:
            ValueError: another tokenizer mode was asked for.
        """
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"`tokenizer_mode` must be '{TOKENIZER_MODE}' for a Yuan model, not '{model_config.tokenizer_mode}'"
            )
        model_config.tokenizer_mode = TOKENIZER_MODE

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Refuses what would be computed wrongly or end the engine at a later request.

        Raises:
            ValueError: the option, and why.
        """
        if vllm_config.speculative_config is not None:
            raise ValueError("`speculative_config` cannot be used with Yuan: LFA's state cannot be rolled back yet")
        if vllm_config.cache_config.mamba_cache_dtype != "auto":
            raise ValueError("`mamba_cache_dtype` must be 'auto' for Yuan: LFA's state has the model's dtype")
        outputs = vllm_config.structured_outputs_config
        if outputs.backend not in ("auto", GRAMMAR_BACKEND):
            raise ValueError(f"the structured outputs `backend` must be '{GRAMMAR_BACKEND}', not '{outputs.backend}'")
        outputs.backend = GRAMMAR_BACKEND
