"""vLLM as the engine: the only package of the server that imports vLLM."""
