"""Attention of the Yuan model."""
