"""Calls for hypothesis to make up: of requests that are right, nearly right and wrong; and what comes of each."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import grpc
from engine.conftest import ADAPTERS, Served
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from google.rpc.status_pb2 import Status
from hypothesis import strategies as st
from messages import messages

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.settings import DEMO
from yuan_grpc.v1 import yuan_pb2 as pb

TOKENIZER = YuanTokenizer.from_pretrained(DEMO)
TOKENS, END = len(TOKENIZER), TOKENIZER.eos_token_id
MODEL, CONTEXT = "yuan-demo", 2048
NAMES = ("one", "two", "名字")
"""Few, so that calls have the same ones and are aborted."""
MODELS = (MODEL, *ADAPTERS, "broken", "../demo", "nobody")
PATIENCE = 100.0
"""Seconds that no call needs which ends by itself."""
HURRY = (0.01, 0.3, 0.8)
LITTLE_WORK = 100
"""Tokens. Calls for more are in a hurry, for the sake of the test's own time."""

some = st.sampled_from
_ids = some([0, 3, 100, 231, 300, 500, 600, 700, 1000, END, END + 1, TOKENS - 1])
_words = some(["中国", " the", "a", "是", "<sep>", "😀", "e", "\n"])
_prompts = some(
    ["世界上最高的山是什么", "def add(a, b):", "a", "<eod>", "北京<sep>", "长" * 300, "😀\0\n", " ", "one two"]
)
_many_ids = some([list(range(1024)), [5] * 1024, list(range(127)), list(range(128))])


def _lists(items: st.SearchStrategy[Any], *, least: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(items, min_size=least, max_size=4)


LIKELY = {
    "GenerateRequest.request_id": some(["", "", "", "", "", "", *NAMES]),
    "GenerateRequest.prompt": _prompts,
    "GenerateRequest.n": some([1, 2, 3]),
    "GenerateRequest.max_tokens": some([1, 2, 5, 8, 8, 20]),
    "GenerateRequest.temperature": some([0.0, -0.0, 5e-324, 0.001, 0.7, 1.0, 1.999, 2.0]),
    "GenerateRequest.top_p": some([0.0, 5e-324, 0.1, 0.9, 1.0]),
    "GenerateRequest.top_k": some([-1, 0, 1, 5, TOKENS, TOKENS + 100, 2**31 - 1]),
    "GenerateRequest.min_p": some([0.0, 5e-324, 0.05, 1.0]),
    "GenerateRequest.presence_penalty": some([-2.0, -0.0, 0.5, 2.0]),
    "GenerateRequest.frequency_penalty": some([-2.0, -0.0, 0.5, 2.0]),
    "GenerateRequest.repetition_penalty": some([0.001, 0.5, 1.0, 1.3, 1000.0]),
    "GenerateRequest.seed": some([0, 1, 2**31, 2**48, 2**63 - 129]),
    "GenerateRequest.stop": some([["。"] * 64, ["x" * 1024]]) | _lists(_words),
    "GenerateRequest.stop_token_ids": _many_ids | _lists(_ids),
    "GenerateRequest.logprobs": some([0, 1, 5, 20]),
    "GenerateRequest.best_of": some([2, 3, 4]),
    "GenerateRequest.length_penalty": some([-10.0, 0.0, 1.0, 10.0]),
    "GenerateRequest.early_stopping": some([Value(bool_value=True), Value(string_value="never"), Value()]),
    "GenerateRequest.messages": st.builds(
        lambda turns: [*turns[:-1], pb.Message(role="user", content="a")],
        _lists(st.builds(pb.Message, role=some(["system", "user", "assistant"]), content=_prompts), least=1),
    ),
    "GenerateRequest.model": some(["", "", MODEL, MODEL, *ADAPTERS]),
    "GenerateRequest.truncate_prompt_tokens": some([-1, 1, 2, 40, 2047, 2**31 - 1]),
    "GenerateRequest.truncation_side": some(list(pb.TruncationSide.values())),
    "GenerateRequest.min_tokens": some([0, 1, 2, 5]),
    "GenerateRequest.logit_bias": some([[(i, 0.5) for i in range(1024)]])
    | _lists(st.tuples(_ids, some([-100.0, -0.0, 1e-45, 5.0, 100.0]))),
    "GenerateRequest.allowed_token_ids": _many_ids | _lists(_ids),
    "GenerateRequest.bad_words": some([["x"] * 64, ["长" * 100]]) | _lists(_words.filter(str.strip)),
    "GenerateRequest.stream_interval": some([1, 2, 2**31 - 1]),
    "GenerateRequest.prompt_logprobs": some([0, 1, 20]),
    "GenerateRequest.logprob_token_ids": some([list(range(128))]) | _lists(_ids),
    "GenerateRequest.priority": some([0]),
    "GenerateRequest.cache_salt": some(["", "salt", "盐" * 1024]),
    "GenerateRequest.heartbeat_interval": some([Duration(nanos=10**8), Duration(seconds=3600)]),
    "RepetitionDetection.max_pattern_size": some([1, 2, 1024]),
    "RepetitionDetection.min_pattern_size": some([0, 1]),
    "RepetitionDetection.min_count": some([2, 3, 1024]),
    "StructuredOutputs.json": some(['{"type": "integer"}', '{"enum": ["北京", null]}', "{}", '{"type": "nope"}', "5"]),
    "StructuredOutputs.json_object": st.just(True),
    "StructuredOutputs.regex": some(["[0-9]{2}", "(a|b)*", "世界?", " ", "(", "[z-a]", "(?=a)"]),
    "StructuredOutputs.grammar": some(['root ::= "a" | "b" root', 'start: "x"+', "root ::= root", "root ::="]),
    "StructuredOutputs.structural_tag": some(
        ['{"type": "structural_tag", "format": {"type": "const_string", "value": "<a>"}}', "{}", "[]"]
    ),
    "StringList.values": _lists(_words, least=1),
    "TokenIds.ids": some([[5] * 2000, [END]]) | _lists(_ids, least=1),
    "AbortRequest.request_id": some(NAMES),
    "TokenizeRequest.prompt": _prompts,
    "DetokenizeRequest.token_ids": some([list(range(TOKENS)), [5] * 5000]) | _lists(_ids),
    "LoadLoraRequest.name": some(MODELS),
    "UnloadLoraRequest.name": some(MODELS),
}
"""Values that are mostly right; what is not here is as likely to be wrong as not."""


@dataclass(frozen=True)
class Call:
    """A call to make: of one request, but for GenerateBatch."""

    rpc: str
    requests: Sequence[Any] = field(repr=False)
    hurry: float

    @property
    def timeout(self) -> float:
        """Seconds to the client's deadline."""
        return PATIENCE if all(map(_is_little, self.requests)) else self.hurry


@dataclass(frozen=True)
class Outcome:
    """What came of a request. Of a stream `parts` are all messages; `metadata` is what the status took in headers."""

    call: Call
    request: Any
    code: grpc.StatusCode
    parts: Sequence[Any] = ()
    status: Status | None = None
    metadata: int = 0


def _is_little(request: Any) -> bool:
    if not isinstance(request, pb.GenerateRequest):
        return True
    width = max(request.n, request.best_of, 1)
    return width * (request.max_tokens if request.HasField("max_tokens") else 16) <= LITTLE_WORK


_INPUTS = ("prompt", "prompt_token_ids", "messages")
_SEARCH = ("use_beam_search", "best_of", "length_penalty", "early_stopping")
_IN_A_SEARCH = (
    *("n", "best_of", "length_penalty", "early_stopping", "max_tokens", "min_tokens", "ignore_eos", "stop"),
    *("stop_token_ids", "include_stop_str_in_output", "logprobs", "prompt_logprobs", "flat_logprobs", "echo", "model"),
    *("seed", "partial_on_deadline", "heartbeat_interval", "return_prompt_token_ids", "cache_salt"),
)

_few_tokens = st.builds(
    lambda given, max_tokens: pb.GenerateRequest(**given, max_tokens=max_tokens),
    st.one_of(
        st.builds(dict, prompt=_prompts),
        st.builds(dict, prompt_token_ids=st.builds(pb.TokenIds, ids=LIKELY["TokenIds.ids"])),
        st.builds(dict, messages=LIKELY["GenerateRequest.messages"]),
    ),
    LIKELY["GenerateRequest.max_tokens"],
)
_sampled = messages(pb.GenerateRequest, LIKELY, (2, 12), (*_INPUTS, *_SEARCH))
_best = messages(
    pb.GenerateRequest, LIKELY, (1, 8), (*_INPUTS, "n", "use_beam_search", "length_penalty", "early_stopping")
)
_searched = messages(
    pb.GenerateRequest,
    LIKELY,
    (2, 10),
    {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}.difference(_IN_A_SEARCH),
).map(lambda request: request.MergeFrom(pb.GenerateRequest(use_beam_search=True)) or request)
_unlikely = messages(pb.GenerateRequest, sizes=(1, 2))


@st.composite
def _generate_requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Most have a prompt, few tokens, and nothing that is wrong by itself."""
    how = draw(some([_sampled, _sampled, _sampled, _best, _searched, _unlikely, None]))
    if how is None:
        request: pb.GenerateRequest = draw(messages(pb.GenerateRequest))
        return request
    request = draw(_few_tokens)
    request.MergeFrom(draw(how))
    return request


@st.composite
def _calls(draw: st.DrawFn, rpc: str, requests: st.SearchStrategy[Any], most: int = 1) -> Call:
    return Call(rpc, draw(st.lists(requests, min_size=1, max_size=most)), draw(some(HURRY)))


def _either(message: type[Message]) -> st.SearchStrategy[Any]:
    return messages(message, LIKELY) | messages(message)


_SMALL = ("Abort", "Abort", "Tokenize", "Detokenize", "GetModel", "ListLoras", "LoadLora", "LoadLora", "UnloadLora")
calls = some(
    [
        *[_calls("Generate", _generate_requests())] * 7,
        *[_calls("GenerateStream", _generate_requests())] * 7,
        *[_calls("GenerateBatch", _generate_requests(), most=6)] * 3,
        *[_calls(name, _either(getattr(pb, f"{name}Request"))) for name in _SMALL],
    ]
).flatmap(lambda one: one)
"""Calls of every RPC."""


async def outcomes_of(served: Served, made: Sequence[Call]) -> list[Outcome]:
    """Makes the calls, all at the same time."""
    answered = await asyncio.gather(*[_WAYS.get(call.rpc, _unary)(served, call) for call in made])
    return [outcome for outcomes in answered for outcome in outcomes]


async def _unary(served: Served, call: Call) -> list[Outcome]:
    (request,) = call.requests
    answer = partial(Outcome, call, request)
    try:
        return [answer(grpc.StatusCode.OK, [await getattr(served.stub, call.rpc)(request, timeout=call.timeout)])]
    except grpc.aio.AioRpcError as error:
        return [answer(error.code(), (), *_status_of(error))]


async def _stream(served: Served, call: Call) -> list[Outcome]:
    (request,), parts = call.requests, list[Any]()
    answer = partial(Outcome, call, request)
    try:
        async for part in served.stub.GenerateStream(request, timeout=call.timeout):
            parts.append(part)
        return [answer(grpc.StatusCode.OK, parts)]
    except grpc.aio.AioRpcError as error:
        return [answer(error.code(), parts, *_status_of(error))]


async def _batch(served: Served, call: Call) -> list[Outcome]:
    """What is unanswered when the call ends has ended with it."""

    async def items() -> AsyncIterator[pb.GenerateBatchRequest]:
        for request in call.requests:
            yield pb.GenerateBatchRequest(request=request)

    results, ending = dict[int, pb.GenerateBatchResponse](), partial(Outcome, code=grpc.StatusCode.UNKNOWN)
    try:
        async for result in served.stub.GenerateBatch(items(), timeout=call.timeout):
            assert result.index not in results
            results[result.index] = result
    except grpc.aio.AioRpcError as error:
        status, metadata = _status_of(error)
        ending = partial(Outcome, code=_code_of(error), status=status, metadata=metadata)
    return [
        _of_batch(call, request, results[index]) if index in results else ending(call, request)
        for index, request in enumerate(call.requests)
    ]


def _of_batch(call: Call, request: pb.GenerateRequest, result: pb.GenerateBatchResponse) -> Outcome:
    if result.HasField("response"):
        return Outcome(call, request, grpc.StatusCode.OK, [result.response])
    (code,) = [code for code in grpc.StatusCode if code.value[0] == result.error.code]
    return Outcome(call, request, code, (), Status.FromString(result.error.SerializeToString()))


def _code_of(error: grpc.aio.AioRpcError) -> grpc.StatusCode:
    """grpcio's client calls it an internal error when the deadline comes while it sends."""
    is_its_own = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_its_own else error.code()


_WAYS = {"GenerateStream": _stream, "GenerateBatch": _batch}


def _status_of(error: grpc.aio.AioRpcError) -> tuple[Status | None, int]:
    """The status in an error, and its size in headers: what is not ASCII takes more there."""
    size, status = 3 * len((error.details() or "").encode()), None
    for key, value in error.trailing_metadata() or ():
        size += 32 + len(key) + (len(value) * 4 + 2) // 3
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status = Status.FromString(value)
    return status, size
