"""The Yuan 2.0 architecture as an out-of-tree vLLM plugin.

vLLM calls `register` through the entry point group `vllm.general_plugins`, in the server process and in every engine
process. The model and the tokenizer are registered by name and imported only when a Yuan checkpoint is loaded.
"""

from importlib import import_module

from yuan_grpc.vllm_check import vllm_imports_checked

PATCHES = (
    "client_requests",
    "cpu_amx",
    "cpu_busy_wait",
    "cpu_logprob_ranks",
    "cpu_spec_decode",
    "detokenizer",
    "grammar_timeout",
    "loaded_blocks",
    "logprob_token_ids",
    "model_info",
    "priority_preemption",
    "worker_death",
    "worker_process",
)
"""Modules of `patches` that are applied in each process. The model applies the others when it is built."""


@vllm_imports_checked()
def register() -> None:
    """Register the architecture, its configuration, tokenizer and graph-splitting op. Safe to call twice.

    Raises:
        UnsupportedVllmError: vLLM lacks what the model uses, or has changed a function that a patch replaces.
    """
    from transformers import AutoConfig
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from yuan_grpc.model.config import ARCHITECTURE, TOKENIZER_MODE, Yuan2Config, YuanConfig
    from yuan_grpc.model.lfa.ops import PLAN_OP
    from yuan_grpc.model.vllm_config import YuanModelConfig

    patches = [import_module(f"{__name__}.patches.{name}") for name in PATCHES]

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    for config_class in (YuanConfig, Yuan2Config):
        AutoConfig.register(config_class.model_type, config_class)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.yuan:YuanForCausalLM")
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__name__}.tokenizer", "YuanTokenizer")
    # vLLM's renderer for tokenizers with their own chat template; only its name is specific to DeepSeek.
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.deepseek_v32", "DeepseekV32Renderer")
    # Its hook selects YuanTokenizer for `--tokenizer-mode auto`: transformers' tokenizer encodes differently.
    MODELS_CONFIG_MAP[ARCHITECTURE] = YuanModelConfig
    # The op reads metadata that changes with every step: CUDA graphs of parts of a step are split around it.
    CompilationConfig._attention_ops.append(PLAN_OP)
    for patch in patches:
        patch.apply()
