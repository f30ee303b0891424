"""The published layout of checkpoints, their loader, and random checkpoints for the demo, tests and benchmarks."""
