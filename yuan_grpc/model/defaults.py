"""What the architecture asks of vLLM's configuration."""

from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig

from yuan_grpc.model import TOKENIZER_MODE
from yuan_grpc.model.config import check_split

GRAMMAR_BACKEND = "xgrammar"
"""guidance takes fast tokenizers only, outlines counts this one's spaces twice, and lm-format-enforcer does not load.
vLLM's `auto` falls back to these, and where it does so first it stays with them."""


DRAFTED_FROM_THE_TEXT = ("ngram", "ngram_gpu", "suffix")
"""Ways of speculative decoding that need no model beside this one."""


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
        check_split(vllm_config.model_config.hf_config, vllm_config.parallel_config.tensor_parallel_size)
        speculative = vllm_config.speculative_config
        if speculative is not None and speculative.method not in DRAFTED_FROM_THE_TEXT:
            raise ValueError(
                f"`speculative_config` must name one of the methods {', '.join(DRAFTED_FROM_THE_TEXT)} for Yuan, "
                f"not '{speculative.method}': no draft model of Yuan's is known"
            )
        if (ranks := vllm_config.parallel_config.decode_context_parallel_size) > 1:
            raise ValueError(
                f"`decode_context_parallel_size` must be 1 for Yuan, not {ranks}: LFA's state is not split"
            )
        outputs = vllm_config.structured_outputs_config
        if outputs.backend not in ("auto", GRAMMAR_BACKEND):
            raise ValueError(f"the structured outputs `backend` must be '{GRAMMAR_BACKEND}', not '{outputs.backend}'")
        outputs.backend = GRAMMAR_BACKEND
