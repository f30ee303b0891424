"""The example request of every RPC, sent with the command in its README."""

import asyncio
import json
import math
import re
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from engine.conftest import Served
from google.protobuf import json_format

from yuan_grpc.v1 import yuan_pb2 as pb

pytestmark = [pytest.mark.engine, pytest.mark.asyncio(loop_scope="session")]

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "clients" / "examples"
RPCS = pb.DESCRIPTOR.services_by_name["YuanService"].methods_by_name

Send = Callable[..., Awaitable[list[Any]]]


class CallError(Exception):
    """The status of a failed call."""

    def __init__(self, number: int, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.number = number
        self.error = error


@pytest.fixture
def send(served: Served, buf: str) -> Send:
    """A function that sends the example of an RPC, or other data, and returns the response messages."""

    async def send_example(rpc: str, data: str | None = None) -> list[Any]:
        data = data or f"@clients/examples/{rpc}.json"
        process = await asyncio.create_subprocess_exec(
            *(buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", data),
            f"http://{served.address}/yuan.v1.YuanService/{rpc}",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, error = await process.communicate()
        if process.returncode:
            raise CallError(process.returncode >> 3, json.loads(error))
        response = getattr(pb, RPCS[rpc].output_type.name)
        return [json_format.ParseDict(message, response()) for message in parse_documents(output.decode())]

    return send_example


def parse_documents(text: str) -> Iterator[Any]:
    """Yield the JSON documents of a text, which are not separated."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:]


def example(rpc: str) -> list[Any]:
    """Return the messages of an RPC's example."""
    message = getattr(pb, RPCS[rpc].input_type.name)
    documents = parse_documents((EXAMPLES / f"{rpc}.json").read_text("utf-8"))
    return [json_format.ParseDict(document, message()) for document in documents]


async def test_every_rpc_has_an_example_and_every_example_an_rpc() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(RPCS)


async def test_generate_continues_a_conversation(send: Send) -> None:
    (response,) = await send("Generate")
    assert response.seed == 42
    assert [choice.index for choice in response.choices] == [0, 1]
    for choice in response.choices:
        assert [len(logprob.top) for logprob in choice.logprobs] == [2] * len(choice.token_ids) != []
        assert math.isclose(
            choice.cumulative_logprob, sum(logprob.logprob for logprob in choice.logprobs), abs_tol=1e-3
        )


async def test_generate_stream_continues_code_incrementally(send: Send) -> None:
    (request,) = example("GenerateStream")
    messages = await send("GenerateStream")
    deltas = [choice for message in messages for choice in message.choices]
    assert {message.request_id for message in messages} == {request.request_id}
    assert "".join(delta.text for delta in deltas).startswith(request.prompt)
    assert len(deltas) > 2
    assert deltas[-1].finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    assert messages[-1].usage.completion_tokens == sum(len(delta.token_ids) for delta in deltas)


async def test_generate_batch_returns_a_result_for_each_request(send: Send) -> None:
    sent = [message.request for message in example("GenerateBatch")]
    results = sorted(await send("GenerateBatch"), key=lambda result: result.index)
    assert [(result.index, result.request_id) for result in results] == [
        (index, request.request_id) for index, request in enumerate(sent)
    ]
    review, date, poem = (result.response.choices for result in results)
    assert review[0].text in sent[0].structured_outputs.choice.values
    assert re.fullmatch(sent[1].structured_outputs.regex, date[0].text)
    assert len(poem) == sent[2].n
    assert poem[0].cumulative_logprob >= poem[1].cumulative_logprob


async def test_abort_ends_a_call_whose_id_the_server_generated(served: Served, send: Send) -> None:
    with pytest.raises(CallError, match="must be the id of a running call of this caller") as refused:
        await send("Abort")
    assert refused.value.number == grpc.StatusCode.NOT_FOUND.value[0]
    (request,) = example("Abort")
    endless = pb.GenerateRequest(prompt="写一份年度报告", n=64, max_tokens=2000, ignore_eos=True)
    messages = aiter(served.stub.GenerateStream(endless))
    request.request_id = (await anext(messages)).request_id
    assert await send("Abort", json_format.MessageToJson(request)) == [pb.AbortResponse()]
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        async for _ in messages:
            pass
    assert raised.value.code() == grpc.StatusCode.CANCELLED


async def test_tokenize_returns_the_offsets_of_each_token(served: Served, send: Send) -> None:
    (request,) = example("Tokenize")
    (response,) = await send("Tokenize")
    assert response.text == request.prompt
    assert response.count == len(response.tokens)
    assert [token.id for token in response.tokens] == served.tokenizer.encode(request.prompt)
    assert [token.piece for token in response.tokens][-1] == "<eod>"
    assert {offset for token in response.tokens for offset in range(token.start, token.end)} == set(
        range(len(request.prompt))
    )


async def test_detokenize_joins_byte_tokens_to_characters(send: Send) -> None:
    assert await send("Detokenize") == [pb.DetokenizeResponse(text="世界")]


async def test_get_model_describes_the_served_model(served: Served, send: Send) -> None:
    (model,) = await send("GetModel")
    assert model.name == (await served.generate(pb.GenerateRequest(prompt="一", max_tokens=1))).model
    assert (model.dtype, model.quantization, model.revision) == ("float32", "", "")
    assert model.version
    assert model.vllm_version
    assert model.sizes.tokens == len(served.tokenizer)
    assert (model.limits.max_num_seqs, model.limits.max_num_queued_reqs) == (2, 150)
    assert model.lora.max_lora_rank == 8


async def test_get_loads_returns_the_load_of_the_engine(send: Send) -> None:
    (response,) = await send("GetLoads")
    assert [(load.dp_rank, load.max_num_seqs) for load in response.loads] == [(0, 2)]


async def test_an_adapter_is_loaded_listed_and_unloaded(send: Send) -> None:
    (request,) = example("LoadLora")
    assert await send("LoadLora") == [pb.LoadLoraResponse(lora=pb.Lora(name=request.name))]
    (listed,) = await send("ListLoras")
    assert [lora.name for lora in listed.loras] == [request.name]
    assert await send("UnloadLora") == [pb.UnloadLoraResponse()]


async def test_an_error_is_printed_as_json(send: Send) -> None:
    with pytest.raises(CallError, match="loaded adapter") as raised:
        await send("UnloadLora")
    assert raised.value.number == grpc.StatusCode.NOT_FOUND.value[0]
    assert raised.value.error["code"] == "not_found"
