"""The sandbox in which generated programs run."""
