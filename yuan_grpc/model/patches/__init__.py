"""Patches of vLLM, one module each."""
