"""What this package uses of vLLM, compared with another version of vLLM."""
