"""One request's chosen tokens beside its neighbours' most likely ones: a mend of vLLM's sampler.

Where one request of a batch has `logprob_token_ids`, the sampler of vLLM 0.32.0's V1 model runner, which is the one on
CPUs, answers every request of the batch with them: the others get token 0 at minus infinity for their most likely
tokens. The V2 runner does not.
"""

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any

import torch
from torch.nn.functional import pad

GATHER = "gather_specific_token_logprobs"
_EXPECTED = {
    "forward": ["self", "logits", "sampling_metadata"],
    GATHER: ["self", "logprobs", "logprob_token_ids", "sampled"],
    "gather_logprobs": ["logprobs", "num_logprobs", "token_ids"],
}


def mend() -> None:
    """Lets the V1 sampler keep its neighbours' tokens. Does nothing to a sampler that is not as expected."""
    try:
        from vllm.v1.sample.sampler import Sampler
    except ImportError:
        return
    if _is_as_expected(Sampler):
        Sampler.forward = _noting_top(Sampler.forward)
        setattr(Sampler, GATHER, _keeping_neighbours(getattr(Sampler, GATHER)))


def _is_as_expected(sampler: type) -> bool:
    for name, parameters in _EXPECTED.items():
        method = getattr(sampler, name, None)
        if method is None or list(signature(method).parameters)[: len(parameters)] != parameters:
            return False
    return not hasattr(getattr(sampler, GATHER), "__wrapped__")


def _noting_top(forward: Callable[..., Any]) -> Callable[..., Any]:
    """`forward` knows how many of the most likely tokens the neighbours want, and does not pass it on."""

    @wraps(forward)
    def noting_top(self: Any, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        self.top_of_neighbours = sampling_metadata.max_num_logprobs
        return forward(self, logits, sampling_metadata, *args, **kwargs)

    return noting_top


def _keeping_neighbours(gather: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(gather)
    def keeping_neighbours(
        self: Any, logprobs: torch.Tensor, logprob_token_ids: dict[int, list[int]], sampled: torch.Tensor
    ) -> Any:
        chosen, top = gather(self, logprobs, logprob_token_ids, sampled), getattr(self, "top_of_neighbours", None)
        neighbours = [row for row in range(logprobs.shape[0]) if row not in logprob_token_ids]
        if chosen is None or top is None or top < 0 or not neighbours:
            return chosen
        rows = torch.tensor(neighbours, device=logprobs.device)
        likely = self.gather_logprobs(logprobs[rows], top, token_ids=sampled[rows])
        return _with_rows(chosen, rows, likely)

    return keeping_neighbours


def _with_rows(chosen: Any, rows: torch.Tensor, likely: Any) -> Any:
    """Puts `likely` into those rows of `chosen`, and makes the narrower of the two as wide as the other."""
    missing = likely.logprobs.shape[1] - chosen.logprobs.shape[1]
    token_ids = pad(chosen.logprob_token_ids, (0, max(missing, 0)))
    logprobs = pad(chosen.logprobs, (0, max(missing, 0)), value=float("-inf"))
    token_ids[rows] = pad(likely.logprob_token_ids, (0, max(-missing, 0)))
    logprobs[rows] = pad(likely.logprobs, (0, max(-missing, 0)), value=float("-inf"))
    return chosen._replace(logprob_token_ids=token_ids, logprobs=logprobs)
