"""Parsers of option values. Each raises `ArgumentTypeError` with the rule and the value."""

import argparse
import re
from pathlib import Path

LOG_LEVELS = ("debug", "info", "warning", "error")
LOG_FORMATS = ("text", "json")


def non_empty(text: str) -> str:
    """Return a text that is not empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def model(text: str) -> str:
    """Return a checkpoint folder, which must exist, or a hub id."""
    if text.startswith(("/", "./", "../", "~")):
        _check_folder(text)
    return non_empty(text)


def log_level(text: str) -> str:
    """Return a log level in lower case."""
    if (level := text.lower()) in LOG_LEVELS:
        return level
    raise argparse.ArgumentTypeError(f"must be {', '.join(LOG_LEVELS[:-1])} or {LOG_LEVELS[-1]}, not {text!r}")


def log_format(text: str) -> str:
    """Return a log format in lower case."""
    if (name := text.lower()) in LOG_FORMATS:
        return name
    raise argparse.ArgumentTypeError(f"must be {' or '.join(LOG_FORMATS)}, not {text!r}")


def optional_folder(text: str) -> Path | None:
    """Return an existing folder, or None for an empty text."""
    if not text:
        return None
    _check_folder(text)
    return Path(text)


def optional_file(text: str) -> Path | None:
    """Return a path, or None for an empty text. Files are checked later, together with their contents."""
    return Path(text) if text else None


def _check_folder(text: str) -> None:
    if not Path(text).is_dir():
        raise argparse.ArgumentTypeError(f"must be an existing folder, not {text!r}")


def port(text: str) -> int:
    """Return a port, 0 to 65535."""
    if text.isascii() and text.isdigit() and int(text) <= 65535:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a port, 0 to 65535, not {text!r}")


def optional_port(text: str) -> int | None:
    """Return a port, or None for an empty text."""
    return port(text) if text else None


def seconds(text: str) -> float:
    """Return a number of seconds, 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = -1
    if 0 <= value < float("inf"):
        return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds, 0 or more, not {text!r}")


def positive_seconds(text: str) -> float:
    """Return a number of seconds above 0."""
    if (value := seconds(text)) > 0:
        return value
    raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, not {text!r}")


def optional_seconds(text: str) -> float | None:
    """Return a number of seconds, 0 or more, or None for an empty text."""
    return seconds(text) if text else None


def optional_positive_seconds(text: str) -> float | None:
    """Return a number of seconds above 0, or None for an empty text."""
    return positive_seconds(text) if text else None


def byte_size(text: str) -> int:
    """Return a size in bytes, 1 to 2 GiB, from a number that K, M or G may follow."""
    if match := re.fullmatch(r"([0-9]{1,12})([KMG]?)", text.upper()):
        size = int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]]
        if 1 <= size < 2**31:
            return size
    raise argparse.ArgumentTypeError(f"must be a number of bytes below 2G, such as 4M, not {text!r}")


def optional_count(text: str) -> int | None:
    """Return a number, 1 or more, or None for an empty text."""
    return count(text) if text else None


def count(text: str) -> int:
    """Return a number, 1 or more."""
    if text.isascii() and text.isdigit() and int(text) > 0:
        return int(text)
    raise argparse.ArgumentTypeError(f"must be a number, 1 or more, not {text!r}")


def names(text: str) -> tuple[str, ...]:
    """Return host names from a comma-separated list."""
    return _parse_list(text, "[^:/@*\\s]+", "host names without a port")


def origins(text: str) -> tuple[str, ...]:
    """Return web origins from a comma-separated list."""
    return _parse_list(text, "[a-z0-9+.-]+://[^/?#@*\\s]+", "origins such as https://example.com")


def items(text: str) -> tuple[str, ...]:
    """Return the items of a comma-separated list."""
    return tuple(item.strip() for item in text.split(",") if item.strip())


def _parse_list(text: str, pattern: str, noun: str) -> tuple[str, ...]:
    """Return the items of a comma-separated list in lower case. `*` is an item too."""
    items = tuple(item.strip().lower() for item in text.split(",") if item.strip())
    for item in items:
        if item != "*" and not re.fullmatch(pattern, item):
            raise argparse.ArgumentTypeError(f"must be {noun}, separated by commas, not {item!r}")
    return items
