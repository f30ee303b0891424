"""The HTTP API over a real port, with a fake engine: requests, responses and errors."""

import json
import logging
import random
import re
import threading
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import pytest_asyncio
from fake_engine import FakeEngine, last, more
from prometheus_client import REGISTRY, Gauge
from servers import ORIGINAL_BODY, parse_events, post, serve_http_client

from yuan_grpc.server.core.limits import MAX_IN_FLIGHT
from yuan_grpc.server.engine.types import ChoiceDelta, FinishReason, RankedToken, StepOutput, TokenLogprobs
from yuan_grpc.server.errors import INTERNAL_MESSAGE, OverloadedError
from yuan_grpc.server.http import json_body
from yuan_grpc.server.http.call import MAX_BODY
from yuan_grpc.server.http.json_body import MAX_DIGITS, MAX_NUMBERS, MAX_VALUES
from yuan_grpc.server.http.openai import chat, completions, streaming
from yuan_grpc.server.http.openai.completions import MAX_COPIED_BYTES
from yuan_grpc.v1 import yuan_pb2 as pb

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "AB"}]
LONG_FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"pattern": "a{3000}"}}}
BODIES: dict[str, dict[str, Any]] = {
    GENERATE: {"prompt": "AB"},
    COMPLETIONS: {"prompt": "AB"},
    CHAT: {"messages": MESSAGES},
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def rejecting() -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server, shared by tests of requests that must be rejected before they reach the engine."""
    async with serve_http_client(FakeEngine(RuntimeError("the request reached the engine"))) as client:
        yield client


module_loop = pytest.mark.asyncio(loop_scope="module")


def ranked(text: str, logprob: float = -0.5, rank: int = 1) -> RankedToken:
    return RankedToken(ord(text), text, logprob, rank)


def with_logprobs(text: str, finish_reason: FinishReason | None = None) -> StepOutput:
    """Return an output of one token, with a more likely alternative."""
    logprobs = TokenLogprobs(ranked(text, -0.5, 2), [ranked("x", -0.25), ranked(text, -0.5, 2)])
    return StepOutput([ChoiceDelta(0, text, [ord(text)], [logprobs], -0.5, finish_reason)])


async def test_the_original_request_gets_the_original_response() -> None:
    engine = FakeEngine(last("yes"))
    response = await post(engine, GENERATE, ORIGINAL_BODY)
    assert response.json() == {"text": ["AByes"]}
    assert response.headers["content-type"] == "application/json"
    sampling = engine.requests[0].sampling
    assert (sampling.max_tokens, sampling.top_p, sampling.top_k, sampling.stop) == (256, 0, 1, ("<eod>",))


@pytest.mark.parametrize("content_type", ["application/x-www-form-urlencoded", "text/plain", "nonsense", None])
async def test_a_body_is_parsed_as_json_with_any_content_type(content_type: str | None) -> None:
    async with serve_http_client(FakeEngine(last("yes"))) as client:
        headers = {"content-type": content_type} if content_type else {}
        response = await client.post(GENERATE, content=json.dumps(ORIGINAL_BODY), headers=headers)
    assert response.json() == {"text": ["AByes"]}


async def test_chunks_of_generate_have_all_text_so_far_and_end_with_a_zero_byte() -> None:
    engine = FakeEngine(more("世"), more("b", 1), more("c"), last("d", 1))
    response = await post(engine, GENERATE, {"prompt": "AB", "stream": True, "n": 2})
    *chunks, remaining = response.content.split(b"\0")
    assert remaining == b""
    assert response.content.isascii()
    assert [json.loads(chunk)["text"] for chunk in chunks] == [
        ["AB世", "AB"],
        ["AB世", "ABb"],
        ["AB世c", "ABb"],
        ["AB世c", "ABbd"],
    ]


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"messages": MESSAGES}, "AB>"),
        ({"prompt_token_ids": [65, 66]}, "AB"),
        ({"prompt": "ABC", "truncate_prompt_tokens": 2}, "BC"),
        ({"prompt": "AB", "echo": False}, ""),
    ],
    ids=["messages", "token ids", "truncated prompt", "no echo"],
)
async def test_a_choice_without_output_is_the_echoed_prompt(fields: dict[str, Any], prompt: str) -> None:
    engine = FakeEngine(more("a"), last("b", 1), last("c"))
    response = await post(engine, GENERATE, fields | {"stream": True, "n": 2})
    chunks = [json.loads(chunk)["text"] for chunk in response.content.split(b"\0")[:-1]]
    assert chunks[0] == [f"{prompt}a", prompt]
    assert chunks[-1] == [f"{prompt}ac", f"{prompt}b"]


async def test_defaults_of_generate_are_the_original_ones() -> None:
    engine = FakeEngine(last())
    await post(engine, GENERATE, {"prompt": "AB"})
    sampling = engine.requests[0].sampling
    assert (sampling.n, sampling.max_tokens, sampling.temperature, sampling.top_p) == (1, 16, 1, 1)


async def test_generate_accepts_the_fields_of_generate_request() -> None:
    engine = FakeEngine(last())
    body = {
        "prompt_token_ids": [65, 66],
        "structured_outputs": {"choice": ["a", "b"]},
        "truncation_side": "right",
        "logit_bias": {"65": 1.5},
        "echo": False,
        "seed": 7,
        "request_id": "mine",
    }
    response = await post(engine, GENERATE, body)
    assert response.json() == {"text": ["!"]}
    assert response.headers["x-request-id"] == "mine"
    [request] = engine.requests
    assert request.request_id.startswith("mine")
    assert (list(request.prompt), request.sampling.seed) == ([65, 66], 7)
    assert request.sampling.logit_bias == {65: 1.5}
    assert request.sampling.structured_outputs is not None
    assert request.sampling.structured_outputs.specification == ("a", "b")


async def test_a_completion_has_openais_format() -> None:
    response = await post(FakeEngine(last("yes")), COMPLETIONS, {"model": "fake", "prompt": "AB", "request_id": "mine"})
    content = response.json()
    assert isinstance(content.pop("created"), int)
    assert content == {
        "id": "cmpl-mine",
        "object": "text_completion",
        "model": "fake",
        "choices": [{"index": 0, "text": "yes", "logprobs": None, "finish_reason": "length"}],
        "usage": {
            "prompt_tokens": 2,
            "completion_tokens": 3,
            "total_tokens": 5,
            "prompt_tokens_details": {"cached_tokens": 0},
        },
    }


async def test_a_completions_stream_has_deltas_then_usage_then_done() -> None:
    engine = FakeEngine(more("a\u2028"), last("b"))
    body = {"prompt": "AB", "stream": True, "stream_options": {"include_usage": True}}
    response = await post(engine, COMPLETIONS, body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert b"\\u2028" in response.content
    *deltas, usage, done = parse_events(response.content)
    assert [delta["choices"][0]["text"] for delta in deltas] == ["a\u2028", "b"]
    assert [delta["choices"][0]["finish_reason"] for delta in deltas] == [None, "length"]
    assert [delta["usage"] for delta in deltas] == [None, None]
    assert (usage["choices"], usage["usage"]["total_tokens"], done) == ([], 5, "[DONE]")


async def test_a_chat_response_has_openais_format() -> None:
    engine = FakeEngine(last("yes"))
    messages = [
        {"role": "developer", "content": "S"},
        {"role": "user", "content": [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]},
        {"role": "assistant", "content": "C", "refusal": None, "tool_calls": None},
        {"role": "user", "content": "D", "name": "me"},
    ]
    content = (await post(engine, CHAT, {"messages": messages})).json()
    assert "".join(map(chr, engine.requests[0].prompt)) == "S|A\nB|C|D>"
    assert (content["object"], content["id"][:9]) == ("chat.completion", "chatcmpl-")
    [choice] = content["choices"]
    assert choice["message"] == {"role": "assistant", "content": "yes", "refusal": None}
    assert choice["finish_reason"] == "length"


async def test_a_chat_stream_has_a_role_then_deltas() -> None:
    body = {"messages": MESSAGES, "stream": True, "n": 2}
    response = await post(FakeEngine(more("a"), last("b"), last("c", 1)), CHAT, body)
    *chunks, done = parse_events(response.content)
    assert done == "[DONE]"
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    deltas = [(choice["index"], choice["delta"]) for chunk in chunks for choice in chunk["choices"]]
    assert deltas == [
        (0, {"role": "assistant", "content": ""}),
        (1, {"role": "assistant", "content": ""}),
        (0, {"content": "a"}),
        (0, {"content": "b"}),
        (1, {"content": "c"}),
    ]


async def test_chat_is_limited_by_the_context_by_default() -> None:
    engine = FakeEngine(last())
    async with serve_http_client(engine) as client:
        for fields in ({}, {"max_tokens": 3}, {"max_tokens": 3, "max_completion_tokens": 4}):
            await client.post(CHAT, json={"messages": MESSAGES, **fields})
    assert [request.sampling.max_tokens for request in engine.requests] == [64, 3, 4]


async def test_chat_without_a_limit_can_truncate_the_prompt_to_what_fits() -> None:
    engine = FakeEngine(last())
    message = {"role": "user", "content": "A" * 100}
    response = await post(engine, CHAT, {"messages": [message], "truncate_prompt_tokens": -1})
    assert response.status_code == 200
    assert (len(engine.requests[0].prompt), engine.requests[0].sampling.max_tokens) == (48, 64)


@pytest.mark.timeout(60)
async def test_too_many_logprobs_of_an_echo_are_one_violation() -> None:
    response = await post(FakeEngine(last()), COMPLETIONS, {"prompt": "AB", "logprobs": 1000, "echo": True})
    assert response.status_code == 400
    message = response.json()["error"]["message"]
    assert message.count("`logprobs` must be between 0 and ") == 1
    assert "prompt_logprobs" not in message


async def test_choices_are_in_the_order_of_the_prompts() -> None:
    engine = FakeEngine(last("a"), last("b", 1))
    content = (await post(engine, COMPLETIONS, {"prompt": ["A", "BC"], "n": 2, "request_id": "mine"})).json()
    assert [(choice["index"], choice["text"]) for choice in content["choices"]] == [
        (0, "a"),
        (1, "b"),
        (2, "a"),
        (3, "b"),
    ]
    assert (content["usage"]["prompt_tokens"], content["usage"]["completion_tokens"]) == (3, 4)
    assert [request.request_id[:6] for request in engine.requests] == ["mine-0", "mine-1"]


@pytest.mark.parametrize("prompt", [[65, 66], [[65], [66, 67]], ["A", [66]]])
async def test_prompts_may_be_token_ids(prompt: list[Any]) -> None:
    engine = FakeEngine(last())
    assert (await post(engine, COMPLETIONS, {"prompt": prompt})).status_code == 200
    prompts = [list(request.prompt) for request in engine.requests]
    assert prompts == {65: [[65, 66]], "A": [[65], [66]]}.get(prompt[0] if prompt[0] != [65] else 0, [[65], [66, 67]])


async def test_a_stream_of_several_prompts_has_all_text_of_each() -> None:
    body = {"prompt": ["A", "BC"], "n": 2, "stream": True, "stream_options": {"include_usage": True}}
    *chunks, usage, _ = parse_events(
        (await post(FakeEngine(more("a"), last("b"), last("c", 1)), COMPLETIONS, body)).content
    )
    texts = [""] * 4
    for chunk in chunks:
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["ab", "c", "ab", "c"]
    assert usage["usage"]["prompt_tokens"] == 3


async def test_a_limited_number_of_prompts_runs_at_a_time() -> None:
    engine = FakeEngine(hangs=True)
    async with serve_http_client(engine) as client:
        async with client.stream("POST", COMPLETIONS, json={"prompt": ["A"] * (2 * MAX_IN_FLIGHT), "stream": True}):
            await client.get("/v1/models")  # gives further prompts time to start
            assert engine.running == MAX_IN_FLIGHT
        await engine.freed.wait()


async def test_an_invalid_prompt_cancels_the_others() -> None:
    engine = FakeEngine(hangs=True)
    response = await post(engine, COMPLETIONS, {"prompt": ["A", "B" * 64]})
    assert response.status_code == 400
    error = response.json()["error"]
    assert (error["param"], error["message"][:11]) == ("prompt[1]", "`prompt[1]`")
    assert engine.running == 0


async def test_a_heartbeat_is_a_comment() -> None:
    body = {"prompt": "AB", "stream": True, "heartbeat_interval": "0.1s"}
    async with (
        serve_http_client(FakeEngine(hangs=True)) as client,
        client.stream("POST", COMPLETIONS, json=body) as response,
    ):
        async for line in response.aiter_lines():
            assert line == ":"
            break


async def test_a_completion_has_logprobs() -> None:
    engine = FakeEngine(with_logprobs("a"), with_logprobs("b", FinishReason.STOP))
    body = {"prompt": "AB", "logprobs": 1, "stream": True}
    first, second, _ = parse_events((await post(engine, COMPLETIONS, body)).content)
    assert first["choices"][0]["logprobs"] == {
        "text_offset": [0],
        "token_logprobs": [-0.5],
        "tokens": ["a"],
        "top_logprobs": [{"a": -0.5, "x": -0.25}],
    }
    assert second["choices"][0]["logprobs"]["text_offset"] == [1]


async def test_an_echo_has_the_logprobs_of_the_prompt() -> None:
    prompt = [TokenLogprobs(ranked("A", 0, 0), ()), TokenLogprobs(ranked("B", -2), [ranked("B", -2)])]
    engine = FakeEngine(StepOutput(prompt_logprobs=prompt), with_logprobs("c", FinishReason.STOP))
    [choice] = (await post(engine, COMPLETIONS, {"prompt": "AB", "logprobs": 1, "echo": True})).json()["choices"]
    assert choice["text"] == "ABc"
    assert choice["logprobs"]["tokens"] == ["A", "B", "c"]
    assert choice["logprobs"]["token_logprobs"] == [None, -2, -0.5]
    assert choice["logprobs"]["top_logprobs"][:2] == [None, {"B": -2}]
    assert choice["logprobs"]["text_offset"] == [0, 1, 2]
    assert engine.requests[0].sampling.prompt_logprobs == 1


async def test_a_chat_response_has_logprobs() -> None:
    engine = FakeEngine(with_logprobs("é", FinishReason.STOP))
    [choice] = (await post(engine, CHAT, {"messages": MESSAGES, "logprobs": True, "top_logprobs": 2})).json()["choices"]
    assert engine.requests[0].sampling.logprobs == 2
    [token] = choice["logprobs"]["content"]
    assert (token["token"], token["logprob"], token["bytes"]) == ("é", -0.5, [195, 169])
    assert [other["token"] for other in token["top_logprobs"]] == ["x", "é"]


@pytest.mark.parametrize(("path", "choice_format"), [(COMPLETIONS, "_CompletionFormat"), (CHAT, "_ChatFormat")])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_large_response_is_converted_outside_the_event_loop(
    path: str, choice_format: str, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = completions if path == COMPLETIONS else chat
    name, threads = "delta" if path == COMPLETIONS or stream else "full", []
    convert = getattr(getattr(module, choice_format), name)

    def recorded(*args: Any) -> Any:
        threads.append(threading.current_thread())
        return convert(*args)

    monkeypatch.setattr(getattr(module, choice_format), name, recorded)
    body = BODIES[path] | ({"logprobs": 1} if path == COMPLETIONS else {"logprobs": True, "top_logprobs": 1})
    contents = []
    for inline_bytes in (2**20, 0):
        monkeypatch.setattr(streaming, "INLINE_BYTES", inline_bytes)
        engine = FakeEngine(with_logprobs("é"), with_logprobs("b", FinishReason.STOP))
        response = await post(engine, path, body | {"stream": stream, "request_id": "mine"})
        contents.append(re.sub(rb'"created":[0-9]+', b"", response.content))
    assert contents[0] == contents[1]
    in_loop = [thread is threading.main_thread() for thread in threads]
    assert in_loop == [True] * (len(in_loop) // 2) + [False] * (len(in_loop) // 2)


async def test_a_logprob_of_minus_infinity_is_minus_9999() -> None:
    output = StepOutput(
        [ChoiceDelta(0, "a", [97], [TokenLogprobs(ranked("a", float("-inf")), ())], None, FinishReason.STOP)]
    )
    [choice] = (await post(FakeEngine(output), COMPLETIONS, {"prompt": "A", "logprobs": 0})).json()["choices"]
    assert choice["logprobs"]["token_logprobs"] == [-9999]


async def test_token_ids_are_returned_on_request() -> None:
    body = {"prompt": "AB", "return_token_ids": True}
    async with serve_http_client(FakeEngine(more("a"), last("b"))) as client:
        [choice] = (await client.post(COMPLETIONS, json=body)).json()["choices"]
        first, second, _ = parse_events((await client.post(COMPLETIONS, json=body | {"stream": True})).content)
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([97, 98], [65, 66])
    assert (first["choices"][0]["token_ids"], first["choices"][0]["prompt_token_ids"]) == ([97], [65, 66])
    assert second["choices"][0]["token_ids"] == [98]


@pytest.mark.parametrize(
    ("response_format", "kind", "specification"),
    [
        ({"type": "json_object"}, "json_object", True),
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}, "json", None),
    ],
)
async def test_a_response_format_is_a_constraint(
    response_format: dict[str, Any], kind: str, specification: bool | None
) -> None:
    engine = FakeEngine(last("{}"))
    assert (await post(engine, CHAT, {"messages": MESSAGES, "response_format": response_format})).status_code == 200
    constraint = engine.requests[0].sampling.structured_outputs
    assert constraint is not None
    assert (constraint.kind, constraint.specification) == (kind, specification or '{"type": "object"}')


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_fields_without_effect_are_accepted(path: str) -> None:
    body = {
        "user": "me",
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "stream_options": None,
        "frobnicate": None,
        "suffix": "",
    }
    assert (await post(FakeEngine(last()), path, BODIES[path] | body)).status_code == 200


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        (GENERATE, {"frobnicate": 1}, "frobnicate"),
        (GENERATE, {"maxTokens": 1}, "maxTokens"),
        (GENERATE, {"temperature": -1}, "temperature"),
        (GENERATE, {"temperature": True}, "temperature"),
        (GENERATE, {"temperature": "NaN"}, "temperature"),
        (GENERATE, {"temperature": 10**400}, "temperature"),
        (GENERATE, {"n": 1.5}, "n"),
        (GENERATE, {"n": 2**40}, "n"),
        (GENERATE, {"stream": 1}, "stream"),
        (GENERATE, {"stop": [1]}, "stop"),
        (GENERATE, {"stop": ["a"] * 10_000}, "stop"),
        (GENERATE, {"logit_bias": [1]}, "logit_bias"),
        (GENERATE, {"prompt": 5}, "prompt"),
        (GENERATE, {"request_id": 5}, "request_id"),
        (GENERATE, {"prompt_token_ids": [-1]}, "prompt_token_ids"),
        (GENERATE, {"structured_outputs": {"choice": [[]] * 10_000}}, "structured_outputs"),
        (COMPLETIONS, {"frobnicate": 1}, "frobnicate"),
        (COMPLETIONS, {"suffix": "x"}, "suffix"),
        (COMPLETIONS, {"prompt": {}}, "prompt"),
        (COMPLETIONS, {"prompt": []}, "prompt"),
        (COMPLETIONS, {"prompt": [1, "a"]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a", 1]}, "prompt[1]"),
        (COMPLETIONS, {"prompt": [True]}, "prompt"),
        (COMPLETIONS, {"prompt": ["a"] * 1025}, "prompt"),
        (COMPLETIONS, {"prompt": [0x110000]}, "prompt[0]"),
        (COMPLETIONS, {"messages": MESSAGES}, "messages"),
        (COMPLETIONS, {"flat_logprobs": True}, "flat_logprobs"),
        (COMPLETIONS, {"stream_options": {"include_usage": True}}, "stream_options"),
        (COMPLETIONS, {"stream": True, "stream_options": {"a": 1}}, "stream_options.a"),
        (COMPLETIONS, {"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        (COMPLETIONS, {"response_format": {"type": "xml"}}, "response_format"),
        (COMPLETIONS, {"response_format": {"type": "json_schema"}}, "response_format"),
        (COMPLETIONS, {"response_format": 5}, "response_format"),
        (COMPLETIONS, {"response_format": LONG_FORMAT}, "response_format.json_schema.schema"),
        (CHAT, {"response_format": LONG_FORMAT}, "response_format.json_schema.schema"),
        (
            CHAT,
            {"structured_outputs": {"regex": "a{3000}"}, "response_format": {"type": "text"}},
            "structured_outputs.regex",
        ),
        (CHAT, {"tools": [{"type": "function"}]}, "tools"),
        (CHAT, {"audio": {}}, "audio"),
        (CHAT, {"reasoning_effort": "high"}, "reasoning_effort"),
        (CHAT, {"logprobs": 1}, "logprobs"),
        (CHAT, {"top_logprobs": 1}, "top_logprobs"),
        (CHAT, {"logprobs": True, "top_logprobs": 30}, "top_logprobs"),
        (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens"),
        (CHAT, {"max_completion_tokens": "a"}, "max_completion_tokens"),
        (CHAT, {"prompt": "a"}, "prompt"),
        (CHAT, {"messages": []}, "messages"),
        (CHAT, {"messages": "a"}, "messages"),
        (CHAT, {"messages": ["a"]}, "messages[0]"),
        (CHAT, {"messages": MESSAGES * 1025}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, "messages"),
        (CHAT, {"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        (CHAT, {"messages": [{"role": "tool", "content": "a"}]}, "messages[0].role"),
        (CHAT, {"messages": [{"role": "user", "content": "a", "tool_calls": [1]}]}, "messages[0].tool_calls"),
        (CHAT, {"messages": [{"role": "assistant", "content": "a"}]}, "messages[0].role"),
    ],
)
@module_loop
async def test_an_error_names_the_invalid_field(
    rejecting: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str
) -> None:
    response = await rejecting.post(path, json=BODIES[path] | fields)
    error = response.json()["error"]
    assert (response.status_code, error["param"], error["type"]) == (400, param, "invalid_request_error")
    assert f"`{param}" in error["message"]
    assert "google" not in error["message"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"\xff\xfe",
        b"prompt=AB",
        b"[]",
        b'"AB"',
        b"null",
        b'{"prompt": "AB", "temperature": NaN}',
        b'{"prompt": "AB", "temperature": -Infinity}',
        b'{"prompt": "AB", "temperature": 1e999}',
        b'{"prompt": "AB", "n": ' + b"1" * 5000 + b"}",
        b'{"prompt": "\\ud800"}',
        b'{"\\uDFFF": 1}',
        b"[" * 1_000_000,
        b'{"prompt":' * 100_000,
        b'{"prompt": "AB"',
        b'{"prompt": "A\nB"}',
    ],
)
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@module_loop
async def test_a_body_that_is_not_a_json_object_is_rejected(
    rejecting: httpx.AsyncClient, path: str, raw: bytes
) -> None:
    response = await rejecting.post(path, content=raw)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body must be")


MANY_VALUES = {
    "keys": b",".join(b'"k%d":1' % index for index in range(MAX_VALUES + 1)),
    "empty lists": b'"a":[' + b"[]," * MAX_VALUES + b"1]",
    "empty objects": b'"messages":[' + b"{}," * MAX_VALUES + b"1]",
    "strings": b'"stop":[' + b'"",' * MAX_VALUES + b"1]",
    "fractions": b'"a":[' + b"1.5," * MAX_VALUES + b"1]",
    "exponents": b'"a":[' + b"1e5,1E5," * MAX_VALUES + b"1]",
    "numbers": b'"prompt_token_ids":[' + b"1," * (MAX_NUMBERS + MAX_VALUES + 1) + b"1]",
    "nulls": b'"a":[' + b"null," * (MAX_NUMBERS + MAX_VALUES + 1) + b"1]",
    "nested lists": b'"a":' + b"[" * MAX_VALUES,
    "a long number": b'"n":' + b"1" * (MAX_DIGITS + 1),
    "strings that end in an escaped backslash": b'"stop":[' + rb'"\\",' * MAX_VALUES + b"1]",
}


@pytest.mark.parametrize("fields", MANY_VALUES.values(), ids=MANY_VALUES)
@module_loop
async def test_a_body_of_many_values_is_rejected_without_being_parsed(
    rejecting: httpx.AsyncClient, fields: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = b"{" + fields + b"}"
    assert len(body) < MAX_BODY
    with monkeypatch.context() as patched:
        patched.setattr("yuan_grpc.server.http.json_body.json.loads", None)
        response = await rejecting.post(GENERATE, content=body)
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith("the body must be JSON ")


async def test_a_text_may_have_any_number_of_structural_characters() -> None:
    text = '[{,.eE"\\' * 10_000
    engine = FakeEngine(last())
    body = {"prompt": text, "truncate_prompt_tokens": 20}
    assert (await post(engine, GENERATE, body)).status_code == 200
    assert "".join(map(chr, engine.requests[0].prompt)) == text[-20:]


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
async def test_token_ids_of_a_long_context_are_accepted(path: str) -> None:
    engine = FakeEngine(last())
    name = "prompt_token_ids" if path == GENERATE else "prompt"
    body = {name: [65] * 2**17, "truncate_prompt_tokens": 20}
    assert (await post(engine, path, body)).status_code == 200
    assert len(engine.requests[0].prompt) == 20


async def test_many_messages_of_several_parts_are_accepted() -> None:
    engine = FakeEngine(last())
    parts = [{"type": "text", "text": "A"}, {"type": "text", "text": "B"}]
    body = {"messages": [{"role": "user", "content": parts}] * 1024, "truncate_prompt_tokens": 20}
    assert (await post(engine, CHAT, body)).status_code == 200


@pytest.mark.parametrize("repeated", [10, 300])
@module_loop
async def test_many_unknown_fields_are_rejected_with_few_violations(
    rejecting: httpx.AsyncClient, repeated: int
) -> None:
    response = await rejecting.post(GENERATE, json={f"k{index}": 1 for index in range(repeated)})
    message = response.json()["error"]["message"]
    assert response.status_code == 400
    assert ("`k0` must not be given" in message) == (repeated == 10)
    assert ("at most 256 fields, not 300" in message) == (repeated == 300)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop", ["a"] * 65),
        ("stop_token_ids", [1] * 1025),
        ("logit_bias", {str(index): 1 for index in range(1025)}),
        ("structured_outputs", {"choice": ["a"] * 4096}),
        ("early_stopping", [1]),
        ("early_stopping", {}),
    ],
)
@module_loop
async def test_a_long_list_is_rejected_before_it_is_converted(
    rejecting: httpx.AsyncClient, field: str, value: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(values: dict[str, Any], request: pb.GenerateRequest) -> None:
        assert field not in values

    with monkeypatch.context() as patched:
        patched.setattr(json_body, "ParseDict", fail)
        response = await rejecting.post(GENERATE, json={"prompt": "A", field: value})
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


async def test_large_parameters_are_not_copied_for_each_of_many_prompts() -> None:
    body = {"prompt": ["A"] * 1024, "cache_salt": "x" * (MAX_COPIED_BYTES // 1024 + 1)}
    response = await post(FakeEngine(RuntimeError("the request reached the engine")), COMPLETIONS, body)
    assert response.status_code == 400
    assert "`prompt` must have fewer entries" in response.json()["error"]["message"]


@pytest.mark.parametrize(("path", "field"), [(GENERATE, "early_stopping"), (COMPLETIONS, "structured_outputs")])
@pytest.mark.parametrize("depth", [50, 150, 900])
@module_loop
async def test_deeply_nested_values_are_rejected(
    rejecting: httpx.AsyncClient, path: str, field: str, depth: int
) -> None:
    nested = "[" * depth + "]" * depth
    response = await rejecting.post(path, content=json.dumps(BODIES[path])[:-1] + f', "{field}": {nested}}}')
    assert response.status_code == 400


@pytest.mark.parametrize("depth", [900, 950, 980, 990, 1000])
async def test_a_deeply_nested_schema_causes_no_server_error(depth: int) -> None:
    schema = '{"a":' * depth + "1" + "}" * depth
    response_format = f'{{"type": "json_schema", "json_schema": {{"schema": {schema}}}}}'
    body = json.dumps(BODIES[CHAT])[:-1] + f', "response_format": {response_format}}}'
    assert (await post(FakeEngine(last()), CHAT, body.encode())).status_code in (200, 400)


NAMES = (
    *pb.GenerateRequest.DESCRIPTOR.fields_by_name,
    *("response_format", "stream_options", "max_completion_tokens", "top_logprobs", "tools", "return_token_ids"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, 2**64, 10**300, 0.5, -0.0, 1e300, "", "a", "5", "NaN", "never"),
    *([], [1], ["a"], [None], [[]], [{}], [True], [0.5], [[1], ["a"]], [-1], MESSAGES, [{"role": "user"}]),
    *({}, {"a": 1}, {"1": 2}, {"1": "a"}, {"ids": [1]}, {"json": 5}, {"choice": ["a"]}, {"choice": 5}, {"": {}}),
    *({"regex": "("}, {"type": "text"}, {"type": 5}, {"include_usage": True}, {"type": "json_schema"}, "\0", "😀" * 9),
)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_no_random_body_causes_a_server_error(path: str) -> None:
    generator = random.Random(0)
    async with serve_http_client(FakeEngine(last("yes"))) as client:
        for _ in range(600):
            body = BODIES[path] | {
                generator.choice(NAMES): generator.choice(VALUES) for _ in range(generator.randint(1, 3))
            }
            response = await client.post(path, json=body)
            assert response.status_code in (200, 400, 404), (body, response.text)


async def test_a_body_is_limited_to_the_size_of_a_grpc_message() -> None:
    async with serve_http_client(FakeEngine(last())) as client:
        large = json.dumps({"prompt": "A" * (MAX_BODY - 14)}).encode()
        assert len(large) == MAX_BODY
        assert (await client.post(GENERATE, content=large)).status_code == 400  # exceeds the model's context
        response = await client.post(GENERATE, content=large + b" ")
        assert response.status_code == 413
        assert response.json()["error"]["message"] == f"the body must be at most {MAX_BODY} bytes long"

        async def chunks() -> Any:
            yield large
            yield b" "

        assert (await client.post(GENERATE, content=chunks())).status_code == 413
        assert (await client.post(GENERATE, json={"prompt": "A"})).status_code == 200


async def test_errors_have_openais_format_and_an_http_status() -> None:
    response = await post(
        FakeEngine(OverloadedError("the request queue is full (limit 4)")), COMPLETIONS, BODIES[COMPLETIONS]
    )
    assert (response.status_code, response.headers["retry-after"]) == (429, "1")
    assert response.json() == {
        "error": {
            "message": "the request queue is full (limit 4)",
            "type": "rate_limit_error",
            "param": None,
            "code": "overloaded",
            "request_id": response.headers["x-request-id"],
        }
    }


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_an_unknown_model_is_not_found(path: str) -> None:
    response = await post(FakeEngine(last()), path, BODIES[path] | {"model": "unknown"})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_the_served_model_can_be_named_by_an_alias(path: str) -> None:
    response = await post(FakeEngine(last()), path, BODIES[path] | {"model": "/models/fake"}, aliases=["/models/fake"])
    assert (response.status_code, response.json()["model"]) == (200, "/models/fake")


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_engine_that_is_not_ready_is_unavailable(path: str, stream: bool) -> None:
    response = await post(FakeEngine(is_ready=False), path, BODIES[path] | {"stream": stream})
    assert (response.status_code, response.headers["retry-after"]) == (503, "1")
    assert response.json()["error"]["type"] == "server_error"


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
@pytest.mark.parametrize("stream", [False, True])
async def test_an_internal_error_is_logged_but_not_reported_to_the_client(
    path: str, stream: bool, caplog: pytest.LogCaptureFixture
) -> None:
    response = await post(FakeEngine(RuntimeError("secret")), path, BODIES[path] | {"stream": stream})
    assert response.status_code == 500
    assert response.json()["error"] == {
        "message": INTERNAL_MESSAGE,
        "type": "server_error",
        "param": None,
        "code": "internal",
        "request_id": response.headers["x-request-id"],
    }
    assert response.headers["x-request-id"] in caplog.text
    assert "secret" in caplog.text


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_an_error_during_a_stream_is_its_last_event(path: str) -> None:
    engine = FakeEngine(more("a"), OverloadedError("overloaded"))
    response = await post(engine, path, BODIES[path] | {"stream": True})
    assert response.status_code == 200
    assert parse_events(response.content)[-1]["error"]["message"] == "overloaded"


async def test_an_error_during_a_stream_of_generate_is_its_last_chunk() -> None:
    response = await post(
        FakeEngine(more("a"), OverloadedError("overloaded")), GENERATE, {"prompt": "A", "stream": True}
    )
    first, second, _ = response.content.split(b"\0")
    assert json.loads(first) == {"text": ["Aa"]}
    assert json.loads(second)["error"]["code"] == "overloaded"


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
async def test_the_request_id_of_another_call_is_not_a_conflict(path: str) -> None:
    engine = FakeEngine(more("a"), hangs=True)
    body = {"prompt": "AB", "request_id": "mine", "stream": True}
    async with (
        serve_http_client(engine) as client,
        client.stream("POST", path, json=body) as first,
        client.stream("POST", path, json=body) as second,
    ):
        assert (first.status_code, second.status_code) == (200, 200)
        assert engine.running == 2


async def test_health_follows_the_engine_for_get_and_head() -> None:
    engine = FakeEngine(is_ready=False)
    async with serve_http_client(engine) as client:
        assert (await client.get("/health")).status_code == 503
        engine.is_ready = True
        assert (await client.get("/health")).status_code == 200
        assert (await client.head("/health")).status_code == 200


async def test_models_are_the_served_model_and_the_loaded_adapters() -> None:
    engine = FakeEngine()
    engine.loras = ["style"]
    async with serve_http_client(engine, ["/models/fake"]) as client:
        models = (await client.get("/v1/models")).json()
        model = (await client.get("/v1/models/fake")).json()
        missing = await client.get("/v1/models/unknown")
    assert models["object"] == "list"
    assert [(entry["id"], entry["max_model_len"], entry["parent"]) for entry in models["data"]] == [
        ("fake", 64, None),
        ("style", 64, "fake"),
    ]
    assert model == models["data"][0]
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")


async def test_the_folder_of_the_model_is_no_name_of_it() -> None:
    async with serve_http_client(FakeEngine(), ["/models/fake"]) as client:
        responses = [await client.get(f"/v1/models/{name}") for name in ("/models/fake", "/models/other")]
    contents = [response.json()["error"] | {"request_id": ""} for response in responses]
    assert [response.status_code for response in responses] == [404, 404]
    assert contents[0]["message"].replace("/models/fake", "/models/other") == contents[1]["message"]


async def test_models_are_unavailable_until_the_engine_is_ready() -> None:
    async with serve_http_client(FakeEngine(is_ready=False)) as client:
        assert (await client.get("/v1/models")).status_code == 503


async def test_metrics_describe_the_load_and_not_the_machine() -> None:
    gauges = [Gauge(name, "", ["secret"]) for name in ("vllm:fake_requests", "vllm:cache_fake_info", "other_fake")]
    try:
        for gauge in gauges:
            gauge.labels(secret=f"label of {gauge._name}").set(1)
        async with serve_http_client(FakeEngine()) as client:
            response = await client.get("/metrics")
    finally:
        for gauge in gauges:
            REGISTRY.unregister(gauge)
    assert response.headers["content-type"].startswith("text/plain")
    assert "process_open_fds" in response.text
    assert 'vllm:fake_requests{secret="label of vllm:fake_requests"} 1.0' in response.text
    for absent in ("cache_fake", "other_fake", "python_info"):
        assert absent not in response.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", GENERATE, 405),
        ("PUT", COMPLETIONS, 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
        ("OPTIONS", CHAT, 405),
        ("GET", "/", 404),
        ("POST", "/generate/x", 404),
        ("POST", "/v1/embeddings", 404),
        ("GET", "/../etc/passwd", 404),
        ("GET", "/%ff%00", 404),
    ],
)
@module_loop
async def test_unknown_paths_and_methods_are_rejected(
    rejecting: httpx.AsyncClient, method: str, path: str, status: int
) -> None:
    response = await rejecting.request(method, path)
    assert (response.status_code, response.json()["error"]["type"]) == (status, "invalid_request_error")
    assert ("allow" in response.headers) == (status == 405)
    assert "server" not in response.headers


async def test_every_call_is_logged_in_one_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "yuan_grpc"):
        async with serve_http_client(FakeEngine(last())) as client:
            await client.post(GENERATE, json={"prompt": "AB", "request_id": "good"})
            await client.post(COMPLETIONS, json={"prompt": "", "request_id": "bad"})
    lines = [record.message.partition(" after ")[0] for record in caplog.records]
    assert lines == ["POST /generate 'good': OK", "POST /v1/completions 'bad': INVALID_ARGUMENT (prompt)"]
    assert [record.message.rpartition(", peer ")[2].split(":")[0] for record in caplog.records] == ["http", "http"]
    assert ", model fake, 2 tokens in, 1 out" in caplog.messages[0]


async def test_a_request_id_that_is_not_ascii_is_not_sent_as_a_header() -> None:
    response = await post(FakeEngine(last()), GENERATE, {"prompt": "AB", "request_id": "名字"})
    assert response.status_code == 200
    assert "x-request-id" not in response.headers


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", GENERATE, b"[]"),
        ("POST", CHAT, b"{}"),
        ("POST", COMPLETIONS, b'{"prompt": "A", "n": -1}'),
        ("GET", GENERATE, b""),
        ("GET", "/v1/models/unknown", b""),
        ("GET", "/unknown", b""),
    ],
)
@module_loop
async def test_an_error_has_the_id_of_its_request(
    rejecting: httpx.AsyncClient, method: str, path: str, body: bytes
) -> None:
    response = await rejecting.request(method, path, content=body)
    assert response.is_client_error
    assert len(response.headers["x-request-id"]) == 32
    assert response.json()["error"]["request_id"] == response.headers["x-request-id"]


async def test_an_error_during_a_stream_has_the_id_of_its_request() -> None:
    engine = FakeEngine(more("a"), OverloadedError("overloaded"))
    response = await post(engine, COMPLETIONS, {"prompt": "A", "stream": True, "request_id": "mine"})
    assert parse_events(response.content)[-1]["error"]["request_id"] == "mine"


async def test_a_too_long_request_id_is_truncated_in_the_header() -> None:
    response = await post(FakeEngine(last()), GENERATE, {"prompt": "AB", "request_id": "x" * 20_000})
    assert response.status_code == 400
    assert response.headers["x-request-id"] == "x" * 256
