"""Capture a step with prompts in one CUDA graph, like a step that only decodes.

Why: vLLM captures steps with prompts as one graph for each part between two attention layers, because some attention
    backends need that. The host launches the parts and attention between them, and for short prompts that takes longer
    than the GPU needs. The mode `FULL` has whole graphs only, but then decoding uses the graphs of prompts too.
How: `CudaGraphManager._init_candidates` replaces the graphs in parts by whole ones, if all backends allow it, and logs
    it. `dispatch` chooses a graph for decoding whenever each sequence has one token, even if that is its whole prompt.
Upstream: not requested yet; vLLM 0.32.0. Text: docs/upstream/prompt-graphs.md.
Remove when: vLLM has a mode with whole graphs for both kinds of steps.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

from vllm.logger import init_logger

from yuan_grpc.vllm_check import check_vllm

logger = init_logger("vllm.yuan_grpc.model")

TARGETS = {
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager._init_candidates": "self",
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.dispatch": (
        "self, num_reqs, num_tokens, uniform_token_count, ..."
    ),
}


def apply() -> None:
    """Apply the patch in this process, which must serve a Yuan model only. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager

    if not hasattr(CudaGraphManager._init_candidates, "__wrapped__"):
        CudaGraphManager._init_candidates = _with_whole_graphs(CudaGraphManager._init_candidates)
        CudaGraphManager.dispatch = _by_tokens(CudaGraphManager.dispatch)


def _with_whole_graphs(init_candidates: Callable[[Any], None]) -> Callable[[Any], None]:
    from vllm.config import CUDAGraphMode

    @wraps(init_candidates)
    def with_whole_graphs(manager: Any) -> None:
        init_candidates(manager)
        if not _is_possible(manager):
            return
        graphs = manager._capture_descs
        whole = {
            graph: replace(graph, cg_mode=CUDAGraphMode.FULL, num_reqs=min(graph.num_tokens, manager.max_num_reqs))
            for graph in graphs.pop(CUDAGraphMode.PIECEWISE)
        }
        # The largest is captured first, because it allocates the buffer for the results of all.
        graphs[CUDAGraphMode.FULL] = sorted(
            [*graphs[CUDAGraphMode.FULL], *whole.values()], key=lambda graph: graph.num_tokens, reverse=True
        )
        for key, candidates in manager._candidates.items():
            manager._candidates[key] = [whole.get(graph, graph) for graph in candidates]
        manager.has_whole_graphs = True
        logger.info_once("Capturing steps with prompts in one CUDA graph each")

    return with_whole_graphs


def _by_tokens(dispatch: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(dispatch)
    def by_tokens(
        manager: Any, num_reqs: int, num_tokens: int, uniform_token_count: int | None, *args: Any, **kwargs: Any
    ) -> Any:
        if num_tokens == num_reqs and hasattr(manager, "has_whole_graphs"):
            uniform_token_count = 1
        return dispatch(manager, num_reqs, num_tokens, uniform_token_count, *args, **kwargs)

    return by_tokens


def _is_possible(manager: Any) -> bool:
    """Return whether steps with prompts can be captured and all steps with one token per sequence have other graphs."""
    from vllm.config import CUDAGraphMode
    from vllm.v1.attention.backend import AttentionCGSupport
    from vllm.v1.worker.gpu.cudagraph_utils import ModelCudaGraphManager

    config = manager.vllm_config
    decoding = [graph.num_tokens for graph in manager._capture_descs.get(CUDAGraphMode.FULL, ())]
    if (
        not isinstance(manager, ModelCudaGraphManager)
        or manager.cudagraph_mode != CUDAGraphMode.FULL_AND_PIECEWISE
        or manager.use_breakable_cg
        or config.speculative_config is not None
        or manager.dp_size > 1
        or max(decoding, default=0) < manager.max_num_reqs
    ):
        return False
    return all(
        layer.get_attn_backend().get_builder_cls().get_cudagraph_support(config, layer.get_kv_cache_spec(config))
        == AttentionCGSupport.ALWAYS
        for layer in config.compilation_config.static_forward_context.values()
        if hasattr(layer, "get_attn_backend")
    )
