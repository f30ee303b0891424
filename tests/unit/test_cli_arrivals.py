"""Start times of requests at a rate."""

import math
from itertools import pairwise
from statistics import fmean, pstdev

import pytest

from yuan_grpc.cli.arrivals import Arrivals


def gaps(arrivals: Arrivals, limit: int) -> list[float]:
    return [after - before for before, after in pairwise(arrivals.times(limit, 0))]


@pytest.mark.parametrize(("burstiness", "spread"), [(1.0, 1.0), (0.25, 2.0), (4.0, 0.5)])
def test_gaps_have_the_mean_of_the_rate_and_the_spread_of_the_burstiness(burstiness: float, spread: float) -> None:
    values = gaps(Arrivals(8, 8, "seed", burstiness), 20_000)
    assert fmean(values) == pytest.approx(1 / 8, rel=0.05)
    assert pstdev(values) / fmean(values) == pytest.approx(spread, rel=0.05)


def test_arrivals_without_bursts_are_regular() -> None:
    assert list(Arrivals(4, 4, "seed", math.inf).times(None, 1)) == [0, 0.25, 0.5, 0.75]


def test_the_same_seed_gives_the_same_times() -> None:
    assert list(Arrivals(8, 8, "a").times(9, 0)) == list(Arrivals(8, 8, "a").times(9, 0))
    assert list(Arrivals(8, 8, "a").times(9, 0)) != list(Arrivals(8, 8, "b").times(9, 0))


@pytest.mark.parametrize(("exponential", "middle"), [(False, 8.5), (True, 4.0)])
def test_a_ramp_goes_from_the_start_to_the_end(exponential: bool, middle: float) -> None:
    ramp = Arrivals(1, 16, "seed", math.inf, exponential)
    assert [ramp.rate(progress) for progress in (0, 0.5, 1)] == pytest.approx([1, middle, 16])
    values = gaps(ramp, 100)
    assert values == sorted(values, reverse=True)
    assert values[0] == 1
    assert values[-1] == pytest.approx(1 / 16, rel=0.2)
