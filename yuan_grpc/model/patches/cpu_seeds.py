"""Seeded requests on CPUs, whose generators cannot be turned back."""

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner


def prepare() -> None:
    """Has vLLM's CPU runner leave the generators of unfinished prompts alone. Safe to call twice."""
    if CPUModelRunner.sample_tokens is not _sample_tokens:
        CPUModelRunner.sample_tokens = _sample_tokens


_sample_tokens_of_vllm = CPUModelRunner.sample_tokens


def _sample_tokens(runner: CPUModelRunner, *arguments: Any) -> Any:
    """A prompt that is computed in several steps gets a token in each, which is thrown away.

    vLLM then turns the request's generator back by what that token took, which a CPU's cannot: the engine would end.
    So such a token is drawn from the generator that requests without a seed have.
    """
    generators = runner.input_batch.generators
    unfinished = runner.discard_request_mask.np[: runner.input_batch.num_reqs].nonzero()[0]
    kept = {index: generators.pop(index) for index in map(int, unfinished) if index in generators}
    try:
        return _sample_tokens_of_vllm(runner, *arguments)
    finally:
        generators.update(kept)
