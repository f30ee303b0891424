"""Limit the time that the constraint of one request may take between two steps.

Why: between two steps the engine computes which tokens each constraint allows, one request after the other. Nested
    bounded repetitions such as `((a{0,100}){0,100}){0,100}` take seconds per token, and every request waits for them.
How: `XgrammarGrammar.fill_bitmask` and `accept_tokens` measure their processor time. After a call that takes longer
    than the limit, `accept_tokens` accepts no further token, so the scheduler ends that request with an error.
Upstream: not reported yet; seen with vLLM 0.32.0. vllm-project/vllm#54003 is about compiling a constraint only.
Remove when: vLLM limits the time of these calls, or xgrammar computes such constraints in milliseconds.
"""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.yuan_grpc.model")

LIMIT_SECONDS = 0.5
"""Limit of processor time, so that a busy machine ends no request. Real constraints take milliseconds."""


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    if not hasattr(XgrammarGrammar.accept_tokens, "__wrapped__"):
        XgrammarGrammar.fill_bitmask = _timed(XgrammarGrammar.fill_bitmask)
        XgrammarGrammar.accept_tokens = _rejecting_if_slow(_timed(XgrammarGrammar.accept_tokens))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def timed(grammar: Any, *args: Any) -> Any:
        started = time.thread_time()
        result = method(grammar, *args)
        if time.thread_time() - started > LIMIT_SECONDS:
            grammar.is_too_slow = True
        return result

    return timed


def _rejecting_if_slow(accept_tokens: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(accept_tokens)
    def reject_if_slow(grammar: Any, request_id: str, tokens: list[int]) -> bool:
        if getattr(grammar, "is_too_slow", False):
            logger.warning("Ending request %s: its constraint takes too long to compute", request_id)
            return False
        return accept_tokens(grammar, request_id, tokens)

    return reject_if_slow
