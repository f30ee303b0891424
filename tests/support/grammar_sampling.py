"""Texts of a compiled constraint, sampled without a model: a random walk over the bytes that its grammar allows."""

import random
from collections.abc import Iterator
from functools import cache

import torch
import xgrammar as xgr

END = 256
"""The token that ends a text. The other 256 tokens are the bytes."""
PREFERRED = b'"}],:x1'
"""Bytes that end strings and containers, so that most walks do."""


def tokenizer_info() -> xgr.TokenizerInfo:
    """Return a tokenizer whose tokens are the bytes."""
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    return xgr.TokenizerInfo(vocabulary, xgr.VocabType.RAW, vocab_size=END + 1, stop_token_ids=[END])


@cache
def compiler() -> xgr.GrammarCompiler:
    """Return a compiler for that tokenizer."""
    return xgr.GrammarCompiler(tokenizer_info(), max_threads=1)


def matches(compiled: xgr.CompiledGrammar, text: str) -> bool:
    """Return whether a grammar allows a text as a whole."""
    matcher = xgr.GrammarMatcher(compiled)
    return (not text or matcher.accept_string(text)) and matcher.accept_token(END)


def sample_texts(compiled: xgr.CompiledGrammar, count: int, seed: int, max_bytes: int = 300) -> Iterator[bytes]:
    """Yield texts that a grammar allows, from `count` walks. Walks that are too long yield none."""
    generator = random.Random(seed)
    bitmask = xgr.allocate_token_bitmask(1, END + 1)
    for _ in range(count):
        matcher, text = xgr.GrammarMatcher(compiled), bytearray()
        while len(text) < max_bytes:
            matcher.fill_next_token_bitmask(bitmask)
            token = _choose(bitmask, generator)
            assert matcher.accept_token(token)
            if token == END:
                yield bytes(text)
                break
            text.append(token)


def _choose(bitmask: torch.Tensor, generator: random.Random) -> int:
    words = [word & 0xFFFFFFFF for word in bitmask[0].tolist()]
    allowed = [token for token in range(END + 1) if words[token // 32] >> token % 32 & 1]
    preferred = [token for token in allowed if token == END or token in PREFERRED]
    return generator.choice(preferred if preferred and generator.random() < 0.7 else allowed)
