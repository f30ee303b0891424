"""Character classes of regular expressions, as ranges of code points."""

import re
from collections.abc import Iterable, Iterator

Ranges = list[tuple[int, int]]

_ITEM = re.compile(r"\\x([0-9a-fA-F]{2})|\\u([0-9a-fA-F]{4})|\\(.)|([^\\])", re.DOTALL)
_CONTROL = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "0": 0}


def _normalize(ranges: Iterable[tuple[int, int]]) -> Ranges:
    result: Ranges = []
    for first, last in sorted(ranges):
        if result and first <= result[-1][1] + 1:
            result[-1] = (result[-1][0], max(last, result[-1][1]))
        else:
            result.append((first, last))
    return result


def complement(ranges: Ranges) -> Ranges:
    """Return the code points that the ranges do not include. Surrogates are in no text."""
    result, start = [], 0
    for first, last in _normalize([*ranges, (0xD800, 0xDFFF)]):
        if start < first:
            result.append((start, first - 1))
        start = last + 1
    return [*result, (start, 0x10FFFF)] if start <= 0x10FFFF else result


def intersection(some: Ranges, others: Ranges) -> Ranges:
    """Return the code points in both."""
    return complement(complement(some) + complement(others))


def _codes(text: str) -> Ranges:
    return [(ord(character), ord(character)) for character in text]


DIGITS = [(48, 57)]
WORD = [(48, 57), (65, 90), (95, 95), (97, 122)]
SPACES = [(9, 13), (32, 32)]
_UNICODE_SPACES = _codes("\x1c\x1d\x1e\x1f\x85\xa0\u1680\u202f\u205f\u3000\ufeff")
ALL_SPACES = [*SPACES, *_UNICODE_SPACES, (0x2000, 0x200A), (0x2028, 0x2029)]
_ZEROS = (
    "660 6f0 7c0 966 9e6 a66 ae6 b66 be6 c66 ce6 d66 de6 e50 ed0 f20 1040 1090 17e0 1810 1946 19d0 1a80 "
    "1a90 1b50 1bb0 1c40 1c50 a620 a8d0 a900 a9d0 a9f0 aa50 abf0 ff10 104a0 10d30 11066 110f0 11136 "
    "111d0 112f0 11450 114d0 11650 116c0 11730 118e0 11950 11c50 11d50 11da0 16a60 16ac0 16b50 1d7ce "
    "1d7d8 1d7e2 1d7ec 1d7f6 1e140 1e2f0 1e950 1fbf0 "
)
"""The zeros of the scripts that have decimal digits; nine more follow each."""
ALL_DIGITS = [*DIGITS, *((int(zero, 16), int(zero, 16) + 9) for zero in _ZEROS.split())]
ALL_WORDS = [*WORD, (0x80, 0x10FFFF)]
LINE_BREAKS = [*_codes("\n\r"), (0x2028, 0x2029)]
ANY_BUT_LINE_BREAKS = complement(LINE_BREAKS)
UNESCAPED_IN_JSON = complement([(0, 0x1F), *_codes('"\\')])
"""Characters that stand for themselves in a JSON string."""

_UNICODE_CLASSES = {"d": ALL_DIGITS, "w": ALL_WORDS, "s": ALL_SPACES}
"""Characters that a complement excludes: those of all scripts, although the class itself has those of ASCII."""
_CLASSES = {"d": DIGITS, "w": WORD, "s": SPACES} | {
    letter.upper(): complement(ranges) for letter, ranges in _UNICODE_CLASSES.items()
}


def escaped(letter: str) -> Ranges | None:
    r"""Return the code points of an escape such as `\d`, `\n` or `\.`; None if it is no such escape."""
    if letter in _CLASSES:
        return _CLASSES[letter]
    if letter in _CONTROL:
        return [(_CONTROL[letter], _CONTROL[letter])]
    return _codes(letter) if letter.isascii() and not letter.isalnum() else None


def parse(content: str) -> Ranges | str:
    """Return the code points of a class, given the text between its brackets, or the escape that it cannot have."""
    is_negated = content.startswith("^")
    items: list[Ranges] = []
    for match in _ITEM.finditer(content, int(is_negated)):
        hexadecimal, letter = match[1] or match[2], match[3]
        if is_negated and letter in _UNICODE_CLASSES:
            items.append(_UNICODE_CLASSES[letter])
            continue
        item = escaped(letter) if letter else _codes(chr(int(hexadecimal, 16)) if hexadecimal else match[4])
        if item is None:
            return match[0]
        items.append(item if match[0] != "-" else [])  # an unescaped hyphen
    has_all = any(f"\\{one}" in content and f"\\{one.upper()}" in content for one in _UNICODE_CLASSES)  # `[\s\S]`
    ranges = [(0, 0x10FFFF)] if has_all else _normalize(_join(items))
    return complement(ranges) if is_negated else intersection(ranges, [(0, 0x10FFFF)])


def _join(items: list[Ranges]) -> Iterator[tuple[int, int]]:
    """Yield the ranges of a class's items, where an empty item is a hyphen."""
    index = 0
    while index < len(items):
        item, is_range = items[index], 0 < index + 1 < len(items) - 1 and not items[index + 1]
        if is_range and len(item) == 1 and item[0][0] == item[0][1] and len(items[index + 2] or _codes("-")) == 1:
            yield item[0][0], (items[index + 2] or _codes("-"))[0][1]
            index += 3
        else:
            yield from item or _codes("-")
            index += 1


def to_regex(ranges: Ranges) -> str:
    """Return a regular expression that matches one of the characters."""
    if len(ranges) == 1 and ranges[0][0] == ranges[0][1]:
        return _character(ranges[0][0])
    return f"[{''.join(_character(first) if first == last else _range(first, last) for first, last in ranges)}]"


def _range(first: int, last: int) -> str:
    return f"{_character(first)}-{_character(last)}"


def _character(code: int) -> str:
    character = chr(code)
    if character.isalnum() and character.isascii():
        return character
    return f"\\u{code:04x}" if code <= 0xFFFF else character  # xgrammar reads hexadecimal digits that follow \\xHH
