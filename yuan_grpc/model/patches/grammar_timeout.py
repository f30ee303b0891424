"""A limit to what one constrained request may cost all others: a mend of vLLM's structured outputs.

The engine computes which tokens a constraint allows between two steps, for one request after the other. Bounded
repetitions of bounded repetitions, `((a{0,100}){0,100}){0,100}`, take seconds for each token, in which nobody gets one.
"""

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from vllm.logger import init_logger

logger = init_logger("vllm.yuan_grpc.model")

LIMIT_SECONDS = 0.5
"""Of processor time, so that a busy machine ends nobody's request. Real constraints take milliseconds."""


def mend() -> None:
    """Ends a request, alone and with an error, whose constraint took too long once. Safe to call twice."""
    from vllm.v1.structured_output.backend_xgrammar import XgrammarGrammar

    if not hasattr(XgrammarGrammar.accept_tokens, "__wrapped__"):
        XgrammarGrammar.fill_bitmask = _timed(XgrammarGrammar.fill_bitmask)
        XgrammarGrammar.accept_tokens = _refusing_slow(_timed(XgrammarGrammar.accept_tokens))


def _timed(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def timed(grammar: Any, *arguments: Any) -> Any:
        began = time.thread_time()
        result = method(grammar, *arguments)
        if time.thread_time() - began > LIMIT_SECONDS:
            grammar.is_too_slow = True
        return result

    return timed


def _refusing_slow(accept_tokens: Callable[..., bool]) -> Callable[..., bool]:
    """What accepts no token is ended by the scheduler."""

    @wraps(accept_tokens)
    def refusing_slow(grammar: Any, request_id: str, tokens: list[int]) -> bool:
        if getattr(grammar, "is_too_slow", False):
            logger.warning("The constraint of request %s takes too long and is given up", request_id)
            return False
        return accept_tokens(grammar, request_id, tokens)

    return refusing_slow
