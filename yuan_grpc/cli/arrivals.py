"""Start times of requests that arrive at a rate, independent of how fast a server completes them."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Arrivals:
    """Arrivals with gaps of a gamma distribution.

    Attributes:
        start_rate, end_rate: requests per second at the start and at the end of a level; equal without a ramp.
        seed: the seed of the gaps.
        burstiness: shape of the distribution: 1 is a Poisson process, less is burstier, and infinity is regular.
        exponential: whether the rate grows by equal factors instead of equal steps.
    """

    start_rate: float
    end_rate: float
    seed: str
    burstiness: float = 1.0
    exponential: bool = False

    def times(self, limit: int | None, seconds: float) -> Iterator[float]:
        """Yield the time of each request in seconds from the start, up to the limit or, without one, for `seconds`."""
        generator, now, number = random.Random(self.seed), 0.0, 0
        while number < limit if limit is not None else now < seconds:
            yield now
            now += self._gap(generator, self.rate(number / limit if limit is not None else now / seconds))
            number += 1

    def rate(self, progress: float) -> float:
        """Return the requests per second when a level has this share, from 0 to 1, of its requests or its time."""
        if self.exponential:
            return self.start_rate * math.pow(self.end_rate / self.start_rate, progress)
        return self.start_rate + (self.end_rate - self.start_rate) * progress

    def _gap(self, generator: random.Random, rate: float) -> float:
        if math.isinf(self.burstiness):
            return 1 / rate
        return generator.gammavariate(self.burstiness, 1 / (rate * self.burstiness))
