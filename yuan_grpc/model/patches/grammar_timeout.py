"""Limit the time that the constraint of one request may take from other requests.

Why: between two steps the engine computes which tokens each constraint allows, one request after the other. Nested
    repetitions such as `((a{0,100}){0,100}){0,100}` take seconds per token, and every request waits for them. Before,
    it compiles each constraint in one of few threads, which take the processors from the model, and for which the
    constraints of other requests wait. The front end parses the constraint of each request on its event loop.
How: the methods of `XgrammarGrammar` measure their processor time. When those of one request have taken more than the
    limit for their number, `accept_tokens` accepts no further token, so the scheduler ends that request with an error.
    Another request with the same constraint is rejected without compiling it. Compilations run in many threads of a
    low priority, so that a short one ends before a long one that began earlier. A valid constraint is parsed once.
Upstream: not reported yet; seen with vLLM 0.32.0. vllm-project/vllm#54003 is about compiling a constraint only.
    Text: docs/upstream/grammar-timeout.md.
Remove when: vLLM limits the time of these calls, or xgrammar computes such constraints in milliseconds.
"""

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from hashlib import sha256
from typing import Any

from vllm.logger import init_logger

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.structured_output.backend_xgrammar:XgrammarGrammar.fill_bitmask": "self, bitmask, idx",
    "vllm.v1.structured_output.backend_xgrammar:XgrammarGrammar.validate_tokens": "self, tokens",
    "vllm.v1.structured_output.backend_xgrammar:XgrammarGrammar.accept_tokens": "self, request_id, tokens",
    "vllm.v1.structured_output.backend_xgrammar:XgrammarBackend.compile_grammar": (
        "self, request_type, grammar_spec, ..."
    ),
    "vllm.v1.structured_output.backend_xgrammar:validate_xgrammar_grammar": "sampling_params",
    "vllm.v1.structured_output:StructuredOutputManager.__init__": "self, ...",
}

logger = init_logger("vllm.yuan_grpc.model")

LIMIT_SECONDS = 0.15
LIMIT_SECONDS_PER_MASK = 0.008
"""Limits of processor time, so that a busy machine ends no request: this much in total, and this much more for each
mask. Most constraints take less than a millisecond for each; a string of at most 200 characters takes 3 ms."""
MAX_SLOW_CONSTRAINTS = 4096
MAX_VALID_CONSTRAINTS = 65_536
COMPILATIONS = 32
"""Constraints that are compiled at a time."""
NICE = 10

_slow_constraints: OrderedDict[object, None] = OrderedDict()
"""Kinds and texts of constraints that took too long."""
_valid_constraints: OrderedDict[bytes, None] = OrderedDict()
"""Hashes of constraints that were parsed without an error."""


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.structured_output import StructuredOutputManager, backend_xgrammar
    from vllm.v1.structured_output.backend_xgrammar import XgrammarBackend, XgrammarGrammar

    if hasattr(XgrammarGrammar.accept_tokens, "__wrapped__"):
        return
    for name in ("fill_bitmask", "validate_tokens", "accept_tokens"):
        setattr(XgrammarGrammar, name, _timed(getattr(XgrammarGrammar, name), is_mask=name == "fill_bitmask"))
    XgrammarGrammar.accept_tokens = _rejecting_if_slow(XgrammarGrammar.accept_tokens)
    XgrammarBackend.compile_grammar = _remembering_slow_ones(XgrammarBackend.compile_grammar)
    StructuredOutputManager.__init__ = _with_low_priority(StructuredOutputManager.__init__)
    backend_xgrammar.validate_xgrammar_grammar = _once(backend_xgrammar.validate_xgrammar_grammar)


def _timed(method: Callable[..., Any], *, is_mask: bool) -> Callable[..., Any]:
    @wraps(method)
    def timed(grammar: Any, *args: Any) -> Any:
        started = time.thread_time()
        result = method(grammar, *args)
        grammar.seconds = getattr(grammar, "seconds", 0.0) + time.thread_time() - started
        grammar.masks = getattr(grammar, "masks", 0) + is_mask
        return result

    return timed


def _is_slow(grammar: Any) -> bool:
    seconds, masks = getattr(grammar, "seconds", 0.0), getattr(grammar, "masks", 0)
    return bool(seconds > LIMIT_SECONDS + masks * LIMIT_SECONDS_PER_MASK)


def _rejecting_if_slow(accept_tokens: Callable[..., bool]) -> Callable[..., bool]:
    @wraps(accept_tokens)
    def reject_if_slow(grammar: Any, request_id: str, tokens: list[int]) -> bool:
        if not _is_slow(grammar):
            return accept_tokens(grammar, request_id, tokens)
        logger.warning("Ending request %s: its constraint takes too long to compute", request_id)
        _slow_constraints[getattr(grammar, "constraint", None)] = None
        if len(_slow_constraints) > MAX_SLOW_CONSTRAINTS:
            _slow_constraints.popitem(last=False)
        return False

    return reject_if_slow


def _remembering_slow_ones(compile_grammar: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compile_grammar)
    def compile_unless_slow(backend: Any, request_type: Any, specification: str, **options: Any) -> Any:
        constraint = (request_type, specification)
        if constraint in _slow_constraints:
            raise ValueError("this constraint took too long to compute before")
        grammar = compile_grammar(backend, request_type, specification, **options)
        grammar.constraint = constraint
        return grammar

    return compile_unless_slow


def _with_low_priority(initialize: Callable[..., None]) -> Callable[..., None]:
    @wraps(initialize)
    def initialize_with_low_priority(manager: Any, *args: Any, **kwargs: Any) -> None:
        initialize(manager, *args, **kwargs)
        if executor := getattr(manager, "executor", None):
            executor.shutdown(wait=False)
            manager.executor = ThreadPoolExecutor(COMPILATIONS, "compile-constraint", _lower_priority)

    return initialize_with_low_priority


def _once(validate: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(validate)
    def validate_once(params: Any) -> None:
        outputs = params.structured_outputs
        if outputs is None or outputs.choice:  # vLLM replaces choices with a grammar
            return validate(params)
        fields = (outputs.regex, outputs.json, outputs.grammar, outputs.structural_tag)
        key = sha256(repr(fields).encode(errors="backslashreplace")).digest()
        if key not in _valid_constraints:
            validate(params)
            _valid_constraints[key] = None
            if len(_valid_constraints) > MAX_VALID_CONSTRAINTS:
                _valid_constraints.popitem(last=False)

    return validate_once


def _lower_priority() -> None:
    thread = threading.get_native_id()
    os.setpriority(os.PRIO_PROCESS, thread, os.getpriority(os.PRIO_PROCESS, thread) + NICE)
