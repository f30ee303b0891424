"""The engine's interface and plain values, and its implementation on vLLM."""
