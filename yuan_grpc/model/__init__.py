"""The Yuan 2.0 architecture as an out-of-tree vLLM plugin.

vLLM calls `register` through the entry point group `vllm.general_plugins`, in the server's process and again in every
engine process. The model and the tokenizer are named, not imported, until a Yuan checkpoint is really loaded.
"""


def register() -> None:
    """Teaches vLLM the architecture, its configuration, tokenizer and graph-splitting op. Safe to call twice."""
    from transformers import AutoConfig
    from vllm.config import CompilationConfig
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    from yuan_grpc.model.config import ARCHITECTURE, TOKENIZER_MODE, YuanConfig
    from yuan_grpc.model.lfa.ops import PLAN_OP
    from yuan_grpc.model.patches import cpu_spec_decode, grammar_timeout, logprob_token_ids, worker_process
    from yuan_grpc.model.vllm_config import YuanModelConfig

    if ARCHITECTURE in ModelRegistry.get_supported_archs():
        return
    AutoConfig.register(YuanConfig.model_type, YuanConfig)
    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.yuan:YuanForCausalLM")
    TokenizerRegistry.register(TOKENIZER_MODE, f"{__name__}.tokenizer", "YuanTokenizer")
    # vLLM's renderer for tokenizers that bring their own chat template; nothing in it is DeepSeek's but the name.
    RENDERER_REGISTRY.register(TOKENIZER_MODE, "vllm.renderers.deepseek_v32", "DeepseekV32Renderer")
    # A Yuan checkpoint is never to be read with transformers' tokenizer, so `--tokenizer-mode auto` means ours.
    MODELS_CONFIG_MAP[ARCHITECTURE] = YuanModelConfig
    # The op reads per-step metadata, which a captured graph must not bake in: CUDA graphs split around it.
    CompilationConfig._attention_ops.append(PLAN_OP)
    cpu_spec_decode.mend()
    grammar_timeout.mend()
    logprob_token_ids.mend()
    worker_process.prepare()
