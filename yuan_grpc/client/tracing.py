"""The trace that a call belongs to, where the program keeps one with OpenTelemetry."""

from __future__ import annotations

import sys


def trace_metadata() -> tuple[tuple[str, str], ...]:
    """Metadata that names the current span: `traceparent` and `tracestate`, or what else the program's propagator says.

    OpenTelemetry is not looked for before the program itself has imported it: until then there is no span.
    """
    if "opentelemetry" not in sys.modules:
        return ()
    try:
        from opentelemetry.propagate import inject
    except ImportError:  # the name is a namespace's, which others have parts of
        return ()
    carrier: dict[str, str] = {}
    inject(carrier)
    return tuple((key.lower(), value) for key, value in carrier.items())
