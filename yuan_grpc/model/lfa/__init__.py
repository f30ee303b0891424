"""Localized filtering-based attention (LFA): layer, layout of the state in the cache, operations and kernels."""
