"""Offloading of the KV cache on CPUs: vLLM's connector and manager, with copies by PyTorch instead of CUDA."""

from typing import Any

from vllm.v1.kv_offload.base import CanonicalKVCaches, OffloadingWorker, TransferResult
from vllm.v1.kv_offload.cpu.spec import CPUOffloadingSpec
from vllm.v1.kv_offload.factory import OffloadingSpecFactory

from yuan_grpc.model import kv_transfer


def install() -> None:
    """Let `kv_offloading_size` work on a CPU, in this process."""
    OffloadingSpecFactory._registry["CPUOffloadingSpec"] = lambda: MemoryOffloadingSpec
    kv_transfer.can_offload = lambda: True


class MemoryOffloadingSpec(CPUOffloadingSpec):
    """Offloads to ordinary memory."""

    def get_worker(self, kv_caches: CanonicalKVCaches) -> OffloadingWorker:
        return MemoryWorker(kv_caches, self.num_chunks)


class MemoryWorker(OffloadingWorker):
    """Copies whole blocks of all tensors, as late as the connector allows."""

    def __init__(self, kv_caches: CanonicalKVCaches, chunks: int) -> None:
        self._device = [cache.tensor for cache in kv_caches.tensors]
        self._host = [cache.new_empty((chunks, cache.shape[1])) for cache in self._device]
        self._waiting: dict[int, tuple[bool, Any, Any]] = {}
        self._finished: list[TransferResult] = []

    def submit_store(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._waiting[job_id] = (True, src_spec.block_ids, dst_spec.block_ids)
        return True

    def submit_load(self, job_id: int, src_spec: Any, dst_spec: Any) -> bool:
        self._waiting[job_id] = (False, dst_spec.block_ids, src_spec.block_ids)
        return True

    def get_finished(self) -> list[TransferResult]:
        """Return the jobs of earlier steps; copy those of this step, which the next step returns."""
        finished, self._finished = self._finished, []
        self.wait(set(self._waiting))
        return finished

    def wait(self, job_ids: set[int]) -> None:
        for job_id in job_ids & self._waiting.keys():
            is_store, device_blocks, host_blocks = self._waiting.pop(job_id)
            for device, host in zip(self._device, self._host, strict=True):
                if is_store:
                    host[host_blocks] = device[device_blocks]
                else:
                    device[device_blocks] = host[host_blocks]
            self._finished.append(TransferResult(job_id, success=True))
