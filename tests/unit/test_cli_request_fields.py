"""Request fields and prompts from options, assignments and files."""

import argparse
from pathlib import Path
from typing import Any

import pytest

from yuan_grpc.cli.common import prompts, request_fields
from yuan_grpc.v1 import yuan_pb2 as pb


def parsed(*arguments: str) -> request_fields.Fields:
    parser = argparse.ArgumentParser()
    request_fields.add_options(parser, 256)
    return request_fields.from_options(parser.parse_args(arguments))


def test_options_set_request_fields() -> None:
    fields = parsed("--max-tokens=8", "--top-k=1", "--temperature=0.5", "-n2", "--stop=a", "--stop=b", "--ignore-eos")
    expected = pb.GenerateRequest(max_tokens=8, top_k=1, temperature=0.5, n=2, stop=["a", "b"], ignore_eos=True)
    assert request_fields.build_partial_request(fields) == expected


def test_only_max_tokens_has_a_default() -> None:
    assert parsed() == {"max_tokens": 256}


def test_every_option_is_a_request_field() -> None:
    parser = argparse.ArgumentParser(add_help=False)
    request_fields.add_options(parser, 256)
    known = set(pb.GenerateRequest.DESCRIPTOR.fields_by_name)
    assert {action.dest for action in parser._actions} - known == {"set"}


def test_an_assignment_takes_precedence_over_an_option() -> None:
    assert parsed("--top-k", "1", "--set", "top_k=5")["top_k"] == 5


@pytest.mark.parametrize(
    ("text", "expected"),
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
def test_an_assignment_sets_a_field_from_json(text: str, expected: pb.GenerateRequest) -> None:
    assert request_fields.build_partial_request(dict([request_fields.parse_assignment(text)])) == expected


def test_heartbeat_interval_and_early_stopping_accept_short_forms() -> None:
    request = request_fields.build_partial_request(
        dict(map(request_fields.parse_assignment, ["heartbeat_interval=5", "early_stopping=never"]))
    )
    assert (request.heartbeat_interval.seconds, request.early_stopping.string_value) == (5, "never")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("top_k", "must be FIELD=JSON, not 'top_k'"),
        ("max_token=3", "GenerateRequest has no field `max_token`; did you mean `max_tokens`?"),
        ("zzz=3", "GenerateRequest has no field `zzz`"),
        ("top_k=many", "the value of `top_k` must be JSON, not 'many'"),
        ("top_k=1.5", "`top_k` cannot be 1.5: "),
        ('messages=["a"]', '`messages` cannot be ["a"]: '),
        ("top_k=99999999999", "`top_k` cannot be 99999999999: Value out of range"),
    ],
)
def test_an_invalid_assignment_is_rejected(text: str, message: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError) as raised:
        request_fields.parse_assignment(text)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize("fields", [{}, {"prompt": None}, {"prompt": "a", "messages": []}])
def test_a_request_has_exactly_one_prompt(fields: dict[str, Any]) -> None:
    with pytest.raises(request_fields.FieldError, match="one of prompt, prompt_token_ids, messages must be set, not"):
        request_fields.build_request(fields)


def test_each_line_of_a_text_file_is_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeff一\r\n\n  two \u2028 \x0b\r\n\n三".encode())
    requests = prompts.from_file(path, {"top_k": 1})
    assert [request.prompt for request in requests] == ["一", "  two \u2028 \x0b", "三"]
    assert {request.top_k for request in requests} == {1}


def test_each_line_of_a_jsonl_file_sets_its_own_fields(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "top_k": 2, "stop": "x"}\n\n{"messages": [{"role": "user", "content": "b"}]}\n')
    assert prompts.from_file(path, {"top_k": 1, "stop": ["y", "z"]}) == [
        pb.GenerateRequest(prompt="a", top_k=2, stop=["x"]),
        pb.GenerateRequest(messages=[pb.Message(role="user", content="b")], top_k=1, stop=["y", "z"]),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a"', "not JSON: Expecting ',' delimiter at column 15"),
        (b'["a"]', 'must be an object such as {"prompt": "…"}'),
        (b'{"top_k": 1}', "one of prompt, prompt_token_ids, messages must be set, not none"),
        (b'{"promt": "a"}', "GenerateRequest has no field `promt`; did you mean `prompt`?"),
        (b'{"prompt": 3}', "`prompt` cannot be 3: "),
        (b'{"prompt": "\\ud800"}', '`prompt` cannot be "\ud800": '),
        (b"[" * 100_000, "not JSON: "),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
    ids=["incomplete", "list", "no prompt", "unknown field", "not text", "surrogate", "too deep", "not UTF-8"],
)
def test_the_error_for_an_invalid_line_names_the_line(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line)
    with pytest.raises(prompts.PromptError) as raised:
        prompts.from_file(path, {})
    assert str(raised.value).startswith(f"{path}, line 3: {message}")


def test_a_file_without_prompts_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("\n\n")
    with pytest.raises(prompts.PromptError, match="has no prompts"):
        prompts.from_file(path, {})
    with pytest.raises(prompts.PromptError, match="cannot be read: Is a directory"):
        prompts.from_file(tmp_path, {})


def test_argument_bytes_unknown_to_the_locale_are_decoded_as_utf_8() -> None:
    assert prompts.from_argument("你好") == "你好"
    assert prompts.from_argument("你好".encode().decode("ascii", "surrogateescape")) == "你好"
    with pytest.raises(prompts.PromptError, match="the prompt is not UTF-8"):
        prompts.from_argument("\udcff")
    with pytest.raises(prompts.PromptError, match="the prompt is not UTF-8"):
        prompts.from_argument("\ud800")
