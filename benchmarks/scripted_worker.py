"""A vLLM worker without a model: every sequence gets the next token of a fixed script at a fixed pace.

`yuan-grpc serve --worker-cls benchmarks.scripted_worker.ScriptedWorker` runs the whole server around it: vLLM's
scheduler, its processes and sockets, the detokenizer and gRPC. So the processor time of a token outside of the model
can be measured without a GPU. The variable STEP_MILLISECONDS sets the duration of a step, and PREFILL_MICROSECONDS adds
time for each token of a prompt, to see what the scheduler does with long steps.
"""

import os
import time
from typing import Any

import torch
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheSpec
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, ModelRunnerOutput
from vllm.v1.worker.worker_base import CompilationTimes, WorkerBase

STEP_MILLISECONDS = 9.0
"""Default duration of a step: that of 256 sequences of the 2B model on an H100."""
MEMORY = 1 << 32
"""Bytes of cache that the worker reports. It allocates none, but vLLM creates an object for each block of them."""


class ScriptedWorker(WorkerBase):
    """A worker that computes nothing and waits for the rest of each step."""

    def init_device(self) -> None:
        """Set a device on which nothing is allocated."""
        self.device = torch.device("cpu")
        self._seconds = float(os.environ.get("STEP_MILLISECONDS", STEP_MILLISECONDS)) / 1e3
        self._prompt_token_seconds = float(os.environ.get("PREFILL_MICROSECONDS", 0)) / 1e6
        self._prompt_lengths: dict[str, int] = {}
        self._script = range(300, min(4000, self.model_config.get_vocab_size()))
        self._step_end = 0.0

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load nothing."""

    def get_kv_cache_spec(self) -> dict[str, KVCacheSpec]:
        """Return a cache of one small layer."""
        block_size = self.cache_config.block_size
        return {"layer": FullAttentionSpec(block_size=block_size, num_kv_heads=1, head_size=64, dtype=torch.bfloat16)}

    def get_supported_kv_cache_layouts(self) -> list[str]:
        """Return vLLM's usual layout."""
        return ["NHD"]

    def determine_available_memory(self) -> int:
        """Return more memory than any benchmark needs, in bytes."""
        return MEMORY

    def initialize_from_config(self, kv_cache_config: KVCacheConfig) -> None:
        """Allocate nothing."""

    def compile_or_warm_up_model(self) -> CompilationTimes:
        """Compile nothing."""
        return CompilationTimes(language_model=0.0, encoder=0.0)

    def get_supported_tasks(self) -> tuple[str, ...]:
        """Return the one task of a language model."""
        return ("generate",)

    def execute_model(self, scheduler_output: SchedulerOutput) -> ModelRunnerOutput:
        """Return one token for each sequence whose prompt is complete, after the duration of a step."""
        counts = scheduler_output.num_scheduled_tokens
        if not counts:
            return EMPTY_MODEL_RUNNER_OUTPUT
        computed = self._computed_tokens(scheduler_output)
        tokens = [self._next_tokens(request, computed[request] + count) for request, count in counts.items()]
        prompt_tokens = sum(
            count for request, count in counts.items() if computed[request] < self._prompt_lengths[request]
        )
        self._wait(self._seconds + prompt_tokens * self._prompt_token_seconds)
        indexes = {request: index for index, request in enumerate(counts)}
        return ModelRunnerOutput(req_ids=list(counts), req_id_to_index=indexes, sampled_token_ids=tokens)

    def _computed_tokens(self, scheduler_output: SchedulerOutput) -> dict[str, int]:
        for finished in scheduler_output.finished_req_ids:
            self._prompt_lengths.pop(finished, None)
        new: list[Any] = scheduler_output.scheduled_new_reqs
        for request in new:
            self._prompt_lengths[request.req_id] = len(request.prompt_token_ids)
        cached = scheduler_output.scheduled_cached_reqs
        return {request.req_id: request.num_computed_tokens for request in new} | dict(
            zip(cached.req_ids, cached.num_computed_tokens, strict=True)
        )

    def _next_tokens(self, request: str, length: int) -> list[int]:
        """Return the token at a position of the sequence; none within its prompt."""
        return [self._script[length % len(self._script)]] if length >= self._prompt_lengths[request] else []

    def _wait(self, seconds: float) -> None:
        """Wait for the end of the step, whose time includes that of the scheduler, as on a GPU."""
        now = time.monotonic()
        self._step_end = max(self._step_end + seconds, now)
        time.sleep(self._step_end - now)
