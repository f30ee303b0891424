"""Recording many observations of a histogram at once."""

from prometheus_client import CollectorRegistry, Histogram

from yuan_grpc.server.counted_histogram import CountedHistogram

BOUNDS = (0.1, 0.5, 2.0)
AMOUNTS = (0.0, 0.1, 0.10001, 0.5, 1.0, 2.0, 2.1, 0.05)


def test_many_observations_count_as_each_by_itself() -> None:
    registry = CollectorRegistry()
    together = CountedHistogram("together", "", ("engine",), buckets=BOUNDS, registry=registry).labels("0")
    single = Histogram("single", "", ("engine",), buckets=BOUNDS, registry=registry).labels("0")
    for amounts in (AMOUNTS, AMOUNTS[:3]):
        together.observe_all(amounts)
        for amount in amounts:
            single.observe(amount)
    samples = {sample.name + str(sample.labels): sample.value for each in registry.collect() for sample in each.samples}
    for name, value in samples.items():
        if "_created" not in name:
            assert samples[name.replace("together", "single")] == value
