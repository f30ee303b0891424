"""pass@k, estimated without bias."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean

PUBLISHED = {"Yuan2.0-2B": 0.549, "Yuan2.0-2B Janus": 0.615, "Yuan2.0-2B Februa": 0.628, "Yuan2.0-51B": 0.665}
PUBLISHED |= {"Yuan2.0-102B": 0.671, "Yuan2.0-102B, self-consistency": 0.774}
"""The published pass@1 of the models, by the rules."""
KS = (1, 10, 100)


def pass_at_k(samples: int, passed: int, k: int) -> float:
    """The chance that of k samples at least one passes, where of so many samples so many passed.

    That is 1 - C(samples - passed, k) / C(samples, k), as in "Evaluating Large Language Models Trained on Code".
    Raises ValueError where there are fewer samples than k.
    """
    if not 0 <= passed <= samples or k > samples:
        raise ValueError(f"of {samples} samples {passed} passed: there is no pass@{k}")
    none = 1.0
    for i in range(k):
        none *= max(samples - passed - i, 0) / (samples - i)
    return 1 - none


def pass_rates(counts: Iterable[tuple[int, int]], ks: Iterable[int] = KS) -> dict[int, float]:
    """The mean over all tasks, given as (samples, passed), for each k that all have samples enough for."""
    tasks = list(counts)
    fewest = min((samples for samples, _ in tasks), default=0)
    return {k: fmean(pass_at_k(*task, k) for task in tasks) for k in ks if k <= fewest}
