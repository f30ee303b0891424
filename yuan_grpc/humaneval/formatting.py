"""Numbers and names as text, for reports and progress."""

from __future__ import annotations

import unicodedata

INVISIBLE = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")
"""Unicode categories of characters that are not shown, reorder the text around them or cannot be encoded."""


def format_duration(seconds: float) -> str:
    """Return hours, minutes and seconds: `1:02:03` or `2:03`."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def escape_invisible(text: str) -> str:
    """Return the text on one line, with an escape such as `\\u202e` for each invisible character."""
    line = " ".join(text.split())
    return "".join(c.encode("unicode_escape").decode() if unicodedata.category(c) in INVISIBLE else c for c in line)


def format_percent(rate: float) -> str:
    """Return a rate with one decimal: `66.5 %`."""
    return f"{100 * rate:.1f} %"
