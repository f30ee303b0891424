"""What the architecture asks of vLLM's configuration."""

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from yuan_grpc.model.config import TOKENIZER_MODE, check_split, check_stages
from yuan_grpc.model.lfa.cache import check_block_size

GRAMMAR_BACKEND = "xgrammar"
"""guidance takes fast tokenizers only, outlines counts this one's spaces twice, and lm-format-enforcer does not load.
vLLM's `auto` falls back to these, and where it does so first it stays with them."""

DRAFTED_FROM_THE_TEXT = ("ngram", "ngram_gpu", "suffix")
"""Ways of speculative decoding that need no model beside this one."""

QUANTIZED_WHILE_LOADING = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
"""Ways of quantization that start from the published weights."""

CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Tokens of a step that vLLM captures a CUDA graph for, up to twice as many as there may be sequences."""
CAPTURED_FOR_PROMPTS = (64, *range(128, 2048, 128), *range(2048, 4097, 256))
"""And Yuan besides, as far as a host may take longer to launch a layer's kernels than a GPU to run them."""
LAUNCHED_MEANWHILE = 4096 * 2048**2
"""How far that is: a step's tokens times a layer's size on each rank, which is as the square of its width."""
HOPPER = 90
"""The family of GPUs that all this was measured on; vLLM captures larger steps on the next one by itself."""
MULTIPROCESSORS = 132
"""Of a Hopper GPU, at most."""


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
        """Refuses what would be computed wrongly or end the engine at a later request, and chooses what is left open.

        Raises:
            ValueError: the option, and why.
        """
        _check_split(vllm_config)
        _check_drafts(vllm_config)
        _check_quantization(vllm_config.model_config)
        _check_transfer(vllm_config)
        _check_invariance()
        outputs = vllm_config.structured_outputs_config
        if outputs.backend not in ("auto", GRAMMAR_BACKEND):
            raise ValueError(f"the structured outputs `backend` must be '{GRAMMAR_BACKEND}', not '{outputs.backend}'")
        outputs.backend = GRAMMAR_BACKEND
        if current_platform.is_cuda():
            _start_compiled_kernels_early(vllm_config)
            _capture_more(vllm_config)
            _make_room_for_few_splits(vllm_config)
            if envs.VLLM_BATCH_INVARIANT and vllm_config.attention_config.backend is None:
                # FlashAttention computes a token otherwise if there are prompts in its step.
                vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN


def _check_split(vllm_config: VllmConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    check_split(model.hf_config, parallel.tensor_parallel_size)
    check_stages(model.hf_config, parallel.pipeline_parallel_size)
    if parallel.pipeline_parallel_size > 1 and model.enforce_eager and current_platform.is_cpu():
        raise ValueError(
            "`enforce_eager` must be false for a pipeline on CPUs, not true: "
            "vLLM makes room for what a stage hands on only when it compiles"
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (ranks := getattr(parallel, option)) > 1:
            raise ValueError(f"`{option}` must be 1 for Yuan, not {ranks}: LFA's state is not split")
    if parallel.use_ubatching:
        raise ValueError("`enable_dbo` must be false for Yuan, not true: LFA's state is planned for whole steps")


def _check_drafts(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in DRAFTED_FROM_THE_TEXT:
        raise ValueError(
            f"`speculative_config` must name one of the methods {', '.join(DRAFTED_FROM_THE_TEXT)} for Yuan, "
            f"not '{speculative.method}': no draft model of Yuan's is known"
        )
    if vllm_config.cache_config.user_specified_block_size:  # otherwise not known yet
        check_block_size(vllm_config)


def _check_quantization(model_config: ModelConfig) -> None:
    stored = model_config.model_arch_config.quantization_config
    if stored is not None:
        raise ValueError(
            f"`quantization_config` in config.json must be absent for Yuan, not '{stored.get('quant_method')}': "
            "LFA's product and the values' are one here, and such checkpoints quantise the values' alone"
        )
    if model_config.quantization not in (None, *QUANTIZED_WHILE_LOADING):
        raise ValueError(
            f"`quantization` must be one of {', '.join(QUANTIZED_WHILE_LOADING)} for Yuan, "
            f"not '{model_config.quantization}': no other is known to suit LFA's joined products"
        )


def _check_transfer(vllm_config: VllmConfig) -> None:
    reason = "it is not known to move LFA's state with the keys and values"  # some connectors see attention layers only
    if (transfer := vllm_config.kv_transfer_config) is not None:
        raise ValueError(f"`kv_transfer_config` must be unset for Yuan, not '{transfer.kv_connector}': {reason}")
    if (size := vllm_config.cache_config.kv_offloading_size) is not None:
        raise ValueError(f"`kv_offloading_size` must be unset for Yuan, not {size}: {reason}")


def _check_invariance() -> None:
    if envs.VLLM_BATCH_INVARIANT and current_platform.is_cpu():
        raise ValueError(
            "`VLLM_BATCH_INVARIANT` must be unset on CPUs, not 1: vLLM has that mode on GPUs alone, "
            "and in float32 a request gets the same tokens in any batch here"
        )


def _start_compiled_kernels_early(vllm_config: VllmConfig) -> None:
    """Has them begin before the one ahead ends, as Yuan's own do: see `early`.

    Not where ranks add up their results, for which vLLM may take kernels of FlashInfer's. Of these it says that what
    begins early behind them may read what is not there yet.
    """
    alone = vllm_config.parallel_config.tensor_parallel_size == 1
    if alone and current_platform.is_device_capability_family(HOPPER):
        vllm_config.compilation_config.inductor_compile_config.setdefault("triton.enable_pdl", True)


def _capture_more(vllm_config: VllmConfig) -> None:
    """Has vLLM capture CUDA graphs of larger steps, too, where no one has chosen and it has no reason for its own."""
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    chosen = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    own_reason = vllm_config.speculative_config is not None or vllm_config.performance_mode != "balanced"
    if chosen or own_reason or not current_platform.is_device_capability_family(HOPPER):
        return
    width, ranks = vllm_config.model_config.get_hidden_size(), vllm_config.parallel_config.tensor_parallel_size
    largest_prompt = min(LAUNCHED_MEANWHILE * ranks // width**2, CAPTURED_FOR_PROMPTS[-1])
    largest_of_vllms = min(2 * scheduler.max_num_seqs, CAPTURED[-1])
    most = min(max(largest_prompt, largest_of_vllms), scheduler.max_num_batched_tokens)
    sizes = {size for size in CAPTURED if size <= largest_of_vllms}
    sizes |= {size for size in CAPTURED_FOR_PROMPTS if size <= largest_prompt}
    sizes |= {scheduler.max_num_seqs, scheduler.max_num_batched_tokens}
    compilation.cudagraph_capture_sizes = sorted(size for size in sizes if size <= most)


def _make_room_for_few_splits(vllm_config: VllmConfig) -> None:
    """Bounds into how many parts FlashAttention may cut a sequence's keys, for it makes room for that many.

    It cuts them to keep all multiprocessors busy, which takes no more parts than there are multiprocessors to a head.
    """
    heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
    attention = vllm_config.attention_config
    splits = attention.flash_attn_max_num_splits_for_cuda_graph
    attention.flash_attn_max_num_splits_for_cuda_graph = min(splits, cdiv(MULTIPROCESSORS, heads))
