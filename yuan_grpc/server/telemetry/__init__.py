"""Metrics and traces of calls. Nothing is measured, and no port is open, unless the operator enables it."""
