"""Requests that widely used clients send with their default settings, recorded from these clients."""

import asyncio
import gzip
import json
import logging
import zlib
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest
from fake_engine import INFO, FakeEngine, last, more
from servers import parse_events, post, serve_http, serve_http_client

from yuan_grpc import __version__
from yuan_grpc.server.engine.types import EngineRequest, StepOutput
from yuan_grpc.server.errors import OverloadedError
from yuan_grpc.server.http.call import MAX_BODY, MAX_HEADER_ID
from yuan_grpc.server.http.tokenization import INLINE_TOKENS
from yuan_grpc.server.settings import HttpSettings

GENERATE, COMPLETIONS, CHAT = "/generate", "/v1/completions", "/v1/chat/completions"
USER = {"role": "user", "content": "A"}
TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def prompt_of(engine: FakeEngine) -> str:
    """Return the prompt of the only request."""
    [request] = engine.requests
    return "".join(map(chr, request.prompt))


async def test_the_tokenizer_is_found_by_lm_eval() -> None:
    """`tokenizer_backend` auto and remote of lm-eval 0.4.13 send these requests."""
    async with serve_http_client(FakeEngine()) as client:
        info = (await client.get("/tokenizer_info")).json()
        tokens = await client.post("/tokenize", json={"prompt": "test", "add_special_tokens": False})
        text = await client.post("/detokenize", json={"tokens": [116, 101]})
        empty = await client.post("/tokenize", json={"prompt": "", "add_special_tokens": False})
    assert (info["eos_token"], info["model_max_length"]) == ("\0", INFO.max_model_len)
    assert tokens.json() == {"count": 4, "max_model_len": 64, "tokens": [116, 101, 115, 116], "token_strs": None}
    assert text.json() == {"prompt": "te"}
    assert empty.json()["tokens"] == []


@pytest.mark.parametrize("length", [INLINE_TOKENS, INLINE_TOKENS + 1])
async def test_a_long_text_is_tokenized(length: int) -> None:
    response = await post(FakeEngine(), "/tokenize", {"prompt": "世" * length, "return_token_strs": True})
    assert response.headers["content-type"] == "application/json"
    content = response.json()
    assert content["tokens"] == [ord("世")] * content["count"] == [ord("世")] * length
    assert content["token_strs"] == ["世"] * length


@pytest.mark.timeout(60)
async def test_a_long_request_id_in_a_header_has_space_for_the_prompts() -> None:
    async with serve_http_client(FakeEngine(last())) as client:
        for length in (MAX_HEADER_ID, MAX_HEADER_ID + 1):
            headers = {"x-request-id": "a" * length}
            response = await client.post(COMPLETIONS, json={"prompt": ["A"] * 1024}, headers=headers)
            assert response.status_code == 200
            assert len(response.headers["x-request-id"]) == (length if length == MAX_HEADER_ID else 32)


async def test_tokenize_accepts_vllms_fields() -> None:
    async with serve_http_client(FakeEngine(), ["/models/fake"]) as client:
        body = {"model": "/models/fake/", "messages": [USER], "return_token_strs": True, "add_generation_prompt": True}
        chat = (await client.post("/tokenize", json=body)).json()
        continued = [USER, {"role": "assistant", "content": "B"}]
        body = {"messages": continued, "continue_final_message": True, "add_generation_prompt": False}
        answer = (await client.post("/tokenize", json=body)).json()
    assert chat["token_strs"] == ["A", ">"]
    assert "".join(map(chr, answer["tokens"])) == "A>B"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {"prompt": "a", "chat_template": "x"}, "chat_template"),
        ("/tokenize", {"prompt": ["a"]}, "prompt"),
        ("/tokenize", {"model": "other", "prompt": "a"}, "model"),
        ("/tokenize", {"prompt": "a" * (2**17 + 1)}, "prompt"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [0x110000]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens"),
    ],
)
async def test_invalid_requests_for_tokens_name_the_field(path: str, body: dict[str, Any], param: str) -> None:
    response = await post(FakeEngine(), path, body)
    assert response.status_code == (404 if param == "model" else 400)
    assert response.json()["error"]["param"] == param


async def test_tokens_are_unavailable_until_the_engine_is_ready() -> None:
    async with serve_http_client(FakeEngine(is_ready=False)) as client:
        assert (await client.get("/tokenizer_info")).status_code == 503
        assert (await client.post("/tokenize", json={"prompt": "a"})).status_code == 503


async def test_the_root_of_a_model_is_its_folder() -> None:
    """`vllm bench serve` loads the tokenizer from there."""
    engine = FakeEngine()
    engine.loras = ["style"]
    async with serve_http_client(engine) as client:
        served, adapter = (await client.get("/v1/models")).json()["data"]
    assert (served["id"], served["root"], served["parent"]) == ("fake", "/models/fake", None)
    assert (adapter["id"], adapter["root"], adapter["parent"]) == ("style", "style", "fake")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
async def test_guidellm_gets_the_usage_in_each_chunk(path: str) -> None:
    """guidellm 0.8 sends these stream options, and aiperf with `--per-chunk-usage`."""
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"stream": True, "stream_options": options, "prompt": "AB", "messages": [USER]}
    body.pop("messages" if path == COMPLETIONS else "prompt")
    response = await post(FakeEngine(more("a"), more("bc"), last("d")), path, body)
    *chunks, usage, done = parse_events(response.content)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks if chunk["choices"][0].get("text", "x")]
    assert counts[-3:] == [1, 3, 4]
    assert {chunk["usage"]["prompt_tokens"] for chunk in chunks} == {2}
    assert (usage["usage"], usage["choices"], done) == (chunks[-1]["usage"], [], "[DONE]")


async def test_empty_turns_are_skipped() -> None:
    engine = FakeEngine(last())
    messages = [
        {"role": "system", "content": ""},
        USER,
        {"role": "assistant", "content": None},
        {"role": "assistant", "content": []},
        {"role": "user", "content": "B"},
    ]
    assert (await post(engine, CHAT, {"messages": messages})).status_code == 200
    assert prompt_of(engine) == "A|B>"


@pytest.mark.parametrize("content", ["yes", " yes"])
async def test_the_last_assistant_turn_is_continued(content: str) -> None:
    engine = FakeEngine(last())
    messages = [USER, {"role": "assistant", "content": content}]
    fields = {"continue_final_message": True, "add_generation_prompt": False}
    assert (await post(engine, CHAT, {"messages": messages, **fields})).status_code == 200
    assert prompt_of(engine) == "A>yes"


@pytest.mark.parametrize(
    ("messages", "fields", "param"),
    [
        ([USER], {"continue_final_message": True}, "continue_final_message"),
        ([USER], {"add_generation_prompt": False}, "add_generation_prompt"),
        (
            [USER, {"role": "assistant", "content": "B"}],
            {"continue_final_message": True, "add_generation_prompt": True},
            "add_generation_prompt",
        ),
        ([{"role": "assistant", "content": "B"}], {"continue_final_message": True}, "messages"),
        ([USER, {"role": "assistant", "content": "B"}], {}, "messages[1].role"),
        ([{"role": "system", "content": ""}], {}, "messages"),
    ],
)
async def test_a_conversation_without_a_next_turn_is_rejected(
    messages: list[Any], fields: dict[str, Any], param: str
) -> None:
    response = await post(FakeEngine(last()), CHAT, {"messages": messages, **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.mark.parametrize(
    "fields",
    [
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"verbosity": "low"},
        {"reasoning_effort": "none"},
        {"seed": -1},
        {"tools": [TOOL], "tool_choice": "none"},
        {"mm_processor_kwargs": {}},
    ],
    ids=str,
)
async def test_fields_that_change_nothing_are_accepted(fields: dict[str, Any]) -> None:
    engine = FakeEngine(last())
    response = await post(engine, CHAT, {"messages": [USER], "temperature": 0.5, **fields})
    assert response.status_code == 200
    seed = engine.requests[0].sampling.seed
    assert seed is not None
    assert seed >= 0  # the server has drawn one


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"guided_json": {"type": "object"}}, "guided_json"),
        ({"guided_regex": "a"}, "guided_regex"),
        ({"tools": [TOOL]}, "tools"),
        ({"tools": [TOOL], "tool_choice": "auto"}, "tools"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
        ({"seed": -2}, "seed"),
        ({"temprature": 1}, "temprature"),
    ],
    ids=str,
)
async def test_fields_that_would_change_the_answer_are_refused_by_name(fields: dict[str, Any], param: str) -> None:
    response = await post(FakeEngine(last()), CHAT, {"messages": [USER], **fields})
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


async def test_a_schema_in_response_format_constrains_the_text() -> None:
    """The schema modes of instructor and LangChain send this, with the schema of a pydantic model."""
    engine = FakeEngine(last("{}"))
    schema = {"properties": {"name": {"title": "Name", "type": "string"}}, "required": ["name"], "type": "object"}
    format_ = {"type": "json_schema", "json_schema": {"name": "User", "schema": schema, "strict": True}}
    assert (await post(engine, CHAT, {"messages": [USER], "response_format": format_})).status_code == 200
    constraint = engine.requests[0].sampling.structured_outputs
    assert constraint is not None
    assert (constraint.kind, json.loads(str(constraint.specification))) == ("json", schema)


@pytest.mark.parametrize("schema", [{"pattern": "a{9999}"}, {"title": "a" * 40_000}])
async def test_an_error_in_a_schema_names_response_format(schema: dict[str, Any]) -> None:
    format_ = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    response = await post(FakeEngine(last()), CHAT, {"messages": [USER], "response_format": format_})
    error = response.json()["error"]
    assert (response.status_code, error["param"].split(".")[0]) == (400, "response_format")
    assert "structured_outputs" not in error["message"]


@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS, CHAT])
async def test_the_request_id_of_the_header_is_the_id_of_the_call(path: str, caplog: pytest.LogCaptureFixture) -> None:
    body = {"messages": [USER]} if path == CHAT else {"prompt": "AB"}
    engine = FakeEngine(last())
    with caplog.at_level(logging.INFO, "yuan_grpc"):
        async with serve_http_client(engine) as client:
            headers = {"X-Request-Id": "from-proxy", "traceparent": TRACE, "tracestate": "a=b"}
            response = await client.post(path, json=body, headers=headers)
            own = await client.post(path, json=body | {"request_id": "mine"}, headers=headers)
            unusable = [[(b"x-request-id", value)] for value in (b"a" * 257, b"\x80", b"")]
            others = [await client.post(path, json=body, headers=header) for header in unusable]
    assert response.headers["x-request-id"] == "from-proxy"
    assert own.headers["x-request-id"] == "mine"
    assert all(len(other.headers["x-request-id"]) == 32 for other in others)
    assert "'from-proxy': OK after" in caplog.messages[0]
    first = engine.requests[0]
    assert first.request_id.startswith("from-proxy-")
    assert first.trace_headers == {"traceparent": TRACE, "tracestate": "a=b"}


@pytest.mark.parametrize("alias", ["/models/yuan2B", "/models/yuan2B/"])
@pytest.mark.parametrize("path", [GENERATE, COMPLETIONS])
async def test_the_folder_of_the_model_is_accepted_with_and_without_a_slash(alias: str, path: str) -> None:
    for name in ("/models/yuan2B", "/models/yuan2B/"):
        assert (await post(FakeEngine(last()), path, {"model": name, "prompt": "A"}, [alias])).status_code == 200


class SmallQueueEngine(FakeEngine):
    """An engine with a queue of three choices, which it fills completely before it answers any of them."""

    def __init__(self, others: int = 0) -> None:
        super().__init__()
        self.info = replace(INFO, max_num_queued_reqs=3)
        self.others = others
        self.most = 0

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        if self.running + self.others >= 3:
            self.others = 0
            raise OverloadedError("the request queue is full (limit 3)")
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            yield StepOutput()
            for _ in range(3):
                await asyncio.sleep(0)
            yield last(chr(request.prompt[0]).lower())
        finally:
            self.running -= 1


@pytest.mark.parametrize("others", [0, 1], ids=["idle server", "server with another request"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_batch_larger_than_the_queue_is_fed_through_it(stream: bool, others: int) -> None:
    engine, prompts = SmallQueueEngine(others), [chr(ord("A") + index) for index in range(20)]
    response = await post(engine, COMPLETIONS, {"prompt": prompts, "stream": stream})
    assert response.status_code == 200
    if stream:
        choices = [chunk["choices"][0] for chunk in parse_events(response.content)[:-1]]
    else:
        choices = response.json()["choices"]
    texts = {choice["index"]: choice["text"] for choice in choices}
    assert [texts[index] for index in range(20)] == [prompt.lower() for prompt in prompts]
    assert engine.most == 3 or others  # a request that waits for its next attempt keeps its permit


async def test_a_batch_is_refused_if_the_queue_is_full_of_others() -> None:
    response = await post(SmallQueueEngine(others=3), COMPLETIONS, {"prompt": ["A", "B"]})
    assert response.status_code == 429


async def test_an_error_says_which_prompt_it_is_about() -> None:
    response = await post(FakeEngine(last()), COMPLETIONS, {"prompt": ["A", [66], [0x110000]]})
    error = response.json()["error"]
    assert error["param"] == "prompt[2][0]"
    assert error["message"].startswith("`prompt[2][0]` must be below ")


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/tokenize"])
async def test_a_slash_at_the_end_of_a_path_is_ignored(path: str) -> None:
    body = {"messages": [USER]} if path == CHAT else {"prompt": "AB"}
    assert (await post(FakeEngine(last()), f"{path}/", body)).status_code == 200
    async with serve_http_client(FakeEngine()) as client:
        assert (await client.get("/v1/models/")).json()["object"] == "list"
        assert (await client.get("/v1/models/fake/")).json()["id"] == "fake"


async def test_operators_find_health_version_and_routes() -> None:
    async with serve_http_client(FakeEngine()) as client:
        assert (await client.get("/ping")).status_code == 200
        assert (await client.post("/ping")).status_code == 200
        assert (await client.get("/version")).json() == {"version": __version__}
        routes = (await client.get("/docs")).text
    for path in (GENERATE, COMPLETIONS, CHAT, "/tokenize", "/health", "/metrics"):
        assert f" {path}\n" in routes


async def test_health_is_unavailable_on_new_connections_while_calls_finish() -> None:
    engine = FakeEngine(more("a"), hangs=True)
    async with serve_http(engine) as listener:
        listener.start_draining()
        async with serve_http_client(FakeEngine()) as other:
            url = f"http://127.0.0.1:{listener.port}"
            assert (await other.get(f"{url}/health")).status_code == 503
            assert (await other.get(f"{url}/ping")).status_code == 503
            refused = await other.post(f"{url}/generate", json={"prompt": "A"})
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, "the server is stopping")
    assert "retry-after" in refused.headers


async def test_an_allowed_origin_may_read_the_request_id() -> None:
    settings = HttpSettings(allowed_origins=("https://app.example",))
    async with serve_http(FakeEngine(last()), settings=settings) as listener, serve_http_client(FakeEngine()) as client:
        url, headers = f"http://127.0.0.1:{listener.port}{COMPLETIONS}", {"origin": "https://app.example"}
        response = await client.post(url, json={"prompt": "A"}, headers=headers)
    assert response.headers["access-control-allow-origin"] == "https://app.example"
    assert "x-request-id" in response.headers["access-control-expose-headers"]


BODY = json.dumps({"prompt": "AB"}).encode()


@pytest.mark.parametrize(
    ("encoding", "content"),
    [
        ("gzip", gzip.compress(BODY)),
        ("GZIP", gzip.compress(BODY)),
        ("deflate", zlib.compress(BODY)),
        ("identity", BODY),
    ],
    ids=["gzip", "upper case", "deflate", "identity"],
)
async def test_a_body_may_be_compressed(encoding: str, content: bytes) -> None:
    engine = FakeEngine(last("yes"))
    async with serve_http_client(engine) as client:
        response = await client.post(GENERATE, content=content, headers={"content-encoding": encoding})
    assert response.json() == {"text": ["AByes"]}


@pytest.mark.parametrize(
    ("encoding", "content", "status", "message"),
    [
        ("br", BODY, 415, "`Content-Encoding` must be absent, gzip or deflate, not br"),
        ("gzip, gzip", BODY, 415, "`Content-Encoding` must be absent, gzip or deflate, not gzip, gzip"),
        ("gzip", BODY, 400, "the body must be complete and encoded as `Content-Encoding` says: gzip"),
        ("gzip", gzip.compress(BODY)[:-4], 400, "the body must be complete and encoded as"),
        ("gzip", gzip.compress(BODY) * 2, 400, "the body must be complete and encoded as"),
        ("gzip", MAX_BODY + 1, 413, f"the body must be at most {MAX_BODY} bytes long"),
        ("gzip", 2**28, 413, f"the body must be at most {MAX_BODY} bytes long"),
    ],
    ids=["unknown", "twice", "plain", "incomplete", "two members", "large", "bomb"],
)
async def test_other_encodings_and_large_results_are_refused(
    encoding: str, content: bytes | int, status: int, message: str
) -> None:
    """An integer is a number of spaces, which are compressed."""
    raw = content if isinstance(content, bytes) else gzip.compress(b" " * content, compresslevel=1)
    async with serve_http_client(FakeEngine()) as client:
        response = await client.post(GENERATE, content=raw, headers={"content-encoding": encoding})
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(message)


USAGE_OPTIONS = {"include_usage": True, "continuous_usage_stats": True}
SCHEMA = {"properties": {"ok": {"title": "Ok", "type": "boolean"}}, "required": ["ok"], "title": "P", "type": "object"}
RECORDED: dict[str, tuple[str, dict[str, Any]]] = {
    "lm-eval 0.4.13, score": (
        COMPLETIONS,
        {
            **{"model": "fake", "prompt": [[65, 66, 67], [68, 69]], "temperature": 0, "max_tokens": 1, "logprobs": 1},
            **{"seed": 1234, "echo": True},
        },
    ),
    "lm-eval 0.4.13, generate": (
        COMPLETIONS,
        {
            **{"prompt": [[65, 66]], "model": "fake", "max_tokens": 8, "temperature": 0, "stop": ["\n", "\0"]},
            "seed": 1234,
        },
    ),
    "lm-eval 0.4.13, chat": (
        CHAT,
        {
            **{"messages": [USER], "model": "fake", "max_tokens": 8, "temperature": 0, "stop": ["\n"], "seed": 1234},
        },
    ),
    "guidellm 0.8.1, completions": (
        COMPLETIONS,
        {"model": "fake", "stream": True, "stream_options": USAGE_OPTIONS, "prompt": "A\n"},
    ),
    "guidellm 0.8.1, chat of fixed length": (
        CHAT,
        {
            **{"model": "fake", "stream": True, "stream_options": USAGE_OPTIONS, "ignore_eos": True, "stop": None},
            **{"max_completion_tokens": 8, "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}]},
        },
    ),
    "vllm bench 0.32, completions": (
        COMPLETIONS,
        {
            **{"model": "fake", "prompt": "A", "max_tokens": 8, "stream": True, "ignore_eos": True, "logprobs": None},
            **{"repetition_penalty": 1.0, "stream_options": {"include_usage": True}, "temperature": 0.0},
        },
    ),
    "vllm bench 0.32, chat": (
        CHAT,
        {
            "model": "fake",
            "messages": [{"role": "user", "content": [{"type": "text", "text": "A"}]}],
            **{"max_completion_tokens": 8, "stream": True, "stream_options": {"include_usage": True}},
        },
    ),
    "aiperf 0.13, chat": (
        CHAT,
        {"messages": [USER | {"name": "user"}], "model": "fake", "stream": True, "stream_options": USAGE_OPTIONS},
    ),
    "instructor 1.17, JSON_SCHEMA": (
        CHAT,
        {
            **{"messages": [USER], "model": "fake", "max_tokens": 60, "temperature": 0},
            "response_format": {"type": "json_schema", "json_schema": {"name": "P", "schema": SCHEMA}},
        },
    ),
    "instructor 1.17, JSON": (
        CHAT,
        {"messages": [USER], "model": "fake", "max_tokens": 60, "response_format": {"type": "json_object"}},
    ),
    "langchain-openai 1.7, structured output": (
        CHAT,
        {
            **{"messages": [USER], "model": "fake", "max_completion_tokens": 30, "stream": False},
            "response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA, "name": "P", "strict": True}},
        },
    ),
    "langchain-openai 1.7, completions": (
        COMPLETIONS,
        {
            **{"model": "fake", "prompt": ["A", "B"], "frequency_penalty": 0, "max_tokens": 8, "n": 1},
            **{"presence_penalty": 0, "temperature": 0.7, "top_p": 1},
        },
    ),
    "LlamaIndex 0.14, chat": (
        CHAT,
        {"messages": [USER], "model": "fake", "max_tokens": 8, "stream": True, "temperature": 0.1},
    ),
    "LiteLLM 1.110, hosted_vllm": (CHAT, {"model": "fake", "messages": [USER], "max_tokens": 8}),
}
"""Requests by the client that sent them."""


@pytest.mark.parametrize("client", RECORDED)
async def test_a_recorded_request_is_served(client: str) -> None:
    path, body = RECORDED[client]
    response = await post(FakeEngine(last("{}")), path, body)
    assert response.status_code == 200
    if body.get("stream"):
        assert parse_events(response.content)[-1] == "[DONE]"
    else:
        assert len(response.json()["choices"]) == (len(body["prompt"]) if path == COMPLETIONS else 1)


async def test_tool_modes_are_refused_by_name() -> None:
    """The default mode of instructor sends this."""
    choice = {"type": "function", "function": {"name": "f"}}
    response = await post(FakeEngine(last()), CHAT, {"messages": [USER], "tools": [TOOL], "tool_choice": choice})
    assert (response.status_code, response.json()["error"]["param"]) == (400, "tools")
