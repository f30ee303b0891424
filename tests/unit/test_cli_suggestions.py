"""Suggestions for misspelled options."""

import pytest

from yuan_grpc.cli.common.suggestions import suggestion

KNOWN = ("--model", "--max-model-len", "--port")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        ("--mdel", ": did you mean --model?"),
        ("--max_modl_len=9", ": did you mean --max-model-len?"),
        ("--prot", ": did you mean --port?"),
        ("--no-such-option", ""),
    ],
)
def test_the_most_similar_option_is_suggested(option: str, text: str) -> None:
    assert suggestion(option, KNOWN) == text
