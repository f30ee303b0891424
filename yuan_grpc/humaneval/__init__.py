"""HumanEval overnight: generation, extraction, scoring in a sandbox, and the report."""
