"""Evict the blocks that a preempted request has not computed.

Why: the scheduler puts blocks into the prefix cache when it schedules their computation. With priority scheduling it
    can preempt a request that it has scheduled in the same step. The blocks of that step stay in the cache although
    nothing computes them. The request resumes on them, and its tokens are wrong.
How: `Scheduler._preempt_request` first evicts the blocks after the computed tokens.
Upstream: vllm-project/vllm#43569, open; present in vLLM 0.32.0. See docs/upstream/priority-preemption.md.
Remove when: vLLM removes blocks from the cache that a preempted request has not computed.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.core.sched.scheduler:Scheduler._preempt_request": "self, request, ...",
    "vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks": "self, block_ids",
}


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.core.sched.scheduler import Scheduler

    if not hasattr(Scheduler._preempt_request, "__wrapped__"):
        Scheduler._preempt_request = _evicting_blocks(Scheduler._preempt_request)


def _evicting_blocks(preempt_request: Callable[..., None]) -> Callable[..., None]:
    @wraps(preempt_request)
    def evict_blocks_and_preempt(scheduler: Any, request: Any, *args: Any, **kwargs: Any) -> None:
        cache = scheduler.kv_cache_manager
        for manager in cache.coordinator.single_type_managers:
            blocks = manager.req_to_blocks.get(request.request_id, ())
            num_computed = request.num_computed_tokens // manager.block_size
            cache.evict_blocks({block.block_id for block in blocks[num_computed:]})
        preempt_request(scheduler, request, *args, **kwargs)

    return evict_blocks_and_preempt
