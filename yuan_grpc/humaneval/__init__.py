"""HumanEval: generation, extraction, scoring in a sandbox, and reports."""
