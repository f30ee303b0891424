"""Continue a request from whole blocks after a KV connector has loaded its prefix.

Why: if a connector has loaded all tokens of a request, vLLM computes the last one again to sample the next. The LFA
    state before that token is not in the cache: a block stores the state after its last token only.
How: `Scheduler._update_waiting_for_remote_kv` first reduces the loaded tokens of a Yuan model to whole blocks, without
    the last token. A request whose tokens fit into one block is computed without a load.
Upstream: not reported; a fault only for models like this. Text: docs/upstream/loaded-blocks.md.
Remove when: connectors ask the model for the tokens from which it can continue.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from yuan_grpc.vllm_check import check_vllm

TARGETS = {"vllm.v1.core.sched.scheduler:Scheduler._update_waiting_for_remote_kv": "self, request"}


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.core.sched.scheduler import Scheduler

    if not hasattr(Scheduler._update_waiting_for_remote_kv, "__wrapped__"):
        Scheduler._update_waiting_for_remote_kv = _keeping_whole_blocks(Scheduler._update_waiting_for_remote_kv)


def _keeping_whole_blocks(update: Callable[..., None]) -> Callable[..., None]:
    from yuan_grpc.model.config import YuanConfig

    @wraps(update)
    def keep_whole_blocks(scheduler: Any, request: Any) -> None:
        if isinstance(scheduler.vllm_config.model_config.hf_config, YuanConfig):
            loaded = min(request.num_computed_tokens, request.num_tokens - 1)
            request.num_computed_tokens = loaded - loaded % scheduler.block_size
            if not request.num_computed_tokens:
                _compute_without_a_load(scheduler, request)
        update(scheduler, request)

    return keep_whole_blocks


def _compute_without_a_load(scheduler: Any, request: Any) -> None:
    """Free the request's blocks as after a failed load; it would find the same tokens in the connector again."""
    scheduler.failed_recving_kv_req_ids.add(request.request_id)
    request.skip_reading_prefix_cache = True
