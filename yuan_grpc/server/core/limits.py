"""Limits on requests that gRPC and HTTP share."""

MAX_IN_FLIGHT = 64
"""Requests of one call that run at a time."""
MAX_REQUEST_ID = 256
MAX_MESSAGES = 1024
