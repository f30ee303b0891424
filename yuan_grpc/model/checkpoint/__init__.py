"""Checkpoints: layout, loading, and random ones for tests."""
