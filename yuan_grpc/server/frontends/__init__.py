"""Several processes that serve one engine: a supervisor, and the front ends that it starts."""
