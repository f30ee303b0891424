"""The HTTP API on the real engine, called by the original client script, curl and the `openai` package."""

import asyncio
import json
import re
import shlex
import shutil
import socket
from collections.abc import AsyncIterator
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from engine.conftest import Served
from servers import connect_socket, encode_post, http_client, parse_events, serve_http

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session"), pytest.mark.timeout(120)]

DOCS = Path(__file__).parents[2] / "docs"
DOCUMENT = DOCS / "reference" / "http.md"
PROMPT = "世界上最高的山是什么"
ORIGINAL_BODY = {
    "prompt": PROMPT,
    "logprobs": 1,
    "max_tokens": 32,
    "temperature": 1,
    "use_beam_search": False,
    "top_p": 0,
    "top_k": 1,
    "stop": "<eod>",
}
MESSAGES: Any = [
    {"role": "user", "content": "世界上最高的山是什么"},
    {"role": "assistant", "content": "珠穆朗玛峰"},
    {"role": "user", "content": "它有多高"},
]
ENDLESS = {"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True}


@pytest_asyncio.fixture(scope="session", loop_scope="session")
async def port(session_server: Served) -> AsyncIterator[int]:
    """The HTTP port of the session's engine."""
    async with serve_http(session_server.engine, ["/mnt/models/yuan2B", "yuan2B"]) as listener:
        yield listener.port


@pytest_asyncio.fixture(loop_scope="session")
async def client(port: int) -> AsyncIterator[openai.AsyncOpenAI]:
    """OpenAI's client, without retries."""
    address, direct = f"http://127.0.0.1:{port}/v1", openai.DefaultAsyncHttpxClient(trust_env=False, verify=False)
    async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0, http_client=direct) as client:
        yield client


def code_blocks(indent: str) -> list[str]:
    """Return the indented code blocks of the documentation."""
    return re.findall(rf"(?:^{indent}.*\n)+", DOCUMENT.read_text("utf-8"), re.MULTILINE)


async def greedy_text(served: Served, **fields: Any) -> str:
    """Return the text of a greedy choice over gRPC."""
    request = pb.GenerateRequest(top_k=1, **fields)
    return (await served.generate(request)).choices[0].text


async def test_the_original_script_gets_the_text_of_grpc(served: Served, port: int) -> None:
    def run_script() -> Any:
        connection = HTTPConnection("localhost", port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/generate", json.dumps(ORIGINAL_BODY), headers)
        text = json.loads(connection.getresponse().read())["text"][0]
        connection.close()
        return text

    expected = await greedy_text(served, prompt=PROMPT, max_tokens=32, stop=["<eod>"])
    assert await asyncio.to_thread(run_script) == PROMPT + expected


@pytest.mark.parametrize("headers", [(), ("-H", "Content-Type: application/json")])
@pytest.mark.parametrize("stream", [False, True])
async def test_the_original_curl_commands_work(port: int, headers: tuple[str, ...], stream: bool) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    body = json.dumps(ORIGINAL_BODY | {"stream": stream}, ensure_ascii=False)
    command = ["curl", "-sS", "--noproxy", "*", f"http://localhost:{port}/generate", *headers, "-d", body]
    curl = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    output, _ = await curl.communicate()
    assert curl.returncode == 0
    chunks = [json.loads(chunk)["text"][0] for chunk in output.rstrip(b"\0").split(b"\0")]
    assert all(later.startswith(earlier) for earlier, later in zip([PROMPT, *chunks], chunks, strict=False))
    assert (len(chunks) > 1) == stream


async def test_the_documented_curl_command_of_completions_works(served: Served, port: int) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    command = shlex.split(next(block for block in code_blocks("    ") if "/v1/completions" in block))
    command = [word.replace(":8000", f":{port}").replace('"max_tokens": 256', '"max_tokens": 32') for word in command]
    curl = await asyncio.create_subprocess_exec(*command, "-sS", "--noproxy", "*", stdout=asyncio.subprocess.PIPE)
    output, _ = await curl.communicate()
    expected = await greedy_text(served, prompt=PROMPT, max_tokens=32, stop=["<eod>"])
    assert json.loads(output)["choices"][0]["text"] == expected


def documented_curls() -> list[Any]:
    """Return the curl commands of the guides, with the pages as ids."""
    found = []
    for page in ("quickstart.md", "call/curl.md", "migrate.md"):
        blocks = re.findall(r"^```sh\n(curl .*?)^```", (DOCS / page).read_text("utf-8"), re.MULTILINE | re.DOTALL)
        plain = [block for block in blocks if "http://localhost:8000" in block]
        found += [pytest.param(block, id=f"{page}-{number}") for number, block in enumerate(plain)]
    return found


@pytest.mark.parametrize("block", documented_curls())
async def test_the_curl_commands_of_the_guides_work(port: int, block: str) -> None:
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    short = re.sub(r'"max_tokens": \d+', '"max_tokens": 8', block.replace(":8000", f":{port}"))
    command = shlex.split(short.replace("/models/yuan2B/", "/mnt/models/yuan2B/"))
    curl = await asyncio.create_subprocess_exec(*command, "-sS", "--noproxy", "*", stdout=asyncio.subprocess.PIPE)
    output, _ = await curl.communicate()
    if '"stream": true' in block:
        assert output.decode().rstrip().endswith("data: [DONE]")
    else:
        assert ("error" in json.loads(output)) == ('"temperature": 3' in block), output


async def test_the_documented_python_works(
    served: Served, port: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("NO_PROXY", "*")
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    await asyncio.to_thread(exec, code.replace(":8000", f":{port}"), names)
    names["client"].close()
    request = pb.GenerateRequest(messages=[pb.Message(role="user", content=PROMPT)], max_tokens=32, top_k=1)
    assert capsys.readouterr().out == f"{(await served.generate(request)).choices[0].text}\n"


async def test_completions_have_the_text_of_grpc(served: Served, client: openai.AsyncOpenAI) -> None:
    expected = await greedy_text(served, prompt=PROMPT, max_tokens=24)
    for model in ("yuan-demo", "/mnt/models/yuan2B"):
        response = await client.completions.create(model=model, prompt=PROMPT, max_tokens=24, temperature=0)
        assert (response.model, response.choices[0].text) == (model, expected)
    assert response.usage is not None
    assert response.usage.completion_tokens == 24
    assert response._request_id == response.id.removeprefix("cmpl-")
    stream = await client.completions.create(
        model="yuan-demo",
        prompt=PROMPT,
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    *chunks, last = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks) == expected
    assert chunks[-1].choices[0].finish_reason == "length"
    assert last.usage == response.usage


async def test_chat_has_the_text_of_grpc(served: Served, client: openai.AsyncOpenAI) -> None:
    messages = [pb.Message(**turn) for turn in MESSAGES]
    expected = await greedy_text(served, messages=messages, max_tokens=24)
    fields: Any = {"model": "yuan-demo", "messages": MESSAGES, "max_completion_tokens": 24, "extra_body": {"top_k": 1}}
    response = await client.chat.completions.create(**fields)
    assert response.choices[0].message.content == expected
    stream = await client.chat.completions.create(**fields, stream=True)
    deltas = [chunk.choices[0].delta async for chunk in stream]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == expected


async def test_the_synchronous_openai_client_works(served: Served, port: int) -> None:
    expected = await greedy_text(served, prompt=PROMPT, max_tokens=8)

    def call() -> tuple[str, str, list[str]]:
        with (
            openai.DefaultHttpxClient(trust_env=False, verify=False) as direct,
            openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=direct) as client,
        ):
            response = client.completions.create(model="yuan-demo", prompt=PROMPT, max_tokens=8, temperature=0)
            stream = client.completions.create(
                model="yuan-demo", prompt=PROMPT, max_tokens=8, temperature=0, stream=True
            )
            streamed = "".join(chunk.choices[0].text for chunk in stream)
            names = [client.models.retrieve(model.id).id for model in client.models.list()]
            return response.choices[0].text, streamed, names

    text, streamed, names = await asyncio.to_thread(call)
    assert (text, streamed) == (expected, expected)
    assert "yuan-demo" in names


async def test_chat_is_limited_by_the_context_by_default(served: Served, client: openai.AsyncOpenAI) -> None:
    response = await client.chat.completions.create(
        model="yuan-demo", messages=MESSAGES, extra_body={"ignore_eos": True}, temperature=0
    )
    assert response.usage is not None
    assert response.usage.total_tokens == served.engine.info.max_model_len
    assert response.choices[0].finish_reason == "length"


async def test_several_prompts_and_choices(served: Served, client: openai.AsyncOpenAI) -> None:
    prompts = [PROMPT, "def add(a, b):", "one two"]
    ids: Any = [await served.engine.tokenize(prompt) for prompt in prompts]
    fields: Any = {"model": "yuan-demo", "max_tokens": 8, "n": 2, "seed": 7}
    texts = await client.completions.create(prompt=prompts, **fields)
    from_ids = await client.completions.create(prompt=ids, **fields)
    stream = await client.completions.create(prompt=prompts, stream=True, **fields)
    streamed = [""] * 6
    async for chunk in stream:
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert [choice.index for choice in texts.choices] == list(range(6))
    assert [choice.text for choice in texts.choices] == [choice.text for choice in from_ids.choices] == streamed
    assert len({*streamed}) == 6


async def test_an_echo_has_the_logprobs_of_the_prompt(client: openai.AsyncOpenAI) -> None:
    response = await client.completions.create(
        model="yuan-demo", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=2, echo=True
    )
    logprobs = response.choices[0].logprobs
    assert response.usage is not None
    assert logprobs is not None
    tokens, token_logprobs, top = logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs
    assert tokens is not None
    assert token_logprobs is not None
    assert top is not None
    assert len(tokens) == len(token_logprobs) == len(top) == response.usage.total_tokens
    assert token_logprobs[0] is None
    assert token_logprobs[-1] == max(top[-1].values())


async def score(client: openai.AsyncOpenAI, ids: list[int], **fields: Any) -> Any:
    """Return the log-probabilities of an echoed prompt."""
    prompt: Any = ids
    response = await client.completions.create(
        model="yuan-demo", prompt=prompt, temperature=0, logprobs=1, echo=True, **fields
    )
    return response.choices[0].logprobs


async def test_the_scores_of_a_prompt_are_those_of_grpc(served: Served, client: openai.AsyncOpenAI) -> None:
    ids = [654, 109, 1061, 236]  # the last two are parts of characters, and so are the most likely tokens there
    request = pb.GenerateRequest(
        prompt_token_ids=pb.TokenIds(ids=ids), max_tokens=0, echo=True, prompt_logprobs=1, return_prompt_token_ids=True
    )
    expected = await served.generate(request)
    choice = expected.choices[0]
    assert (list(choice.token_ids), expected.usage.completion_tokens) == ([], 0)
    assert choice.text == served.tokenizer.decode(ids)
    for fields in ({"max_tokens": 0}, {"max_tokens": 1}):
        logprobs = await score(client, ids, **fields)
        assert logprobs.token_logprobs[0] is None
        for index in range(1, len(ids)):
            token = expected.prompt_logprobs[index]
            assert logprobs.token_logprobs[index] == pytest.approx(token.logprob, abs=1e-4)
            assert max(logprobs.top_logprobs[index].values()) == pytest.approx(token.top[0].logprob, abs=1e-4)


async def test_the_tokenizer_over_http_is_that_of_grpc(served: Served, port: int) -> None:
    async with http_client(port) as http:
        info = (await http.get("/tokenizer_info")).json()
        tokens = (await http.post("/tokenize", json={"prompt": PROMPT})).json()["tokens"]
        text = (await http.post("/detokenize", json={"tokens": tokens})).json()["prompt"]
        models = (await http.get("/v1/models")).json()["data"]
    assert info["eos_token"] == "<eod>"
    assert tokens == [token.id for token in (await served.stub.Tokenize(pb.TokenizeRequest(prompt=PROMPT))).tokens]
    assert text == PROMPT
    assert models[0]["root"] == str(served.demo)


async def test_an_interrupted_answer_is_continued(served: Served, client: openai.AsyncOpenAI) -> None:
    fields: Any = {"model": "yuan-demo", "temperature": 0, "extra_body": {"ignore_eos": True}}
    whole = await client.chat.completions.create(messages=MESSAGES, max_tokens=12, **fields)
    text = whole.choices[0].message.content or ""
    request = pb.GenerateRequest(
        messages=[pb.Message(**turn) for turn in MESSAGES], max_tokens=12, ignore_eos=True, temperature=0
    )
    assert text == (await served.generate(request)).choices[0].text
    fields["extra_body"] |= {"continue_final_message": True}
    interrupted: Any = [*MESSAGES, {"role": "assistant", "content": "珠穆"}]
    rest = await client.chat.completions.create(messages=interrupted, max_tokens=12, **fields)
    prompt = f"{served.tokenizer.apply_chat_template(MESSAGES)}珠穆"
    expected = await greedy_text(served, prompt=prompt, max_tokens=12, ignore_eos=True)
    assert rest.choices[0].message.content == expected


async def test_chat_has_logprobs(client: openai.AsyncOpenAI) -> None:
    response = await client.chat.completions.create(
        model="yuan-demo", messages=MESSAGES, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [len(token.top_logprobs) for token in logprobs.content] == [3] * 4
    assert all(token.logprob == token.top_logprobs[0].logprob for token in logprobs.content)


async def test_the_output_follows_a_json_schema(client: openai.AsyncOpenAI) -> None:
    schema: dict[str, object] = {"enum": ["red", "green"]}  # in an object the demo model writes endless white space
    response = await client.chat.completions.create(
        model="yuan-demo",
        messages=MESSAGES,
        max_tokens=64,
        response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
    )
    assert json.loads(response.choices[0].message.content or "") in ("red", "green")


async def test_a_schema_that_cannot_be_enforced_is_rejected_by_name(client: openai.AsyncOpenAI) -> None:
    schema: dict[str, object] = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    with pytest.raises(openai.BadRequestError, match=r"`not`.*at /properties/a") as raised:
        await client.chat.completions.create(
            model="yuan-demo",
            messages=MESSAGES,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
    assert raised.value.param == "response_format.json_schema.schema"


async def test_beam_search_with_the_original_fields(served: Served, port: int) -> None:
    body = {"prompt": PROMPT, "use_beam_search": True, "n": 2, "best_of": 3, "temperature": 0, "max_tokens": 6}
    request = pb.GenerateRequest(prompt=PROMPT, use_beam_search=True, n=2, best_of=3, temperature=0, max_tokens=6)
    expected = [PROMPT + choice.text for choice in (await served.generate(request)).choices]
    async with http_client(port) as http:
        assert (await http.post("/generate", json=body)).json() == {"text": expected}
        stream = (await http.post("/generate", json=body | {"stream": True})).content
    assert json.loads(stream.split(b"\0")[-2]) == {"text": expected}


async def test_errors_raise_openais_exceptions(client: openai.AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError):
        await client.completions.create(model="unknown", prompt="a")
    with pytest.raises(openai.BadRequestError) as raised:
        await client.completions.create(model="yuan-demo", prompt="a", temperature=3)
    assert raised.value.param == "temperature"
    assert raised.value.code == "invalid_request"
    with pytest.raises(openai.BadRequestError, match="structured_outputs"):
        await client.completions.create(
            model="yuan-demo", prompt="a", extra_body={"structured_outputs": {"regex": "("}}, stream=True
        )


async def test_an_adapter_is_selected_by_the_model_name(served: Served, client: openai.AsyncOpenAI) -> None:
    await served.engine.load_lora("poems")
    try:
        assert "poems" in [model.id async for model in client.models.list()]
        response = await client.completions.create(model="poems", prompt=PROMPT, max_tokens=8, temperature=0)
        assert response.model == "poems"
        assert response.choices[0].text == await greedy_text(served, prompt=PROMPT, max_tokens=8, model="poems")
    finally:
        await served.engine.unload_lora("poems")


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_disconnect_frees_the_engine_request(served: Served, port: int, path: str, stream: bool) -> None:
    await served.wait_until_empty()
    connection = connect_socket(port)
    body = json.dumps(ENDLESS | {"stream": stream}).encode()
    await asyncio.get_running_loop().sock_sendall(connection, encode_post(path, body))
    await served.wait_for_unfinished(1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    connection.close()
    await served.wait_until_empty()
    assert served.unfinished == 0


async def test_closing_an_openai_stream_frees_the_engine_request(served: Served, client: openai.AsyncOpenAI) -> None:
    await served.wait_until_empty()
    fields: Any = {"model": "yuan-demo", "prompt": PROMPT, "max_tokens": 2000, "extra_body": {"ignore_eos": True}}
    async with await client.completions.create(**fields, stream=True) as stream:
        await anext(aiter(stream))
    await served.wait_until_empty()
    assert served.unfinished == 0


async def test_metrics_include_vllms(served: Served, port: int) -> None:
    async with http_client(port) as http:

        async def total(name: str) -> float:
            lines = (await http.get("/metrics")).text.splitlines()
            return sum(float(line.split()[-1]) for line in lines if line.startswith(f"vllm:{name}{{"))

        names = ("generation_tokens_total", "inter_token_latency_seconds_count")
        tokens, gaps = [await total(name) for name in names]
        await served.generate(pb.GenerateRequest(prompt=PROMPT, max_tokens=5, ignore_eos=True))
        assert [await total(name) for name in names] == [tokens + 5, gaps + 4]


async def test_concurrent_calls_get_the_same_texts_as_single_calls(served: Served, port: int) -> None:
    expected = {times: await greedy_text(served, prompt="one two" * times, max_tokens=6) for times in range(1, 9)}
    async with http_client(port) as http:

        async def call(times: int, stream: bool) -> tuple[int, str]:
            body = {"prompt": "one two" * times, "max_tokens": 6, "top_k": 1, "stream": stream}
            response = await http.post("/v1/completions", json=body)
            if not stream:
                return times, response.json()["choices"][0]["text"]
            chunks = parse_events(response.content)[:-1]
            return times, "".join(chunk["choices"][0]["text"] for chunk in chunks)

        calls = [call(times, stream) for times in range(1, 9) for stream in (False, True)] * 3
        for times, text in await asyncio.gather(*calls):
            assert text == expected[times]
