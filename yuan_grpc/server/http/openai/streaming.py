"""Complete and streamed responses in OpenAI's format, for completions and chat."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from yuan_grpc.server.core.convert import num_choices, num_parallel
from yuan_grpc.server.core.limits import MAX_IN_FLIGHT, Slots
from yuan_grpc.server.errors import InvalidRequestError
from yuan_grpc.server.http.call import SERVER_SENT_EVENTS, HttpCall, encode_chunk, encode_json
from yuan_grpc.server.http.errors import rename_fields
from yuan_grpc.v1 import yuan_pb2 as pb

INLINE_BYTES = 2**15
"""Size of a message above which it is converted outside the event loop: this many bytes take about 15 ms."""

MIN_LOGPROB = -9999.0
"""Lowest log-probability in a response: JSON has no minus infinity."""


@dataclass(frozen=True)
class OpenAIRequest:
    """A parsed request body.

    Attributes:
        requests: one request per prompt.
        model: the model name that the client used; empty if it gave none.
        stream: whether the response is streamed.
        include_usage: whether a stream ends with the token counts.
        field_names: the client's field names, by prefix of the names in `GenerateRequest`.
    """

    requests: Sequence[pb.GenerateRequest]
    model: str
    stream: bool
    include_usage: bool
    field_names: Mapping[str, str]


class ChoiceFormat(Protocol):
    """The JSON format of choices, which differs between completions and chat."""

    object_type: str
    """`object` of a complete response."""
    chunk_object_type: str
    """`object` of a chunk."""
    id_prefix: str
    """Prefix of response ids."""

    def opening(self, index: int) -> dict[str, Any] | None:
        """Return a choice's first chunk, sent before any of its text; None if the format has no such chunk."""

    def full(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        """Return a complete choice. `prompt` has the prompt's log-probabilities, if requested."""

    def delta(self, index: int, choice: pb.Choice, prompt: Sequence[pb.TokenLogprob]) -> dict[str, Any]:
        """Return a chunk of a choice. `prompt` is empty except for the first chunk with text."""


async def send_response(call: HttpCall, parsed: OpenAIRequest, choice_format: ChoiceFormat) -> None:
    """Generate, and send a complete or streamed response."""
    response = _Response(call, parsed, choice_format)
    try:
        await call.run_until_disconnect(response.stream() if parsed.stream else response.send())
    except InvalidRequestError as error:
        raise rename_fields(error, parsed.field_names) from error.__cause__


class _Response:
    """The response to one call. Choices are numbered across all prompts."""

    def __init__(self, call: HttpCall, parsed: OpenAIRequest, choice_format: ChoiceFormat) -> None:
        self._call = call
        self._parsed = parsed
        self._format = choice_format
        self._service = call.state.service
        self._header = {
            "id": f"{choice_format.id_prefix}{call.request_id}",
            "object": choice_format.chunk_object_type if parsed.stream else choice_format.object_type,
            "created": int(time.time()),
            "model": parsed.model or self._service.engine.info.name,
        }
        self._usages = [pb.Usage() for _ in parsed.requests]
        self._write_lock = asyncio.Lock()
        self._has_started = False

    async def send(self) -> None:
        async def generate(_: int, request: pb.GenerateRequest) -> pb.GenerateResponse:
            return await self._service.generate(request, connection=self._call.connection)

        responses = await gather_bounded(self._parsed.requests, generate)
        if sum(response.ByteSize() for response in responses) > INLINE_BYTES:
            text = await asyncio.to_thread(lambda: encode_json(self._content(responses), in_loop=False))
            await self._call.respond_encoded(text.encode())
        else:
            await self._call.respond(self._content(responses))

    def _content(self, responses: Sequence[pb.GenerateResponse]) -> dict[str, Any]:
        choices = []
        for prompt_index, (request, response) in enumerate(zip(self._parsed.requests, responses, strict=True)):
            for choice in response.choices:
                index = prompt_index * num_choices(request) + choice.index
                choices.append(self._format.full(index, choice, response.prompt_logprobs))
                if request.return_prompt_token_ids:
                    choices[-1] |= _token_ids(choice) | {"prompt_token_ids": list(response.prompt_token_ids)}
        usage = _total_usage([response.usage for response in responses])
        return self._header | {"choices": choices, "usage": usage}

    async def stream(self) -> None:
        await gather_bounded(self._parsed.requests, self._stream_prompt)
        if self._parsed.include_usage:
            await self._call.write_chunk(self._header | {"choices": [], "usage": _total_usage(self._usages)})
        await self._call.write_bytes(b"data: [DONE]\n\n")
        await self._call.end_stream()

    async def _stream_prompt(self, prompt_index: int, request: pb.GenerateRequest) -> None:
        chunks = _PromptChunks(self._format, request, prompt_index * num_choices(request))
        async with self._service.stream(request, connection=self._call.connection) as messages:
            async for message in messages:
                if message.HasField("usage"):
                    self._usages[prompt_index] = message.usage
                async with self._write_lock:  # while a prompt waits here, its engine request accumulates output
                    if not self._has_started:
                        self._has_started = True
                        await self._call.start_stream(SERVER_SENT_EVENTS)
                    if {field.name for field, _ in message.ListFields()} <= {"request_id", "model"}:  # a heartbeat
                        await self._call.write_bytes(b":\n\n")
                    await self._write_choices(chunks, message)

    async def _write_choices(self, chunks: "_PromptChunks", message: pb.GenerateStreamResponse) -> None:
        common = self._header | ({"usage": None} if self._parsed.include_usage else {})
        is_small = chunks.size_with(message) <= INLINE_BYTES
        encoded: Iterable[bytes] = (
            encode_chunk(common | {"choices": [choice]}, SERVER_SENT_EVENTS, in_loop=is_small)
            for choice in chunks.convert(message)
        )
        if not is_small:
            encoded = await asyncio.to_thread(list, encoded)
        for chunk in encoded:
            await self._call.write_bytes(chunk)


class _PromptChunks:
    """The chunks of one prompt's stream.

    Args:
        first_index: the index of the prompt's first choice.
    """

    def __init__(self, choice_format: ChoiceFormat, request: pb.GenerateRequest, first_index: int) -> None:
        self._format = choice_format
        self._first_index = first_index
        self._include_token_ids = request.return_prompt_token_ids
        self._not_opened = list(range(num_choices(request)))
        self._without_text = set(self._not_opened)
        self._prompt_token_ids: list[int] = []
        self._prompt_logprobs: list[pb.TokenLogprob] = []
        self._prompt_size = 0

    def size_with(self, message: pb.GenerateStreamResponse) -> int:
        """Return the size of a message and of what was kept for the first chunk with text, in bytes."""
        size = message.ByteSize()
        if message.prompt_logprobs:
            self._prompt_size += size
        return size + (self._prompt_size if self._without_text else 0)

    def convert(self, message: pb.GenerateStreamResponse) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream message."""
        self._prompt_token_ids += message.prompt_token_ids
        self._prompt_logprobs += message.prompt_logprobs
        for index in self._not_opened:
            if opening := self._format.opening(self._first_index + index):
                yield opening
        self._not_opened = []
        for choice in message.choices:
            is_first = choice.index in self._without_text
            self._without_text.discard(choice.index)
            prompt_logprobs = self._prompt_logprobs if is_first else ()
            chunk = self._format.delta(self._first_index + choice.index, choice, prompt_logprobs)
            if self._include_token_ids:
                chunk |= _token_ids(choice) | ({"prompt_token_ids": self._prompt_token_ids} if is_first else {})
            yield chunk


def _token_ids(choice: pb.Choice) -> dict[str, Any]:
    return {"token_ids": list(choice.token_ids)}


def _total_usage(usages: Sequence[pb.Usage]) -> dict[str, Any]:
    prompt, completion = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in usages)},
    }


def finish_reason(choice: pb.Choice) -> str | None:
    """Return OpenAI's finish reason, or ours where OpenAI has none; None while the choice is unfinished."""
    name = pb.FinishReason.Name(choice.finish_reason).removeprefix("FINISH_REASON_").lower()
    return name if choice.finish_reason else None


def finite_logprob(token: pb.TokenLogprob | pb.TopLogprob) -> float:
    """Return a token's log-probability as a number that JSON can represent."""
    return max(token.logprob, MIN_LOGPROB)


Result = TypeVar("Result")


async def gather_bounded(
    requests: Sequence[pb.GenerateRequest], run: Callable[[int, pb.GenerateRequest], Awaitable[Result]]
) -> list[Result]:
    """Run requests concurrently, up to the in-flight limit on their choices, and return their results in order.

    The first failure cancels the others and is raised. A single request runs in the current task.

    Args:
        requests: the requests, at least one.
        run: a function of a request's index and the request.
    """
    if len(requests) == 1:
        return [await run(0, requests[0])]
    slots = Slots(MAX_IN_FLIGHT)

    async def run_in_slot(index: int, request: pb.GenerateRequest) -> Result:
        async with slots.hold(num_parallel(request)):
            return await run(index, request)

    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(run_in_slot(*numbered)) for numbered in enumerate(requests)]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
