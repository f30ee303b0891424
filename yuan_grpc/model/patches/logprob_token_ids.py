"""Keep the most likely tokens of requests that share a batch with `logprob_token_ids`.

Why: if one request of a batch has `logprob_token_ids`, the sampler of the V1 model runner, which CPUs use, returns
    that request's kind of result for the whole batch: the other requests get token 0 at minus infinity in place of
    their most likely tokens. The V2 model runner merges the two kinds correctly.
How: `Sampler.forward` records how many of the most likely tokens the batch needs, and
    `gather_specific_token_logprobs` fills them in for the rows without `logprob_token_ids`.
Upstream: vllm-project/vllm#51789, open; present in vLLM 0.32.0. Text: docs/upstream/logprob-token-ids.md.
Remove when: `Sampler.forward` merges both kinds of result.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch.nn.functional import pad

from yuan_grpc.vllm_check import check_vllm

TARGETS = {
    "vllm.v1.sample.sampler:Sampler.forward": "self, logits, sampling_metadata, ...",
    "vllm.v1.sample.sampler:Sampler.gather_specific_token_logprobs": "self, logprobs, logprob_token_ids, sampled",
    "vllm.v1.sample.sampler:Sampler.gather_logprobs": "logprobs, num_logprobs, token_ids",
}

GATHER = "gather_specific_token_logprobs"


def apply() -> None:
    """Apply the patch in this process. Safe to call twice."""
    check_vllm(__name__, TARGETS)
    from vllm.v1.sample.sampler import Sampler

    if not hasattr(getattr(Sampler, GATHER), "__wrapped__"):
        Sampler.forward = _recording_num_logprobs(Sampler.forward)
        setattr(Sampler, GATHER, _keeping_top_logprobs(getattr(Sampler, GATHER)))


def _recording_num_logprobs(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def record_num_logprobs(self: Any, logits: torch.Tensor, sampling_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        self.batch_num_logprobs = sampling_metadata.max_num_logprobs
        return forward(self, logits, sampling_metadata, *args, **kwargs)

    return record_num_logprobs


def _keeping_top_logprobs(gather: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(gather)
    def gather_with_top_logprobs(
        self: Any, logprobs: torch.Tensor, logprob_token_ids: dict[int, list[int]], sampled: torch.Tensor
    ) -> Any:
        gathered = gather(self, logprobs, logprob_token_ids, sampled)
        num_logprobs = getattr(self, "batch_num_logprobs", None)
        others = [row for row in range(logprobs.shape[0]) if row not in logprob_token_ids]
        if gathered is None or num_logprobs is None or num_logprobs < 0 or not others:
            return gathered
        rows = torch.tensor(others, device=logprobs.device)
        top = self.gather_logprobs(logprobs[rows], num_logprobs, token_ids=sampled[rows])
        return _with_rows(gathered, rows, top)

    return gather_with_top_logprobs


def _with_rows(gathered: Any, rows: torch.Tensor, top: Any) -> Any:
    """Replace these rows of `gathered` by `top`, with the narrower of the two padded to the width of the other."""
    missing = top.logprobs.shape[1] - gathered.logprobs.shape[1]
    token_ids = pad(gathered.logprob_token_ids, (0, max(missing, 0)))
    logprobs = pad(gathered.logprobs, (0, max(missing, 0)), value=float("-inf"))
    token_ids[rows] = pad(top.logprob_token_ids, (0, max(-missing, 0)))
    logprobs[rows] = pad(top.logprobs, (0, max(-missing, 0)), value=float("-inf"))
    return gathered._replace(logprob_token_ids=token_ids, logprobs=logprobs)
