"""Unbiased estimation of pass@k."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

PUBLISHED = {"Yuan2.0-2B": 0.549, "Yuan2.0-2B Janus": 0.615, "Yuan2.0-2B Februa": 0.628, "Yuan2.0-51B": 0.665}
PUBLISHED |= {"Yuan2.0-102B": 0.671, "Yuan2.0-102B, self-consistency": 0.774}
"""Published pass@1 of the models, with extraction by the rules."""
KS = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """Return the probability that at least one of k samples passes, if `passed` of `samples` do.

    The estimate is 1 - C(samples - passed, k) / C(samples, k), from "Evaluating Large Language Models Trained on Code".

    Raises:
        ValueError: there are fewer than k samples, or `passed` is out of range.
    """
    if not 0 <= passed <= samples or k > samples:
        raise ValueError(f"pass@{k} is undefined for {passed} passed of {samples} samples")
    none_pass = 1.0
    for i in range(k):
        none_pass *= max(samples - passed - i, 0) / (samples - i)
    return 1 - none_pass


def mean_pass_at_k(counts: Iterable[tuple[int, int]], ks: Iterable[int] = KS) -> dict[int, float]:
    """Return the mean pass@k of the tasks, given as (samples, passed), for each k that every task has samples for."""
    tasks = list(counts)
    fewest = min((samples for samples, _ in tasks), default=0)
    return {k: fmean(pass_at_k(*task, k) for task in tasks) for k in ks if k <= fewest}
