"""Layers of experts, as in Yuan2.0-M32: the attention router and the experts."""
