"""Hypothesis strategies for calls with valid, nearly valid and invalid requests, and their outcomes."""

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
from random_checkpoint import random_checkpoint
from random_messages import messages

from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.v1 import yuan_pb2 as pb

TOKENIZER = YuanTokenizer.from_pretrained(random_checkpoint())
TOKENS, END = len(TOKENIZER), TOKENIZER.eos_token_id
MODEL, CONTEXT = "yuan-demo", 2048
REQUEST_IDS = ("one", "two", "名字")
"""Request ids: few, so that calls share them and get aborted."""
MODELS = (MODEL, *ADAPTERS, "broken", "../demo", "unknown")
LONG_TIMEOUT = 100.0
"""Timeout that no call should reach, in seconds."""
SHORT_TIMEOUTS = (0.01, 0.3, 0.8)
SMALL_TOKENS = 100
"""Maximum tokens of a call with a long timeout. Larger calls get a short one, to limit the duration of the test."""

sampled = st.sampled_from
_ids = sampled([0, 3, 100, 231, 300, 500, 600, 700, 1000, END, END + 1, TOKENS - 1])
_words = sampled(["中国", " the", "a", "是", "<sep>", "😀", "e", "\n"])
_prompts = sampled(
    ["世界上最高的山是什么", "def add(a, b):", "a", "<eod>", "北京<sep>", "长" * 300, "😀\0\n", " ", "one two"]
)
_long_id_lists = sampled([list(range(1024)), [5] * 1024, list(range(127)), list(range(128))])


def _lists(items: st.SearchStrategy[Any], *, min_size: int = 0) -> st.SearchStrategy[Any]:
    return st.lists(items, min_size=min_size, max_size=4)


LIKELY = {
    "GenerateRequest.request_id": sampled(["", "", "", "", "", "", *REQUEST_IDS]),
    "GenerateRequest.prompt": _prompts,
    "GenerateRequest.n": sampled([1, 2, 3]),
    "GenerateRequest.max_tokens": sampled([1, 2, 5, 8, 8, 20]),
    "GenerateRequest.temperature": sampled([0.0, -0.0, 5e-324, 0.001, 0.7, 1.0, 1.999, 2.0]),
    "GenerateRequest.top_p": sampled([0.0, 5e-324, 0.1, 0.9, 1.0]),
    "GenerateRequest.top_k": sampled([-1, 0, 1, 5, TOKENS, TOKENS + 100, 2**31 - 1]),
    "GenerateRequest.min_p": sampled([0.0, 5e-324, 0.05, 1.0]),
    "GenerateRequest.presence_penalty": sampled([-2.0, -0.0, 0.5, 2.0]),
    "GenerateRequest.frequency_penalty": sampled([-2.0, -0.0, 0.5, 2.0]),
    "GenerateRequest.repetition_penalty": sampled([0.001, 0.5, 1.0, 1.3, 1000.0]),
    "GenerateRequest.seed": sampled([0, 1, 2**31, 2**48, 2**63 - 129]),
    "GenerateRequest.stop": sampled([["。"] * 64, ["x" * 1024]]) | _lists(_words),
    "GenerateRequest.stop_token_ids": _long_id_lists | _lists(_ids),
    "GenerateRequest.logprobs": sampled([0, 1, 5, 20]),
    "GenerateRequest.best_of": sampled([2, 3, 4]),
    "GenerateRequest.length_penalty": sampled([-10.0, 0.0, 1.0, 10.0]),
    "GenerateRequest.early_stopping": sampled([Value(bool_value=True), Value(string_value="never"), Value()]),
    "GenerateRequest.messages": st.builds(
        lambda messages: [*messages[:-1], pb.Message(role="user", content="a")],
        _lists(st.builds(pb.Message, role=sampled(["system", "user", "assistant"]), content=_prompts), min_size=1),
    ),
    "GenerateRequest.model": sampled(["", "", MODEL, MODEL, *ADAPTERS]),
    "GenerateRequest.truncate_prompt_tokens": sampled([-1, 1, 2, 40, 2047, 2**31 - 1]),
    "GenerateRequest.truncation_side": sampled(list(pb.TruncationSide.values())),
    "GenerateRequest.min_tokens": sampled([0, 1, 2, 5]),
    "GenerateRequest.logit_bias": sampled([[(i, 0.5) for i in range(1024)]])
    | _lists(st.tuples(_ids, sampled([-100.0, -0.0, 1e-45, 5.0, 100.0]))),
    "GenerateRequest.allowed_token_ids": _long_id_lists | _lists(_ids),
    "GenerateRequest.bad_words": sampled([["x"] * 64, ["长" * 100]]) | _lists(_words.filter(str.strip)),
    "GenerateRequest.stream_interval": sampled([1, 2, 2**31 - 1]),
    "GenerateRequest.prompt_logprobs": sampled([0, 1, 20]),
    "GenerateRequest.logprob_token_ids": sampled([list(range(128))]) | _lists(_ids),
    "GenerateRequest.priority": sampled([0]),
    "GenerateRequest.cache_salt": sampled(["", "salt", "盐" * 1024]),
    "GenerateRequest.heartbeat_interval": sampled([Duration(nanos=10**8), Duration(seconds=3600)]),
    "RepetitionDetection.max_pattern_size": sampled([1, 2, 1024]),
    "RepetitionDetection.min_pattern_size": sampled([0, 1]),
    "RepetitionDetection.min_count": sampled([2, 3, 1024]),
    "StructuredOutputs.json": sampled(
        ['{"type": "integer"}', '{"enum": ["北京", null]}', "{}", '{"type": "nope"}', "5"]
    ),
    "StructuredOutputs.json_object": st.just(True),
    "StructuredOutputs.regex": sampled(["[0-9]{2}", "(a|b)*", "世界?", " ", "(", "[z-a]", "(?=a)"]),
    "StructuredOutputs.grammar": sampled(['root ::= "a" | "b" root', 'start: "x"+', "root ::= root", "root ::="]),
    "StructuredOutputs.structural_tag": sampled(
        ['{"type": "structural_tag", "format": {"type": "const_string", "value": "<a>"}}', "{}", "[]"]
    ),
    "StringList.values": _lists(_words, min_size=1),
    "TokenIds.ids": sampled([[5] * 2000, [END]]) | _lists(_ids, min_size=1),
    "AbortRequest.request_id": sampled(REQUEST_IDS),
    "TokenizeRequest.prompt": _prompts,
    "DetokenizeRequest.token_ids": sampled([list(range(TOKENS)), [5] * 5000]) | _lists(_ids),
    "LoadLoraRequest.name": sampled(MODELS),
    "UnloadLoraRequest.name": sampled(MODELS),
}
"""Strategies for mostly valid values; other fields are as likely invalid as valid."""


@dataclass(frozen=True)
class Call:
    """A call to make, with one request unless the RPC is GenerateBatch."""

    rpc: str
    requests: Sequence[Any] = field(repr=False)
    short_timeout: float

    @property
    def timeout(self) -> float:
        """The client's timeout, in seconds."""
        return LONG_TIMEOUT if all(map(_is_small, self.requests)) else self.short_timeout


@dataclass(frozen=True)
class Outcome:
    """The outcome of a request.

    Attributes:
        responses: the response, or all messages of a stream.
        status: the status with its details, if the call failed.
        header_bytes: the size of the status in headers.
    """

    call: Call
    request: Any
    code: grpc.StatusCode
    responses: Sequence[Any] = ()
    status: Status | None = None
    header_bytes: int = 0


def _is_small(request: Any) -> bool:
    if not isinstance(request, pb.GenerateRequest):
        return True
    width = max(request.n, request.best_of, 1)
    return width * (request.max_tokens if request.HasField("max_tokens") else 16) <= SMALL_TOKENS


_PROMPT_FIELDS = ("prompt", "prompt_token_ids", "messages")
_SEARCH_FIELDS = ("use_beam_search", "best_of", "length_penalty", "early_stopping")
_ALLOWED_IN_BEAM_SEARCH = (
    *("n", "best_of", "length_penalty", "early_stopping", "max_tokens", "min_tokens", "ignore_eos", "stop"),
    *("stop_token_ids", "include_stop_str_in_output", "logprobs", "prompt_logprobs", "flat_logprobs", "echo", "model"),
    *("seed", "partial_on_deadline", "heartbeat_interval", "return_prompt_token_ids", "return_timings", "cache_salt"),
)

_short_requests = st.builds(
    lambda prompt, max_tokens: pb.GenerateRequest(**prompt, max_tokens=max_tokens),
    st.one_of(
        st.builds(dict, prompt=_prompts),
        st.builds(dict, prompt_token_ids=st.builds(pb.TokenIds, ids=LIKELY["TokenIds.ids"])),
        st.builds(dict, messages=LIKELY["GenerateRequest.messages"]),
    ),
    LIKELY["GenerateRequest.max_tokens"],
)
_sampling_options = messages(pb.GenerateRequest, LIKELY, (2, 12), (*_PROMPT_FIELDS, *_SEARCH_FIELDS))
_best_of_options = messages(
    pb.GenerateRequest, LIKELY, (1, 8), (*_PROMPT_FIELDS, "n", "use_beam_search", "length_penalty", "early_stopping")
)
_beam_search_options = messages(
    pb.GenerateRequest,
    LIKELY,
    (2, 10),
    {field.name for field in pb.GenerateRequest.DESCRIPTOR.fields}.difference(_ALLOWED_IN_BEAM_SEARCH),
).map(lambda request: request.MergeFrom(pb.GenerateRequest(use_beam_search=True)) or request)
_arbitrary_options = messages(pb.GenerateRequest, sizes=(1, 2))


@st.composite
def _generate_requests(draw: st.DrawFn) -> pb.GenerateRequest:
    """Draw a request. Most have a prompt, few tokens, and no field that is invalid by itself."""
    strategies = [*[_sampling_options] * 3, _best_of_options, _beam_search_options, _arbitrary_options, None]
    options = draw(sampled(strategies))
    if options is None:
        request: pb.GenerateRequest = draw(messages(pb.GenerateRequest))
        return request
    request = draw(_short_requests)
    request.MergeFrom(draw(options))
    return request


@st.composite
def _calls(draw: st.DrawFn, rpc: str, requests: st.SearchStrategy[Any], max_requests: int = 1) -> Call:
    return Call(rpc, draw(st.lists(requests, min_size=1, max_size=max_requests)), draw(sampled(SHORT_TIMEOUTS)))


def _likely_or_arbitrary(message: type[Message]) -> st.SearchStrategy[Any]:
    return messages(message, LIKELY) | messages(message)


_OTHER_RPCS = (
    *("Abort", "Abort", "Tokenize", "Detokenize", "GetModel", "ListLoras", "LoadLora", "LoadLora", "UnloadLora"),
)
calls = sampled(
    [
        *[_calls("Generate", _generate_requests())] * 7,
        *[_calls("GenerateStream", _generate_requests())] * 7,
        *[_calls("GenerateBatch", _generate_requests(), max_requests=6)] * 3,
        *[_calls(name, _likely_or_arbitrary(getattr(pb, f"{name}Request"))) for name in _OTHER_RPCS],
    ]
).flatmap(lambda strategy: strategy)
"""Strategy for calls of every RPC."""


async def make_calls(served: Served, made: Sequence[Call]) -> list[Outcome]:
    """Make all calls concurrently; return their outcomes, one per request."""
    outcomes = await asyncio.gather(*[_CALLERS.get(call.rpc, _unary)(served, call) for call in made])
    return [outcome for call_outcomes in outcomes for outcome in call_outcomes]


async def _unary(served: Served, call: Call) -> list[Outcome]:
    (request,) = call.requests
    outcome = partial(Outcome, call, request)
    try:
        return [outcome(grpc.StatusCode.OK, [await getattr(served.stub, call.rpc)(request, timeout=call.timeout)])]
    except grpc.aio.AioRpcError as error:
        return [outcome(error.code(), (), *_status_of(error))]


async def _stream(served: Served, call: Call) -> list[Outcome]:
    (request,), messages = call.requests, list[Any]()
    outcome = partial(Outcome, call, request)
    try:
        async for message in served.stub.GenerateStream(request, timeout=call.timeout):
            messages.append(message)
        return [outcome(grpc.StatusCode.OK, messages)]
    except grpc.aio.AioRpcError as error:
        return [outcome(error.code(), messages, *_status_of(error))]


async def _batch(served: Served, call: Call) -> list[Outcome]:
    """Make a batch call. Requests without a result get the status of the call."""

    async def items() -> AsyncIterator[pb.GenerateBatchRequest]:
        for request in call.requests:
            yield pb.GenerateBatchRequest(request=request)

    results, without_result = dict[int, pb.GenerateBatchResponse](), partial(Outcome, code=grpc.StatusCode.UNKNOWN)
    try:
        async for result in served.stub.GenerateBatch(items(), timeout=call.timeout):
            assert result.index not in results
            results[result.index] = result
    except grpc.aio.AioRpcError as error:
        status, header_bytes = _status_of(error)
        without_result = partial(Outcome, code=_code_of(error), status=status, header_bytes=header_bytes)
    except asyncio.CancelledError:  # grpcio's client cancels a call whose deadline expires while it half-closes
        if call.timeout is None:
            raise
        without_result = partial(Outcome, code=grpc.StatusCode.DEADLINE_EXCEEDED)
    return [
        _batch_outcome(call, request, results[index]) if index in results else without_result(call, request)
        for index, request in enumerate(call.requests)
    ]


def _batch_outcome(call: Call, request: pb.GenerateRequest, result: pb.GenerateBatchResponse) -> Outcome:
    if result.HasField("response"):
        return Outcome(call, request, grpc.StatusCode.OK, [result.response])
    (code,) = [code for code in grpc.StatusCode if code.value[0] == result.error.code]
    return Outcome(call, request, code, (), Status.FromString(result.error.SerializeToString()))


def _code_of(error: grpc.aio.AioRpcError) -> grpc.StatusCode:
    """Return the status code. grpcio's client reports INTERNAL if the deadline expires while it sends."""
    is_deadline = error.code() is grpc.StatusCode.INTERNAL and error.details() == "Internal error from Core"
    return grpc.StatusCode.DEADLINE_EXCEEDED if is_deadline else error.code()


_CALLERS = {"GenerateStream": _stream, "GenerateBatch": _batch}


def _status_of(error: grpc.aio.AioRpcError) -> tuple[Status | None, int]:
    """Return the status of an error, and its size in headers, where non-ASCII text takes 3 bytes for 1."""
    size, status = 3 * len((error.details() or "").encode()), None
    for key, value in error.trailing_metadata() or ():
        size += 32 + len(key) + (len(value) * 4 + 2) // 3
        if key == "grpc-status-details-bin":
            assert isinstance(value, bytes)
            status = Status.FromString(value)
    return status, size
