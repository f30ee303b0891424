"""A KV connector that hands prompts over as NIXL's does, in one process and with any device.

The blocks of a prompt are kept when it has been computed, the last one even if it is not full. A later request with the
same prompt gets all of them, and vLLM computes the last token only. `install` puts it in NIXL's place.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.utils import get_current_attn_backends
from vllm.distributed.kv_transfer.kv_connector.v1 import KVConnectorBase_V1, SupportsHMA
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from yuan_grpc.model.lfa.cache_layout import StateBackend

_KEPT: dict[tuple[int, ...], list[torch.Tensor]] = {}
"""By prompt: the blocks of each layer."""


def install() -> None:
    """Replace NIXL's connector in this process."""
    KVConnectorFactory._registry["NixlConnector"] = lambda: HandOverConnector


@dataclass
class Copies(KVConnectorMetadata):
    """The copies of one step: prompts with their blocks, and requests to load with theirs."""

    keep: list[tuple[tuple[int, ...], list[int]]] = field(default_factory=list)
    load: list[tuple[str, tuple[int, ...], list[int]]] = field(default_factory=list)


class HandOverConnector(KVConnectorBase_V1, SupportsHMA):
    """The scheduler's and the worker's part."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._block_size = vllm_config.cache_config.block_size
        self._copies = Copies()
        self._requests: dict[str, Any] = {}
        self._caches: list[torch.Tensor] = []
        self._loaded: set[str] = set()

    def get_num_new_matched_tokens(self, request: Any, num_computed_tokens: int) -> tuple[int, bool]:
        """Offer the complete prompt, once."""
        if request.request_id in self._requests or tuple(request.prompt_token_ids) not in _KEPT:
            return 0, False
        count = request.num_prompt_tokens - num_computed_tokens
        return count, count > 0

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Plan the load of the blocks that are not in the prefix cache."""
        self._requests[request.request_id] = request
        if num_external_tokens:
            (ids,) = blocks.get_block_ids()
            cached = (request.num_prompt_tokens - num_external_tokens) // self._block_size
            self._copies.load.append((request.request_id, tuple(request.prompt_token_ids), ids[cached:]))

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """Return the step's copies; a prompt is kept in the step that completes it."""
        copies, self._copies = self._copies, Copies()
        for request_id, count in scheduler_output.num_scheduled_tokens.items():
            request = self._requests[request_id]
            prompt, computed = tuple(request.prompt_token_ids), request.num_computed_tokens
            if computed < len(prompt) <= computed + count and prompt not in _KEPT:
                (ids,) = self._kv_cache_manager.get_block_ids(request_id)
                copies.keep.append((prompt, ids[: -(-len(prompt) // self._block_size)]))
        return copies

    def request_finished_all_groups(self, request: Any, block_ids: Any) -> tuple[bool, None]:
        """Free the blocks at once."""
        return False, None

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Use the caches of all layers; NIXL compares the engines by the backend of the first."""
        first, *_ = get_current_attn_backends(self._vllm_config)
        assert first is not StateBackend
        self._caches = list(kv_caches.values())

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy whole blocks into the cache."""
        for request_id, prompt, ids in self._get_connector_metadata().load:
            for cache, kept in zip(self._caches, _KEPT[prompt], strict=True):
                cache[ids] = kept[len(kept) - len(ids) :]
            self._loaded.add(request_id)

    def wait_for_save(self) -> None:
        """Copy whole blocks from the cache."""
        for prompt, ids in self._get_connector_metadata().keep:
            _KEPT[prompt] = [cache[ids].clone() for cache in self._caches]

    def get_finished(self, finished_req_ids: set[str]) -> tuple[None, set[str]]:
        """Return the requests that have been loaded."""
        loaded, self._loaded = self._loaded, set()
        return None, loaded

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all layers are loaded before the request runs."""

    def save_kv_layer(self, layer_name: str, kv_layer: Any, attn_metadata: Any, **kwargs: Any) -> None:
        """Do nothing: vLLM calls this for attention layers only."""
