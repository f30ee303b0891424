"""The example requests of every RPC, sent as their README says."""

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

Send = Callable[[str], Awaitable[list[Any]]]


class RefusedError(Exception):
    """The call's status, for one that did not end well."""

    def __init__(self, number: int, error: dict[str, Any]) -> None:
        super().__init__(error["message"])
        self.number = number
        self.error = error


@pytest.fixture
def send(served: Served, buf: str) -> Send:
    """Sends an RPC's example and returns the messages that come back."""

    async def send_example(rpc: str) -> list[Any]:
        process = await asyncio.create_subprocess_exec(
            *(buf, "curl", "--protocol", "grpc", "--http2-prior-knowledge", "-d", f"@clients/examples/{rpc}.json"),
            f"http://{served.address}/yuan.v1.YuanService/{rpc}",
            cwd=ROOT,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        output, error = await process.communicate()
        if process.returncode:
            raise RefusedError(process.returncode >> 3, json.loads(error))
        answer = getattr(pb, RPCS[rpc].output_type.name)
        return [json_format.ParseDict(message, answer()) for message in documents(output.decode())]

    return send_example


def documents(text: str) -> Iterator[Any]:
    """The JSON documents that follow one another in a text."""
    decoder = json.JSONDecoder()
    while text := text.lstrip():
        document, end = decoder.raw_decode(text)
        yield document
        text = text[end:]


def example(rpc: str) -> list[Any]:
    """The messages of an RPC's example."""
    message = getattr(pb, RPCS[rpc].input_type.name)
    texts = documents((EXAMPLES / f"{rpc}.json").read_text("utf-8"))
    return [json_format.ParseDict(text, message()) for text in texts]


async def test_every_rpc_has_an_example_and_every_example_an_rpc() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.json")} == set(RPCS)


async def test_generate_answers_a_conversation(send: Send) -> None:
    (response,) = await send("Generate")
    assert response.seed == 42
    assert [choice.index for choice in response.choices] == [0, 1]
    for choice in response.choices:
        assert [len(logprob.top) for logprob in choice.logprobs] == [2] * len(choice.token_ids) != []
        assert math.isclose(choice.cumulative_logprob, sum(each.logprob for each in choice.logprobs), abs_tol=1e-3)


async def test_generate_stream_continues_code_piece_by_piece(send: Send) -> None:
    (request,) = example("GenerateStream")
    parts = await send("GenerateStream")
    pieces = [choice for part in parts for choice in part.choices]
    assert {part.request_id for part in parts} == {request.request_id}
    assert "".join(piece.text for piece in pieces).startswith(request.prompt)
    assert len(pieces) > 2
    assert pieces[-1].finish_reason in (pb.FINISH_REASON_STOP, pb.FINISH_REASON_LENGTH)
    assert parts[-1].usage.completion_tokens == sum(len(piece.token_ids) for piece in pieces)


async def test_generate_batch_answers_each_request(send: Send) -> None:
    sent = [message.request for message in example("GenerateBatch")]
    answers = sorted(await send("GenerateBatch"), key=lambda answer: answer.index)
    assert [(answer.index, answer.request_id) for answer in answers] == [
        (index, request.request_id) for index, request in enumerate(sent)
    ]
    review, date, poem = (answer.response.choices for answer in answers)
    assert review[0].text in sent[0].structured_outputs.choice.values
    assert re.fullmatch(sent[1].structured_outputs.regex, date[0].text)
    assert len(poem) == sent[2].n
    assert poem[0].cumulative_logprob >= poem[1].cumulative_logprob


async def test_abort_ends_the_call_it_names(served: Served, send: Send) -> None:
    (request,) = example("Abort")
    endless = pb.GenerateRequest(
        prompt="写一份年度报告", request_id=request.request_id, n=64, max_tokens=2000, ignore_eos=True
    )
    parts = aiter(served.stub.GenerateStream(endless))
    await anext(parts)
    assert await send("Abort") == [pb.AbortResponse()]
    with pytest.raises(grpc.aio.AioRpcError) as ended:
        async for _ in parts:
            pass
    assert ended.value.code() == grpc.StatusCode.CANCELLED


async def test_tokenize_tells_the_stretch_of_each_token(served: Served, send: Send) -> None:
    (request,) = example("Tokenize")
    (response,) = await send("Tokenize")
    assert response.text == request.prompt
    assert response.count == len(response.tokens)
    assert [token.id for token in response.tokens] == served.tokenizer.encode(request.prompt)
    assert [token.piece for token in response.tokens][-1] == "<eod>"
    assert {place for token in response.tokens for place in range(token.start, token.end)} == set(
        range(len(request.prompt))
    )


async def test_detokenize_joins_bytes_to_characters(send: Send) -> None:
    assert await send("Detokenize") == [pb.DetokenizeResponse(text="世界")]


async def test_get_model_tells_what_is_served(served: Served, send: Send) -> None:
    (model,) = await send("GetModel")
    assert model.name == (await served.generate(pb.GenerateRequest(prompt="一", max_tokens=1))).model
    assert (model.dtype, model.quantization, model.revision) == ("float32", "", "")
    assert model.version
    assert model.vllm_version
    assert model.sizes.tokens == len(served.tokenizer)
    assert (model.limits.max_num_seqs, model.limits.max_num_queued_reqs) == (2, 150)
    assert model.lora.max_lora_rank == 8


async def test_an_adapter_is_loaded_listed_and_unloaded(send: Send) -> None:
    (request,) = example("LoadLora")
    assert await send("LoadLora") == [pb.LoadLoraResponse(lora=pb.Lora(name=request.name))]
    (listed,) = await send("ListLoras")
    assert [lora.name for lora in listed.loras] == [request.name]
    assert await send("UnloadLora") == [pb.UnloadLoraResponse()]


async def test_a_refusal_is_told_as_json(send: Send) -> None:
    with pytest.raises(RefusedError, match="loaded adapter") as refused:
        await send("UnloadLora")
    assert refused.value.number == grpc.StatusCode.NOT_FOUND.value[0]
    assert refused.value.error["code"] == "not_found"
