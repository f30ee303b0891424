"""Text at a terminal: control characters, bidirectional overrides, invisible characters and line breaks."""

import argparse
import unicodedata

import grpc
import pytest

from yuan_grpc.cli.common import connection
from yuan_grpc.cli.common.errors import print_call_error
from yuan_grpc.cli.common.terminal import sanitize, sanitize_line
from yuan_grpc.client import InternalError, InvalidRequestError, Violation

OVERRIDES = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]
INVISIBLE = [*OVERRIDES, *map(chr, (0x61C, 0x200B, 0x200C, 0x200D, 0x200E, 0x200F, 0x2060, 0xFEFF, 0xE0041))]
CONTROLS = [chr(code) for code in (*range(0x20), *range(0x7F, 0xA0)) if chr(code) not in "\n\t"]
SEPARATORS = ["\u2028", "\u2029"]


@pytest.mark.parametrize("character", [*CONTROLS, *OVERRIDES, *SEPARATORS], ids=ascii)
def test_generated_text_has_no_control_character_and_no_override(character: str) -> None:
    assert sanitize(f"a{character}b") == "a\ufffdb"


def test_generated_text_keeps_line_breaks_tabs_and_joiners() -> None:
    text = "一\n\tاب\u200cج \u200f👩\u200d💻"
    assert sanitize(text) == text


@pytest.mark.parametrize("character", [*CONTROLS, *INVISIBLE, *SEPARATORS], ids=ascii)
def test_a_line_has_no_invisible_character(character: str) -> None:
    assert sanitize_line(f"a{character}b") in ("a\ufffdb", "a b")


@pytest.mark.timeout(60)
def test_a_line_has_only_visible_characters_of_all_unicode() -> None:
    line = sanitize_line("".join(map(chr, range(0x110000))))
    assert not {unicodedata.category(character) for character in line} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    assert len(line) == 0x110000
    assert sanitize_line("a\r\nb\tc") == "a  b c"


def test_an_error_of_a_server_is_one_line_without_invisible_characters(capsys: pytest.CaptureFixture[str]) -> None:
    message = "no\nyuan-grpc: all prompts completed\x1b[2J\u202egnp.exe\u2028"
    print_call_error(InternalError(grpc.StatusCode.INTERNAL, message, request_id="a\u2066\nb"), "prompt 1: ")
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "yuan-grpc: prompt 1: INTERNAL: no yuan-grpc: all prompts completed\ufffd[2J\ufffdgnp.exe\ufffd"
        " (request a\ufffd b)"
    )


def test_each_violation_of_a_server_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    violations = [Violation("top_p\n", "a\u2029\nb"), Violation("n", "\x9b2J")]
    print_call_error(InvalidRequestError(grpc.StatusCode.INVALID_ARGUMENT, "no", "", violations))
    assert capsys.readouterr().err.split("\n")[1:] == ["  top_p : a\ufffd b", "  n: \ufffd2J", ""]


@pytest.mark.parametrize("text", ["x api key=hunter2", "hunter2", "x-bin=hunter2", "grpc-x=hunter2", "a=hunter2é"])
def test_the_error_for_invalid_metadata_does_not_show_its_value(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        connection._metadata(text)
    assert "hunter2" not in str(raised.value)


@pytest.mark.parametrize("text", ["https://me:hunter2@proxy:1", "http://hunter2@proxy"])
def test_the_error_for_an_invalid_proxy_does_not_show_its_password(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=r"must be http://host:port, not 'https?://…@proxy") as raised:
        connection._proxy(text)
    assert "hunter2" not in str(raised.value)
