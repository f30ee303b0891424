"""Published checkpoints: layout, mapping to parameters, loader, and random ones for the demo, tests and benchmarks."""
