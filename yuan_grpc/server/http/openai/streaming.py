"""The envelope of OpenAI's answers, whole and streamed, around choices of either shape."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from yuan_grpc.server.core.convert import num_choices
from yuan_grpc.server.core.limits import MAX_IN_FLIGHT
from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.http.call import EVENTS, HttpCall
from yuan_grpc.server.http.errors import renamed
from yuan_grpc.v1 import yuan_pb2 as pb

LEAST_LOGPROB = -9999.0
"""JSON has no minus infinity."""


@dataclass(frozen=True)
class OpenAIRequest:
    """What a body asks for.

    Attributes:
        requests: one for each prompt.
        model: as the caller calls it; empty for the served one.
        stream: whether the answer is streamed.
        has_usage: whether a stream ends with the tokens counted.
        names: the caller's names for fields of ours.
    """

    requests: Sequence[pb.GenerateRequest]
    model: str
    stream: bool
    has_usage: bool
    names: Mapping[str, str]


class ChoiceFormat(Protocol):
    """How choices are written."""

    kind: str
    """`object` of an answer."""
    chunk_kind: str
    """`object` of a chunk."""
    prefix: str
    """What ids begin with."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice, before there is any of it."""

    def whole(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        """A choice; `prompt` has the prompt's log-probabilities, where those were asked for."""

    def delta(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        """A piece of a choice; `prompt` is empty but for the first."""


async def respond(call: HttpCall, parsed: OpenAIRequest, shape: ChoiceFormat) -> None:
    """Answers, whole or in chunks."""
    answer = _Answer(call, parsed, shape)
    try:
        await call.watched(answer.streamed() if parsed.stream else answer.whole())
    except InvalidRequestError as error:
        raise renamed(error, parsed.names) from error.__cause__


class _Answer:
    """One answer on its way. Choices are numbered through all prompts."""

    def __init__(self, call: HttpCall, parsed: OpenAIRequest, shape: ChoiceFormat) -> None:
        self._call = call
        self._parsed = parsed
        self._shape = shape
        self._service = call.state.service
        self._head = {
            "id": f"{shape.prefix}{call.name}",
            "object": shape.chunk_kind if parsed.stream else shape.kind,
            "created": int(time.time()),
            "model": parsed.model or self._service.engine.info.name,
        }
        self._usages = [pb.Usage() for _ in parsed.requests]
        self._writing = asyncio.Lock()
        self._has_begun = False

    async def whole(self) -> None:
        async def one(_: int, request: pb.GenerateRequest) -> pb.GenerateResponse:
            return await self._service.generate(request)

        responses = await gather_bounded(self._parsed.requests, one)
        choices = []
        for place, (request, response) in enumerate(zip(self._parsed.requests, responses, strict=True)):
            for choice in response.choices:
                index = place * num_choices(request) + choice.index
                choices.append(self._shape.whole(index, choice, response.prompt_logprobs))
                if request.return_prompt_token_ids:
                    choices[-1] |= _ids(choice) | {"prompt_token_ids": list(response.prompt_token_ids)}
        usage = _usage([response.usage for response in responses])
        await self._call.answer(self._head | {"choices": choices, "usage": usage})

    async def streamed(self) -> None:
        await gather_bounded(self._parsed.requests, self._stream)
        if self._parsed.has_usage:
            await self._call.write(self._head | {"choices": [], "usage": _usage(self._usages)})
        await self._call.write_raw(b"data: [DONE]\n\n")
        await self._call.end()

    async def _stream(self, place: int, request: pb.GenerateRequest) -> None:
        chunks = _Chunks(self._shape, request, place * num_choices(request))
        async with self._service.stream(request) as parts:
            async for part in parts:
                if part.HasField("usage"):
                    self._usages[place] = part.usage
                async with self._writing:  # who waits here has the engine put together what comes meanwhile
                    if not self._has_begun:
                        self._has_begun = True
                        await self._call.begin(EVENTS)
                    if {field.name for field, _ in part.ListFields()} <= {"request_id", "model"}:  # a heartbeat
                        await self._call.write_raw(b":\n\n")
                    await self._write(chunks.of(part))

    async def _write(self, choices: Iterable[dict[str, Any]]) -> None:
        usage = {"usage": None} if self._parsed.has_usage else {}
        for choice in choices:
            await self._call.write(self._head | {"choices": [choice]} | usage)


class _Chunks:
    """The chunks of one prompt's stream.

    Args:
        first: the index of its first choice.
    """

    def __init__(self, shape: ChoiceFormat, request: pb.GenerateRequest, first: int) -> None:
        self._shape = shape
        self._first = first
        self._wants_ids = request.return_prompt_token_ids
        self._unopened = list(range(num_choices(request)))
        self._unseen = set(self._unopened)
        self._prompt_token_ids: list[int] = []
        self._prompt_logprobs: list[pb.TokenLogprob] = []

    def of(self, part: pb.GenerateStreamResponse) -> Iterator[dict[str, Any]]:
        """Those that a part makes."""
        self._prompt_token_ids += part.prompt_token_ids
        self._prompt_logprobs += part.prompt_logprobs
        for index in self._unopened:
            if opening := self._shape.opening(self._first + index):
                yield opening
        self._unopened = []
        for choice in part.choices:
            is_first = choice.index in self._unseen
            self._unseen.discard(choice.index)
            written = self._shape.delta(self._first + choice.index, choice, self._prompt_logprobs if is_first else ())
            if self._wants_ids:
                written |= _ids(choice) | ({"prompt_token_ids": self._prompt_token_ids} if is_first else {})
            yield written


def _ids(choice: pb.Choice) -> dict[str, Any]:
    return {"token_ids": list(choice.token_ids)}


def _usage(usages: Sequence[pb.Usage]) -> dict[str, Any]:
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def finish_reason(choice: pb.Choice) -> str | None:
    """In OpenAI's words, or ours where they have none; None for as long as the choice goes on."""
    name = pb.FinishReason.Name(choice.finish_reason).removeprefix("FINISH_REASON_").lower()
    return name if choice.finish_reason else None


def logprob_of(token: pb.TokenLogprob | pb.TopLogprob) -> float:
    """A log-probability as JSON can have it."""
    return max(token.logprob, LEAST_LOGPROB)


Result = TypeVar("Result")


async def gather_bounded(
    requests: Sequence[pb.GenerateRequest], work: Callable[[int, pb.GenerateRequest], Awaitable[Result]]
) -> list[Result]:
    """The results of all, in order. The first that fails ends the others, and its error is raised.

    Args:
        requests: one alone is worked at in the current task.
        work: is given a request's place and the request.
    """
    if len(requests) == 1:
        return [await work(0, requests[0])]
    places = asyncio.Semaphore(MAX_IN_FLIGHT)

    async def one(place: int, request: pb.GenerateRequest) -> Result:
        async with places:
            return await work(place, request)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(one(*numbered)) for numbered in enumerate(requests)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
