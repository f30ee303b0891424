"""vLLM's flags, read without importing vLLM."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from yuan_grpc.server.start_error import StartError

_NAME = re.compile(r'"(--[a-z][a-z0-9-]*)"')
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)", re.IGNORECASE)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}

DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")

OTHER_NAMES = ("--config",)
"""Flags that vLLM's parser adds by itself."""


def parse(flags: Sequence[str]) -> Mapping[str, str]:
    """Return the values of flags by name, with dashes. A flag without a value has an empty one; the last one wins."""
    values: dict[str, str] = {}
    for flag, following in zip(flags, [*flags[1:], "--"], strict=True):
        if flag.startswith("--"):
            name, has_value, value = flag.partition("=")
            values[_normalize(name)] = value if has_value else "" if following.startswith("--") else following
    return values


def check(values: Mapping[str, str]) -> None:
    """Check values that are often wrong.

    Raises:
        StartError: a value is not allowed.
    """
    if (dtype := values.get("--dtype", "auto")) not in DTYPES:
        raise StartError(f"--dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")


def parse_size(text: str) -> int | None:
    """Return a number of bytes in vLLM's notation: 1k is 1000, 1K is 1024; None if it is in another notation."""
    if not (match := _SIZE.fullmatch(text)):
        return None
    base = 1000 if match[2].islower() else 1024
    return int(float(match[1]) * base ** _POWERS[match[2].lower()])


def unknown_flags(flags: Sequence[str]) -> list[str]:
    """Return the flags that vLLM does not have. Abbreviations are known; all flags are if vLLM is not installed."""
    known, unknown = vllm_flags(), list[str]()
    for flag in flags:
        name = _normalize(flag.partition("=")[0])
        candidates = {name, name.replace("--no-", "--", 1)}
        if known and flag.startswith("--") and not any(other.startswith((*candidates,)) for other in known):
            unknown.append(flag.partition("=")[0])
    return unknown


@cache
def vllm_flags() -> frozenset[str]:
    """Return the names of all engine flags, from its source: importing it takes seconds. Empty if vLLM is missing."""
    spec = find_spec("vllm")
    if spec is None or not spec.submodule_search_locations:
        return frozenset()
    source = Path(spec.submodule_search_locations[0], "engine", "arg_utils.py")
    names = _NAME.findall(source.read_text("utf-8")) if source.is_file() else ()
    return frozenset([*names, *OTHER_NAMES]) if names else frozenset()


def _normalize(flag: str) -> str:
    return flag.partition(".")[0].replace("_", "-")
