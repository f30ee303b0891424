"""Abort the requests of one client of an engine that has several.

Why: the engine does not notice that a client has died. It completes the client's requests, which can take minutes, and
    keeps their outputs for a client that never reads them.
How: `EngineCore` gets a method `abort_client`, which other clients can call.
Upstream: no issue is known; present in vLLM 0.32.0. Text: docs/upstream/client-requests.md.
Remove when: vLLM's engine aborts the requests of a client that has died.
"""

from typing import Any

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.engine.core:EngineCore.abort_requests": "self, request_ids",
}


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.engine.core import EngineCore

    EngineCore.abort_client = _abort_client


def _abort_client(core: Any, client_index: int) -> None:
    requests = core.scheduler.requests.values()
    core.abort_requests([request.request_id for request in requests if request.client_index == client_index])
