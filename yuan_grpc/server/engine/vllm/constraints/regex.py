"""Regular expressions as xgrammar 0.2.8 enforces them: rewritten where that preserves the meaning, else rejected."""

import re

from yuan_grpc.server.engine.vllm.constraints import character_class
from yuan_grpc.server.engine.vllm.constraints.character_class import Ranges

_QUANTIFIER = re.compile(r"(?:[*+?]|\{([0-9]+)(,[0-9]*)?\})\??")
_HEX_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|u([0-9a-fA-F]{4}))")
_CLASS = re.compile(r"\[((?:\\.|[^\]\\])+)\]", re.DOTALL)
_NAMED_GROUP = re.compile(r"\(\?P?<[A-Za-z_][A-Za-z0-9_]*>")
_GROUPS = {
    "(?=": "lookahead",
    "(?!": "negative lookahead",
    "(?<=": "lookbehind",
    "(?<!": "negative lookbehind",
    "(?>": "atomic group",
    "(?P=": "backreference",
    "(?(": "conditional",
    "(?#": "comment",
}
_ESCAPES = {
    "b": r"word boundary \b",
    "B": r"word boundary \B",
    "A": r"anchor \A",
    "Z": r"anchor \Z",
    "z": r"anchor \z",
    "p": r"Unicode class \p",
    "P": r"Unicode class \P",
    "k": r"backreference \k",
}


class UnsupportedConstraintError(ValueError):
    """A constraint that the engine would not enforce. The text is the rule that it violates."""


def to_enforceable_regex(pattern: str, *, in_json: bool = False) -> str:
    r"""Return an equivalent of a regular expression that xgrammar enforces.

    A text matches as a whole. `.` matches no line break. `\d`, `\w` and `\s` match ASCII characters. Their complements
    match no digit or white space of any script, and `\W` matches only ASCII characters, so that a text matches whether
    or not classes are those of Unicode.

    Args:
        pattern: the expression.
        in_json: whether it is for the content of a JSON string. Its classes then have no character that JSON escapes.

    Raises:
        UnsupportedConstraintError: the expression has a construct that xgrammar ignores or does not support.
    """
    return _Rewriter(pattern, in_json).rewrite()


class _Rewriter:
    def __init__(self, pattern: str, in_json: bool) -> None:
        self._pattern = pattern
        self._in_json = in_json
        self._index = 0
        self._depth = 0
        self._is_at_start = True
        self._result: list[str] = []

    def rewrite(self) -> str:
        while self._index < len(self._pattern):
            self._next()
        return "".join(self._result) or "()"

    def _next(self) -> None:
        character = self._pattern[self._index]
        if character in "^$":
            self._anchor(character)
            return
        self._is_at_start = character == "|" and self._depth == 0
        if character == "\\":
            self._escape()
        elif character == "[":
            self._character_class()
        elif character == "(":
            self._group()
        elif character == ".":
            self._characters(character_class.ANY_BUT_LINE_BREAKS, 1)
        elif quantifier := _QUANTIFIER.match(self._pattern, self._index):
            self._add_quantifier(quantifier[0])
        elif character in ")|":
            self._depth -= character == ")"
            self._add(character, 1)
        else:
            self._characters([(ord(character), ord(character))], 1)

    def _add(self, replacement: str, length: int) -> None:
        self._result.append(replacement)
        self._index += length

    def _characters(self, ranges: Ranges, length: int) -> None:
        """Add a class."""
        if self._in_json:
            ranges = character_class.intersection(ranges, character_class.UNESCAPED_IN_JSON)
        if not ranges:
            shown = self._pattern[self._index : self._index + min(length, 20)]
            raise self._error(f"characters that {'JSON escapes' if self._in_json else 'do not exist'}, {shown!r}")
        self._add(character_class.to_regex(ranges), length)

    def _anchor(self, character: str) -> None:
        """Drop an anchor that a match of the whole text implies."""
        following = self._pattern[self._index + 1 : self._index + 2]
        is_implied = self._is_at_start if character == "^" else following in ("", "|")
        if self._depth or not is_implied:
            raise self._error(f"anchor {character} inside")
        self._is_at_start = False
        self._index += 1

    def _group(self) -> None:
        self._depth += 1
        start = self._pattern[self._index : self._index + 4]
        if not start.startswith("(?"):
            self._add("(", 1)
        elif start.startswith("(?:"):
            self._add("(?:", 3)
        elif named := _NAMED_GROUP.match(self._pattern, self._index):
            self._add("(?:", len(named[0]))
        else:
            names = (name for prefix, name in _GROUPS.items() if start.startswith(prefix))
            raise self._error(next(names, "inline flag"))

    def _add_quantifier(self, quantifier: str) -> None:
        """Add a quantifier, without a mark for as few as possible. xgrammar drops characters before `?` in JSON."""
        kept = quantifier.removesuffix("?") or "?"
        self._add("{0,1}" if kept == "?" else kept, len(quantifier))

    def _escape(self) -> None:
        if number := _HEX_ESCAPE.match(self._pattern, self._index):
            code = int(number[1] or number[2], 16)
            self._characters(character_class.intersection([(code, code)], [(0, 0x10FFFF)]), len(number[0]))
            return
        letter = self._pattern[self._index + 1 : self._index + 2]
        is_octal = letter == "0" and self._pattern[self._index + 2 : self._index + 3].isdecimal()
        ranges = character_class.escaped(letter) if letter and not is_octal else None
        if ranges is None:
            kind = "backreference" if letter.isdecimal() else f"escape \\{letter}"
            raise self._error(_ESCAPES.get(letter, kind))
        self._characters(ranges, 2)

    def _character_class(self) -> None:
        match = _CLASS.match(self._pattern, self._index)
        if match is None or match[1] == "^":
            raise self._error("empty or unclosed character class")
        ranges = character_class.parse(match[1])
        if isinstance(ranges, str):
            raise self._error(f"escape {ranges} in a character class")
        self._characters(ranges, len(match[0]))

    def _error(self, construct: str) -> UnsupportedConstraintError:
        return UnsupportedConstraintError(f"must not have a construct that cannot be enforced: {construct}")
