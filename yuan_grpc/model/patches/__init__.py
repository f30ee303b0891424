"""Patches of vLLM, one module each, with the fault, its upstream report and the condition for removing the patch.

`tests/engine/test_patches.py` has a test for each fault, which fails when vLLM no longer has it.
"""
