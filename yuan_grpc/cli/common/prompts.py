"""Prompts: from an argument, from stdin, or from the lines of a file."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from yuan_grpc.cli.common.errors import UsageError
from yuan_grpc.cli.common.request_fields import FieldError, Fields, named, request_of
from yuan_grpc.v1 import yuan_pb2 as pb


class PromptError(UsageError):
    """A prompt, or a file of prompts, that cannot be used; the text says where and why."""


def argument(text: str) -> str:
    """A prompt from the command line, which is UTF-8 whatever the locale says.

    Raises:
        PromptError: it is not UTF-8.
    """
    try:
        # Bytes that the locale could not decode are lone surrogates here.
        return text if _is_unicode(text) else os.fsencode(text).decode()
    except UnicodeError:
        raise PromptError("the prompt is not UTF-8") from None


def standard_input() -> str:
    """All of stdin but one line break at its end, which `echo` puts there.

    Raises:
        PromptError: it is not UTF-8, or empty.
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
    """A request for each line: of a `.jsonl` file an object of fields, of any other file a text. Empty lines are none.

    Args:
        path: the file, in UTF-8.
        defaults: fields of all requests; a line's own win.

    Raises:
        PromptError: it cannot be read, has no prompt, or a line is not right; the text names file and line.
    """
    is_json = path.suffix.lower() == ".jsonl"
    requests = []
    for number, line in _lines(path):
        try:
            fields = _object(line) if is_json else {"prompt": line}
            requests.append(request_of(defaults | fields))
        except FieldError as error:
            raise PromptError(f"{path}, line {number}: {error}") from None
    if not requests:
        raise PromptError(f"{path} has no prompts")
    return requests


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, and their numbers from 1. A byte order mark and carriage returns are left out."""
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


def _object(line: str) -> Fields:
    try:
        value = json.loads(line)
    except json.JSONDecodeError as error:
        raise FieldError(f"not JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise FieldError(f"not JSON: {error}") from None
    if not isinstance(value, dict):
        raise FieldError('must be an object such as {"prompt": "…"}')
    return {named(name): field for name, field in value.items()}


def _is_unicode(text: str) -> bool:
    return not any("\ud800" <= character <= "\udfff" for character in text)
