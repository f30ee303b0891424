"""Intervals of pass rates, and groups of samples by length."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean, pvariance, stdev

Z = 1.959964
"""Quantile of the normal distribution for an interval of 95 %."""
MAX_GROUPS = 8
MIN_GROUP_SIZE = 10
"""Minimum size of a group, on average: the rate of fewer samples says little."""


@dataclass(frozen=True)
class Interval:
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high


@dataclass(frozen=True)
class LengthGroup:
    """Samples of similar length: the shortest and longest length, the number of samples, and their pass rate."""

    shortest: int
    longest: int
    count: int
    rate: Interval


def wilson_interval(rate: float, count: float) -> Interval:
    """Return a rate of `count` independent trials with its Wilson interval."""
    center = (rate + Z * Z / (2 * count)) / (1 + Z * Z / count)
    half = Z / (1 + Z * Z / count) * math.sqrt(rate * (1 - rate) / count + Z * Z / (4 * count * count))
    return Interval(rate, max(0.0, center - half), min(1.0, center + half))


def pass_rate(tasks: Iterable[tuple[int, int]]) -> Interval:
    """Return the mean pass rate of tasks, given as (samples, passed), and its interval over the choice of tasks.

    With one sample per task this is the Wilson interval. With more, the rates of tasks vary less than single samples
    do, and the interval is that of a larger number of trials, at most the number of samples.
    """
    counts = [(samples, passed) for samples, passed in tasks if samples]
    rates = [passed / samples for samples, passed in counts]
    rate, variance, trials = fmean(rates), pvariance(rates), float(len(rates))
    if 0 < rate < 1:
        total = float(sum(samples for samples, _ in counts))
        trials = min(total, trials * rate * (1 - rate) / variance) if variance else total
    return wilson_interval(rate, trials)


def paired_difference(rates: Sequence[float], baseline: Sequence[float]) -> Interval:
    """Return the mean difference of two pass rates of each task, with its normal interval."""
    differences = [rate - other for rate, other in zip(rates, baseline, strict=True)]
    mean = fmean(differences)
    half = Z * stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else 1.0
    return Interval(mean, max(-1.0, mean - half), min(1.0, mean + half))


def group_by_length(values: Iterable[tuple[int, float]]) -> list[LengthGroup]:
    """Split (length, rate) pairs into groups of about equal size. Pairs of equal length are in the same group."""
    ordered = sorted(values)
    groups = max(1, min(MAX_GROUPS, len(ordered) // MIN_GROUP_SIZE))
    parts: list[list[tuple[int, float]]] = []
    for _, pairs in groupby(ordered, key=lambda pair: pair[0]):
        remaining = len(ordered) - sum(map(len, parts[:-1]))
        if not parts or len(parts[-1]) >= remaining / max(1, groups - len(parts) + 1) - 0.5:
            parts.append([])
        parts[-1] += pairs
    return [
        LengthGroup(part[0][0], part[-1][0], len(part), wilson_interval(fmean(rate for _, rate in part), len(part)))
        for part in parts
    ]
