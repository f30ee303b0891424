"""The engine behind the service: its protocol, its plain values, and vLLM's implementation."""
