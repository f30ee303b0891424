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


def escape_invisible_lines(text: str) -> str:
    """Return the text with an escape for each invisible character except line feeds and tabs."""
    return "".join(
        c.encode("unicode_escape").decode() if c not in "\n\t" and unicodedata.category(c) in INVISIBLE else c
        for c in text
    )


def format_percent(rate: float) -> str:
    """Return a rate with one decimal: `66.5 %`."""
    return f"{100 * rate:.1f} %"


def format_interval(low: float, high: float) -> str:
    """Return the bounds of a rate: `46.6 to 61.8 %`."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def format_points(difference: float) -> str:
    """Return a difference of two rates in percentage points: `+1.2`."""
    text = f"{100 * difference:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text
