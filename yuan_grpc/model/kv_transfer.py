"""Checks of the KV connectors: only those that copy the LFA state with the keys and values.

A connector must copy whole blocks of all layers with a cache, and offer only tokens that it has copied. The patch
`loaded_blocks` then continues from a whole block. Decision 0097 has the reasons for each connector.
"""

from vllm import envs
from vllm.config import KVTransferConfig, VllmConfig
from vllm.platforms import current_platform

OFFLOADING = "OffloadingConnector"
NIXL = "NixlConnector"
CONNECTORS = (OFFLOADING, NIXL)
"""Connectors that are known to copy the LFA state."""

REASONS = {
    "DecodeBenchConnector": "it fills the cache with random values",
    "ExampleConnector": "it saves attention layers only",
    "HF3FSKVConnector": "it requires layers of one shape",
    "HiSparseConnector": "it is for models with sparse attention",
    "LMCacheConnectorV1": "its chunks hold keys and values only",
    "MoRIIOConnector": "it requires blocks of one size in all layers",
}
GPUS_ONLY = "vLLM offloads the cache of GPUs only"
UNKNOWN = "it is not known to transfer the LFA state"

MEMORY_SPEC = "CPUOffloadingSpec"
"""vLLM's name for offloading to the memory of the host."""


def check_transfer(vllm_config: VllmConfig) -> None:
    """Check the options for offloading and for transferring the KV cache.

    Raises:
        ValueError: an option is not supported; the message names it and the reason.
    """
    _check_offloading_size(vllm_config)
    if (transfer := vllm_config.kv_transfer_config) is not None:
        _check_connector(transfer)
    is_transferring = transfer is not None or vllm_config.cache_config.kv_offloading_size is not None
    if is_transferring and (stages := vllm_config.parallel_config.pipeline_parallel_size) > 1:
        raise ValueError(
            f"`pipeline_parallel_size` must be 1 with a KV connector, not {stages}: "
            "it was not tried with stages of Yuan layers"
        )


def can_offload() -> bool:
    """Return whether vLLM can copy blocks between this device and the memory of the host."""
    return bool(current_platform.is_cuda())


def _check_offloading_size(vllm_config: VllmConfig) -> None:
    cache = vllm_config.cache_config
    if (size := cache.kv_offloading_size) is None:
        return
    if not can_offload():
        raise ValueError(f"`kv_offloading_size` must be unset on CPUs, not {size}: {GPUS_ONLY}")
    if cache.kv_offloading_backend != "native":
        raise ValueError(
            f"`kv_offloading_backend` must be 'native' for Yuan, not '{cache.kv_offloading_backend}': {UNKNOWN}"
        )
    if envs.VLLM_USE_SIMPLE_KV_OFFLOAD:
        raise ValueError(f"`VLLM_USE_SIMPLE_KV_OFFLOAD` must be unset for Yuan, not 1: {UNKNOWN}")


def _check_connector(transfer: KVTransferConfig) -> None:
    if (path := transfer.kv_connector_module_path) is not None:
        raise ValueError(f"`kv_connector_module_path` must be unset for Yuan, not '{path}': {UNKNOWN}")
    name, extra = transfer.kv_connector, transfer.kv_connector_extra_config
    if name is not None and name not in CONNECTORS:
        reason = REASONS.get(name, UNKNOWN)
        raise ValueError(f"`kv_connector` must be one of {', '.join(CONNECTORS)} for Yuan, not '{name}': {reason}")
    if name == OFFLOADING and not can_offload():
        raise ValueError(f"`kv_connector` must be {NIXL} on CPUs, not '{name}': {GPUS_ONLY}")
    if (spec := extra.get("spec_name", MEMORY_SPEC)) != MEMORY_SPEC:
        raise ValueError(
            f"`spec_name` must be '{MEMORY_SPEC}' for Yuan, not '{spec}': blocks that outlive the server "
            "would be found by other LoRA adapters, whose names repeat after a restart"
        )
    if name == NIXL:
        _check_nixl(transfer)


def _check_nixl(transfer: KVTransferConfig) -> None:
    reason = "a converted block has no valid LFA state"
    if transfer.enable_permute_local_kv:
        raise ValueError(f"`enable_permute_local_kv` must be false for Yuan, not true: {reason}")
    if not transfer.get_from_extra_config("enforce_handshake_compat", True):
        raise ValueError(f"`enforce_handshake_compat` must be true for Yuan, not false: {reason}")
