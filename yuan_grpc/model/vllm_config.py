"""Checks and defaults for the vLLM configuration of a Yuan model."""

from vllm import envs
from vllm.config import ModelConfig, VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.tokenizers.registry import cached_tokenizer_from_config
from vllm.utils.math_utils import cdiv
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from yuan_grpc.model.config import TOKENIZER_MODE, check_overrides, check_split, check_stages
from yuan_grpc.model.hopper import MULTIPROCESSORS, is_hopper
from yuan_grpc.model.kv_transfer import check_transfer
from yuan_grpc.model.lfa.cache_layout import check_block_size

GRAMMAR_BACKEND = "xgrammar"
"""The only supported backend: guidance requires a fast tokenizer, outlines counts this tokenizer's spaces twice, and
lm-format-enforcer does not load. vLLM's `auto` falls back to these, and keeps the first backend that it has chosen."""

DRAFT_METHODS = ("ngram", "ngram_gpu", "suffix")
"""Methods of speculative decoding that need no draft model."""

ONLINE_QUANTIZATIONS = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
"""Quantizations that are computed from the published weights while they are loaded."""

STORED_QUANTIZATIONS = ("awq", "compressed-tensors", "fp8", "gptq")
"""Formats of quantized checkpoints."""

VLLM_CAPTURE_SIZES = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))
"""Tokens per step that vLLM captures a CUDA graph for, up to twice the number of sequences."""
PREFILL_CAPTURE_SIZES = (64, *range(128, 2048, 128), *range(2048, 4097, 256))
"""Extra sizes for prompt steps, used only while kernel launches may dominate."""
MAX_LAUNCH_BOUND_WORK = 4096 * 2048**2
"""Limit of tokens × hidden_size² / ranks below which a step is launch-bound."""


class YuanModelConfig(VerifyAndUpdateConfig):
    """Hook that vLLM calls while it builds its configuration."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """Select YuanTokenizer, because transformers' tokenizer encodes differently without an error.

        Raises:
            ValueError: another tokenizer mode is configured, or overridden fields are not supported.
        """
        check_overrides(model_config.hf_config)
        if model_config.tokenizer_mode not in ("auto", TOKENIZER_MODE):
            raise ValueError(
                f"`tokenizer_mode` must be '{TOKENIZER_MODE}' for a Yuan model, not '{model_config.tokenizer_mode}'"
            )
        model_config.tokenizer_mode = TOKENIZER_MODE

    @classmethod
    def verify_and_update_config(cls, vllm_config: VllmConfig) -> None:
        """Reject options that would compute wrong results or stop the engine later, and set defaults for unset ones.

        Raises:
            ValueError: an option is not supported; the message names it and the reason.
        """
        _check_vocabulary(vllm_config.model_config)
        _check_split(vllm_config)
        _check_drafts(vllm_config)
        _check_quantization(vllm_config)
        check_transfer(vllm_config)
        _check_invariance()
        outputs = vllm_config.structured_outputs_config
        if outputs.backend not in ("auto", GRAMMAR_BACKEND):
            raise ValueError(f"the structured outputs `backend` must be '{GRAMMAR_BACKEND}', not '{outputs.backend}'")
        outputs.backend = GRAMMAR_BACKEND
        if current_platform.is_cuda():
            _enable_pdl(vllm_config)
            _extend_capture_sizes(vllm_config)
            _limit_attention_splits(vllm_config)
            if envs.VLLM_BATCH_INVARIANT and vllm_config.attention_config.backend is None:
                # With FlashAttention a token's result depends on whether its step has prompts.
                vllm_config.attention_config.backend = AttentionBackendEnum.TRITON_ATTN


def _check_vocabulary(model_config: ModelConfig) -> None:
    tokenizer = cached_tokenizer_from_config(model_config)
    if tokenizer is not None and len(tokenizer) > (rows := model_config.hf_config.vocab_size):
        raise ValueError(
            f"`vocab_size` must be at least {len(tokenizer)}, the number of tokens in the tokenizer, not {rows}"
        )


def _check_split(vllm_config: VllmConfig) -> None:
    model, parallel = vllm_config.model_config, vllm_config.parallel_config
    check_split(model.hf_config, parallel.tensor_parallel_size, parallel.enable_expert_parallel)
    if model.hf_config.use_moe:
        _check_experts(vllm_config)
    check_stages(model.hf_config, parallel.pipeline_parallel_size)
    if parallel.pipeline_parallel_size > 1 and model.enforce_eager and current_platform.is_cpu():
        raise ValueError(
            "`enforce_eager` must be false for a pipeline on CPUs, not true: "
            "vLLM allocates the buffers between stages only when it compiles"
        )
    for option in ("decode_context_parallel_size", "prefill_context_parallel_size"):
        if (ranks := getattr(parallel, option)) > 1:
            raise ValueError(f"`{option}` must be 1 for Yuan, not {ranks}: the LFA state is not split over the context")
    if parallel.use_ubatching:
        raise ValueError("`enable_dbo` must be false for Yuan, not true: the LFA state is planned for whole steps")


def _check_experts(vllm_config: VllmConfig) -> None:
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1:
        raise ValueError(
            f"`data_parallel_size` must be 1 for a Yuan model with experts, not {parallel.data_parallel_size}: "
            "only tensor and expert parallelism are known to work"
        )
    if parallel.enable_eplb:
        raise ValueError(
            "`enable_eplb` must be false for Yuan, not true: experts are loaded once, and each on one rank only"
        )
    if vllm_config.lora_config is not None:
        raise ValueError(
            "`enable_lora` must be false for a Yuan model with experts, not true: no such adapters are known"
        )


def _check_drafts(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    if speculative is not None and speculative.method not in DRAFT_METHODS:
        raise ValueError(
            f"`speculative_config` must name one of the methods {', '.join(DRAFT_METHODS)} for Yuan, "
            f"not '{speculative.method}': there is no known draft model for Yuan"
        )
    if vllm_config.cache_config.user_specified_block_size:  # vLLM chooses other sizes later
        check_block_size(vllm_config)


def _check_quantization(vllm_config: VllmConfig) -> None:
    model_config = vllm_config.model_config
    stored = model_config.model_arch_config.quantization_config
    if stored is not None:
        if (method := stored.get("quant_method")) not in STORED_QUANTIZATIONS:
            raise ValueError(
                f"`quantization_config` in config.json must have one of the methods {', '.join(STORED_QUANTIZATIONS)} "
                f"for Yuan, not '{method}': no other is known to load"
            )
        if model_config.hf_config.use_moe:
            raise ValueError(
                f"`quantization_config` in config.json must be absent for Yuan2.0-M32, not one with {method}: "
                "the experts of such files are not read; --quantization fp8 computes them from the published weights"
            )
        if vllm_config.lora_config is not None:
            raise ValueError(f"`enable_lora` must be false for a checkpoint that is quantized with {method}, not true")
        return
    if model_config.quantization not in (None, *ONLINE_QUANTIZATIONS):
        raise ValueError(
            f"`quantization` must be one of {', '.join(ONLINE_QUANTIZATIONS)} for Yuan, "
            f"not '{model_config.quantization}': no other is known to work with LFA's joined products"
        )


def _check_invariance() -> None:
    if envs.VLLM_BATCH_INVARIANT and current_platform.is_cpu():
        raise ValueError(
            "`VLLM_BATCH_INVARIANT` must be unset on CPUs, not 1: vLLM supports it on GPUs only, "
            "and in float32 a request gets the same tokens in any batch on CPUs"
        )


def _enable_pdl(vllm_config: VllmConfig) -> None:
    """Let compiled kernels start before the previous kernel ends, like the kernels of this package: see `pdl`.

    Not with tensor parallelism: vLLM may then use FlashInfer's all-reduce kernels, and documents that a kernel that
    starts early after one of them can read incomplete results.
    """
    is_single_rank = vllm_config.parallel_config.tensor_parallel_size == 1
    if is_single_rank and is_hopper():
        vllm_config.compilation_config.inductor_compile_config.setdefault("triton.enable_pdl", True)


def _extend_capture_sizes(vllm_config: VllmConfig) -> None:
    """Capture CUDA graphs of larger steps too, unless the operator chose sizes or vLLM has a reason for its own.

    Only on Hopper, where this was measured; vLLM captures larger steps on newer GPUs by default.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    is_chosen = compilation.cudagraph_capture_sizes is not None or compilation.max_cudagraph_capture_size is not None
    is_special = vllm_config.speculative_config is not None or vllm_config.performance_mode != "balanced"
    if is_chosen or is_special or not is_hopper():
        return
    width, ranks = vllm_config.model_config.get_hidden_size(), vllm_config.parallel_config.tensor_parallel_size
    prefill_limit = min(MAX_LAUNCH_BOUND_WORK * ranks // width**2, PREFILL_CAPTURE_SIZES[-1])
    vllm_limit = min(2 * scheduler.max_num_seqs, VLLM_CAPTURE_SIZES[-1])
    limit = min(max(prefill_limit, vllm_limit), scheduler.max_num_batched_tokens)
    sizes = {size for size in VLLM_CAPTURE_SIZES if size <= vllm_limit}
    sizes |= {size for size in PREFILL_CAPTURE_SIZES if size <= prefill_limit}
    sizes |= {scheduler.max_num_seqs, scheduler.max_num_batched_tokens}
    compilation.cudagraph_capture_sizes = sorted(size for size in sizes if size <= limit)


def _limit_attention_splits(vllm_config: VllmConfig) -> None:
    """Limit the number of splits of a sequence's keys that FlashAttention allocates memory for.

    FlashAttention splits keys to keep all multiprocessors busy. One sequence with H heads needs at most
    `MULTIPROCESSORS / H` splits for that.
    """
    heads = vllm_config.model_config.get_num_attention_heads(vllm_config.parallel_config)
    attention = vllm_config.attention_config
    splits = attention.flash_attn_max_num_splits_for_cuda_graph
    attention.flash_attn_max_num_splits_for_cuda_graph = min(splits, cdiv(MULTIPROCESSORS, heads))
