"""Comparison of two versions of vLLM, by what this package uses."""
