"""Numbers as text, for reports and progress."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds: `1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def format_percent(rate: float) -> str:
    """Return a rate with one decimal: `66.5 %`."""
    return f"{100 * rate:.1f} %"
