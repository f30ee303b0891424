"""The gRPC service around vLLM's engine."""
