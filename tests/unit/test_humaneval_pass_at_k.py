"""Estimation of pass@k."""

from __future__ import annotations

import math

import pytest

from yuan_grpc.humaneval.pass_at_k import mean_pass_at_k, pass_at_k


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (10, 3), (200, 1), (200, 199), (5, 5)])
def test_pass_at_k_is_the_unbiased_estimator(samples: int, passed: int) -> None:
    for k in (1, 2, 5, 100):
        if k <= samples:
            exact = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
            assert pass_at_k(samples, passed, k) == pytest.approx(exact)


def test_pass_at_k_needs_k_samples_of_each_task() -> None:
    assert mean_pass_at_k([(10, 5), (20, 0)]) == {1: pytest.approx(0.25), 10: pytest.approx(0.5)}
    assert mean_pass_at_k([]) == {}
    with pytest.raises(ValueError, match="pass@10"):
        pass_at_k(5, 1, 10)
