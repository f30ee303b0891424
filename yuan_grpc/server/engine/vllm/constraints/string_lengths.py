"""Strings of limited length, as rules of a grammar.

For the `{m,n}` of a pattern, and for its own `maxLength`, xgrammar 0.2.8 tries thousands of tokens at each position
again, because what follows decides about those that are too long: a mask takes 10 to 40 ms with 135,000 tokens. Rules
that include the closing quotation mark are computed once, when the grammar is compiled.
"""

import re
import secrets

from yuan_grpc.server.engine.vllm.constraints.character_class import UNESCAPED_IN_JSON, to_regex

_MARK = secrets.token_hex(8)
"""Start of the constants that stand for strings until the schema is a grammar. No caller can know it."""
_CONSTANT = re.compile(rf'\\"{_MARK}-([0-9]+)-([0-9]*)\\"')
_ESCAPE = re.compile(r"\\(?:x([0-9a-fA-F]{2})|.)", re.DOTALL)
_CHARACTERS = (to_regex(UNESCAPED_IN_JSON), r'"\\" ["\\/bfnrt]')


def constant(low: int, high: int | None) -> str:
    """Return the constant that stands for a string of `low` to `high` characters."""
    return f"{_MARK}-{low}-{'' if high is None else high}"


def has_constants(text: str) -> bool:
    """Return whether there is such a constant in a schema."""
    return _MARK in text


def expand_constants(grammar: str) -> str:
    r"""Return a grammar in EBNF with the strings in place of the constants.

    xgrammar writes `\xHH`, and reads hexadecimal digits that follow as part of it.
    """
    grammar = _ESCAPE.sub(lambda match: f"\\u00{match[1]}" if match[1] else match[0], grammar)
    limits = {match[0]: (int(match[1]), int(match[2]) if match[2] else None) for match in _CONSTANT.finditer(grammar)}
    names = {text: f"length_{number}" for number, text in enumerate(limits)}
    expanded = _CONSTANT.sub(lambda match: f'" {names[match[0]]} "', grammar)
    return "\n".join([expanded, *(_rules(names[text], *limits[text]) for text in limits)])


def _rules(name: str, low: int, high: int | None) -> str:
    """Return the rules of a string. That of number N has N characters before it."""
    last = low if high is None else high
    rules = [f'{name} ::= "\\"" {name}_0']
    for number in range(last + 1):
        following = f"{name}_{number + (number < last)}"
        choices = ['"\\""'] if number >= low else []
        if number < last or high is None:
            choices += [f"{characters} {following}" for characters in _CHARACTERS]
        rules.append(f"{name}_{number} ::= {' | '.join(choices)}")
    return "\n".join(rules)
