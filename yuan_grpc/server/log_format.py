"""The lines of the log, as text or as JSON objects."""

import json
import logging
import time
from typing import Any

TEXT = "%(asctime)s %(levelname)s %(message)s"
"""Format of a line of text."""


class JsonFormatter(logging.Formatter):
    """Formats a record as a JSON object in one line, with the fields that the record has in `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = {"logger": record.name, "message": record.getMessage()} | getattr(record, "fields", {})
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return _encode(record.created, record.levelname, fields)


def create_formatter(log_format: str) -> logging.Formatter:
    """Return the formatter of a log format, `text` or `json`."""
    return JsonFormatter() if log_format == "json" else logging.Formatter(TEXT)


def format_line(log_format: str, level: str, message: str) -> str:
    """Return a line that is not written by `logging`, with its end. A line of text is the message alone."""
    if log_format == "json":
        message = _encode(time.time(), level, {"logger": "yuan_grpc", "message": message})
    return f"{message}\n"


def _encode(seconds: float, level: str, fields: dict[str, Any]) -> str:
    """Return a JSON object with the time in UTC, as in RFC 3339, the level, and the fields."""
    date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds))
    line = {"time": f"{date}.{int(seconds % 1 * 1000):03d}Z", "level": level, **fields}
    return json.dumps(line, ensure_ascii=False, default=str)
