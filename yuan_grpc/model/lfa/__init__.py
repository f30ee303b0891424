"""Localized filtering-based attention (LFA): layer, cache, operations and kernels."""
