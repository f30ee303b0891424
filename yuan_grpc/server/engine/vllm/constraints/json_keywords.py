"""Keywords of JSON schemas: reading their values, and rejecting those that cannot be enforced."""

from decimal import Decimal
from typing import Any, NoReturn

from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError

Schema = dict[str, Any]

BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")
MAX_BOUND = 10**15
"""Largest bound of a number: xgrammar reads larger ones as floating-point numbers."""
MAX_DECIMALS = 6
"""Decimal places of a bound: xgrammar rounds more."""


def read_count(keyword: str, own: Schema, at: str) -> int | None:
    """Return the value of a keyword that counts; None without one."""
    if keyword not in own:
        return None
    value = own[keyword]
    if not is_integer(value) or value < 0:
        reject(keyword, at, "unless it is a natural number")
    return int(value)


def read_bound(keyword: str, own: Schema, at: str) -> Decimal:
    """Return the value of a keyword that bounds numbers."""
    value = own[keyword]
    if isinstance(value, bool) or not isinstance(value, int | float):
        reject(keyword, at, "unless it is a number")
    is_small = abs(value) <= MAX_BOUND  # NaN is not
    if not is_small or (bound := Decimal(str(value))) != round(bound, MAX_DECIMALS):
        reject(keyword, at, f"above {MAX_BOUND} or with more than {MAX_DECIMALS} decimals")
    return bound


def is_integer(value: object) -> bool:
    """Return whether a JSON value is an integer. 1.0 is one."""
    return not isinstance(value, bool) and (isinstance(value, int) or (isinstance(value, float) and value.is_integer()))


def check_encodable(text: str, keyword: str, at: str) -> None:
    """Raise UnsupportedConstraintError if a text has no encoding in UTF-8, or xgrammar reads it as another one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        reject(keyword, at, "with a lone surrogate")
    if "\x7f" in text:
        reject(keyword, at, "with the character U+007F")


def reject(keyword: str, at: str, condition: str = "") -> NoReturn:
    """Raise UnsupportedConstraintError with the name of a keyword, its JSON pointer, and when it cannot be enforced."""
    shown = at if len(at) <= 50 else f"{at[:24]}…{at[-24:]}"
    rule = f"must not have `{keyword:.30}`{condition and ' ' + condition}, which cannot be enforced"
    raise UnsupportedConstraintError(f"{rule} (at {shown or '/'})")
