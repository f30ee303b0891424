"""Sandbox in which generated programs run."""
