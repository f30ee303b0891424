"""Prompts from an argument, from stdin or from a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.request_fields import FieldError, Fields, build_request, field_name
from yuan_grpc.v1 import yuan_pb2 as pb


class PromptError(UsageError):
    """An unusable prompt or prompt file. The text names the place and the reason."""


def from_argument(text: str) -> str:
    """Return a prompt from the command line, decoded as UTF-8 independent of the locale.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        # The interpreter passes bytes that the locale cannot decode as lone surrogates.
        return os.fsencode(text).decode() if _has_surrogates(text) else text
    except UnicodeError:
        raise PromptError("the prompt is not UTF-8") from None


def from_stdin() -> str:
    """Return all of stdin without one final line break, as `echo` adds it.

    Raises:
        PromptError: stdin is closed, is empty or is not UTF-8.
    """
    if sys.stdin is None:
        raise PromptError("stdin is closed")
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeError:
        raise PromptError("stdin is not UTF-8") from None
    text = text.removesuffix("\n").removesuffix("\r")
    if not text:
        raise PromptError("stdin has no prompt")
    return text


def from_file(path: Path, defaults: Fields) -> list[pb.GenerateRequest]:
    """Return one request per line. Skip empty lines.

    Args:
        path: a UTF-8 file. A line of a `.jsonl` file is an object of request fields, any other line is a prompt.
        defaults: fields of all requests; the fields of a line take precedence.

    Raises:
        PromptError: the file cannot be read, has no prompt or has an invalid line. The text names file and line.
    """
    is_json = path.suffix.lower() == ".jsonl"
    requests = []
    for number, line in _read_lines(path):
        try:
            fields = _parse_object(line) if is_json else {"prompt": line}
            requests.append(build_request(defaults | fields))
        except FieldError as error:
            raise PromptError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise PromptError(f"{path} has no prompts")
    return requests


def _read_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not empty with their 1-based numbers, without byte order mark and carriage returns."""
    try:
        raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise PromptError(f"{path} cannot be read: {error.strerror}") from None
    for number, line in enumerate(raw.split(b"\n"), start=1):
        try:
            text = line.removesuffix(b"\r").decode()
        except UnicodeError:
            raise PromptError(f"{path}, line {number}: not UTF-8") from None
        if text:
            yield number, text


def _parse_object(line: str) -> Fields:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise FieldError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise FieldError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FieldError('must be an object such as {"prompt": "…"}')
    return {field_name(name): field for name, field in value.items()}


def _has_surrogates(text: str) -> bool:
    return any("\ud800" <= character <= "\udfff" for character in text)
