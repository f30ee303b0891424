"""The vLLM engine. No other package of the server imports vLLM."""
