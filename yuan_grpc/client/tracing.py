"""OpenTelemetry trace propagation, used only if the program itself uses OpenTelemetry."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Return the current span as metadata: `traceparent` and `tracestate`, or the keys of the program's propagator.

    OpenTelemetry is never imported here first: before the program has imported it there is no span.
    """
    if "opentelemetry" not in sys.modules:
        return ()
    try:
        from opentelemetry.propagate import inject
    except ImportError:  # `opentelemetry` is a namespace package; the API may be missing
        return ()
    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
