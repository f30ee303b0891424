"""Grammars of xgrammar for constraints."""

import json
from typing import Any

import xgrammar as xgr

from yuan_grpc.server.engine.vllm.constraints.regex import UnsupportedConstraintError
from yuan_grpc.server.engine.vllm.constraints.rules import to_enforceable
from yuan_grpc.server.engine.vllm.constraints.string_lengths import expand_constants, has_constants

MAX_CHARACTERS = 2**19
"""Length of a rewritten constraint: a short class of characters may have many ranges."""


def enforce(kind: str, text: str, json_options: dict[str, Any]) -> tuple[str, str]:
    """Return the kind and the text of the constraint to enforce instead of the given one.

    Args:
        kind: `json`, `regex`, `structural_tag`, `lark` or `grammar` (EBNF).
        text: the constraint.
        json_options: xgrammar's options for JSON schemas.

    Raises:
        UnsupportedConstraintError: the constraint has a part that the engine would not enforce.
    """
    text = to_enforceable(kind, text)
    if has_constants(text):
        kind, text = "grammar", expand_constants(str(parse(kind, text, json_options)))
    if len(text) > MAX_CHARACTERS:
        raise UnsupportedConstraintError("must be shorter: it has too many ranges of characters, or too long strings")
    return kind, text


def parse(kind: str, text: str, json_options: dict[str, Any]) -> xgr.Grammar:
    """Return the grammar of a constraint."""
    match kind:
        case "json":
            return xgr.Grammar.from_json_schema(text, **json_options)
        case "regex":
            return xgr.Grammar.from_regex(text)
        case "lark":
            return xgr.Grammar.from_lark(text)
        case "structural_tag":
            return xgr.Grammar.from_structural_tag(*_tags(text))
    return xgr.Grammar.from_ebnf(text)


def compile_text(
    compiler: xgr.GrammarCompiler, kind: str, text: str, json_options: dict[str, Any]
) -> xgr.CompiledGrammar:
    """Return a compiled constraint, as vLLM compiles it. A parsed grammar would be printed and read again."""
    match kind:
        case "json":
            return compiler.compile_json_schema(text, **json_options)
        case "regex":
            return compiler.compile_regex(text)
        case "lark":
            return compiler.compile_lark(text)
        case "structural_tag":
            return compiler.compile_structural_tag(*_tags(text))
    return compiler.compile_grammar(text)


def _tags(text: str) -> tuple[Any, ...]:
    """Return the arguments for a structural tag, of which vLLM accepts an older form."""
    tag = json.loads(text)
    if "structures" not in tag:
        return (text,)
    items = [
        xgr.StructuralTagItem(begin=one["begin"], schema=json.dumps(one["schema"]), end=one["end"])
        for one in tag["structures"]
    ]
    return items, tag["triggers"]
