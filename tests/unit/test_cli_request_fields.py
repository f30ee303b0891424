"""What the command line makes of options, assignments and lines of files."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from yuan_grpc.cli.common import prompts, request_fields
from yuan_grpc.v1 import yuan_pb2 as pb


def parsed(*arguments: str) -> request_fields.Fields:
    parser = argparse.ArgumentParser()
    request_fields.add_options(parser, 256)
    return request_fields.of(parser.parse_args(arguments))


def test_options_are_fields_of_the_request() -> None:
    given = parsed("--max-tokens=8", "--top-k=1", "--temperature=0.5", "-n2", "--stop=a", "--stop=b", "--ignore-eos")
    expected = pb.GenerateRequest(max_tokens=8, top_k=1, temperature=0.5, n=2, stop=["a", "b"], ignore_eos=True)
    assert request_fields.message(given) == expected


def test_only_max_tokens_has_a_default() -> None:
    assert parsed() == {"max_tokens": 256}


def test_every_option_is_a_field() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    request_fields.add_options(parser, 256)
    known = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert {action.dest for action in parser._actions} - known == {"set"}


def test_an_assignment_stands_above_an_option() -> None:
    assert parsed("--top-k", "1", "--set", "top_k=5")["top_k"] == 5


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("logprobs=3", pb.GenerateRequest(logprobs=3)),
        ("maxTokens=3", pb.GenerateRequest(max_tokens=3)),
        ("model=poems", pb.GenerateRequest(model="poems")),
        ('model="poems"', pb.GenerateRequest(model="poems")),
        ("model=123", pb.GenerateRequest(model="123")),
        ("stop=<eod>", pb.GenerateRequest(stop=["<eod>"])),
        ('stop=["a", "b"]', pb.GenerateRequest(stop=["a", "b"])),
        ("prompt_token_ids=[1, 2]", pb.GenerateRequest(prompt_token_ids=pb.TokenIds(ids=[1, 2]))),
        ("truncation_side=right", pb.GenerateRequest(truncation_side=pb.TRUNCATION_SIDE_RIGHT)),
        ('logit_bias={"3": -1}', pb.GenerateRequest(logit_bias={3: -1})),
        (
            'structured_outputs={"choice": ["正面", "负面"]}',
            pb.GenerateRequest(structured_outputs=pb.StructuredOutputs(choice=pb.StringList(values=["正面", "负面"]))),
        ),
        (
            'structured_outputs={"json": {"type": "object"}}',
            pb.GenerateRequest(structured_outputs=pb.StructuredOutputs(json='{"type": "object"}')),
        ),
    ],
)
def test_an_assignment_is_a_field_and_json(written: str, expected: pb.GenerateRequest) -> None:
    assert request_fields.message(dict([request_fields.assignment(written)])) == expected


def test_intervals_and_early_stopping_are_as_people_write_them() -> None:
    request = request_fields.message(
        dict(map(request_fields.assignment, ["heartbeat_interval=5", "early_stopping=never"]))
    )
    assert (request.heartbeat_interval.seconds, request.early_stopping.string_value) == (5, "never")


@pytest.mark.parametrize(
    ("written", "complaint"),
    [
        ("top_k", "must be FIELD=JSON, not 'top_k'"),
        ("max_token=3", "GenerateRequest has no field `max_token`; is it `max_tokens`?"),
        ("zzz=3", "GenerateRequest has no field `zzz`"),
        ("top_k=many", "the value of `top_k` must be JSON, not 'many'"),
        ("top_k=1.5", "`top_k` cannot be 1.5: "),
        ('messages=["a"]', '`messages` cannot be ["a"]: '),
        ("top_k=99999999999", "`top_k` cannot be 99999999999: Value out of range"),
    ],
)
def test_a_wrong_assignment_is_complained_of(written: str, complaint: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        request_fields.assignment(written)
    assert str(raised.value).startswith(complaint)


@pytest.mark.parametrize("given", [{}, {"prompt": None}, {"prompt": "a", "messages": []}])
def test_a_request_has_one_prompt(given: dict[str, Any]) -> None:
    with pytest.raises(request_fields.FieldError, match="one of prompt, prompt_token_ids, messages must be given, not"):
        request_fields.request_of(given)


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff一\r\n\n  two \u2028 \x0b\r\n\n三".encode())
    requests = prompts.from_file(path, {"top_k": 1})
    assert [request.prompt for request in requests] == ["一", "  two \u2028 \x0b", "三"]
    assert {request.top_k for request in requests} == {1}


def test_a_line_of_a_jsonl_file_has_fields_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "top_k": 2, "stop": "x"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert prompts.from_file(path, {"top_k": 1, "stop": ["y", "z"]}) == [
        pb.GenerateRequest(prompt="a", top_k=2, stop=["x"]),
        pb.GenerateRequest(messages=[pb.Message(role="user", content="b")], top_k=1, stop=["y", "z"]),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b'["a"]', 'must be an object such as {"prompt": "…"}'),
        (b'{"top_k": 1}', "one of prompt, prompt_token_ids, messages must be given, not none"),
        (b'{"promt": "a"}', "GenerateRequest has no field `promt`; is it `prompt`?"),
        (b'{"prompt": 3}', "`prompt` cannot be 3: "),
        (b'{"prompt": "\\ud800"}', '`prompt` cannot be "\ud800": '),
        (b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
    ids=["torn", "a list", "no prompt", "no field", "no text", "no character", "too deep", "no UTF-8"],
)
def test_a_bad_line_is_named(tmp_path: Path, line: bytes, complaint: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line)
    with pytest.raises(prompts.PromptError) as raised:
        prompts.from_file(path, {})
    assert str(raised.value).startswith(f"{path}, line 3: {complaint}")


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n")
    with pytest.raises(prompts.PromptError, match="has no prompts"):
        prompts.from_file(path, {})
    with pytest.raises(prompts.PromptError, match="cannot be read: Is a directory"):
        prompts.from_file(tmp_path, {})


def test_bytes_that_the_locale_did_not_know_are_utf_8_all_the_same() -> None:
    assert prompts.argument("你好") == "你好"
    assert prompts.argument("你好".encode().decode("ascii", "surrogateescape")) == "你好"
    with pytest.raises(prompts.PromptError, match="the prompt is not UTF-8"):
        prompts.argument("\udcff")
    with pytest.raises(prompts.PromptError, match="the prompt is not UTF-8"):
        prompts.argument("\ud800")
