"""Attention of the Yuan model: the vLLM backend and the decoding kernels."""
