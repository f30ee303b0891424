"""Complete and streamed responses in OpenAI's format, for completions and chat."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

from yuan_grpc.server.core.convert import num_choices, num_parallel
from yuan_grpc.server.core.queue_feeder import QueueFeeder
from yuan_grpc.server.http.call import SERVER_SENT_EVENTS, HttpCall, encode_chunk, encode_json
from yuan_grpc.server.http.errors import naming_fields
from yuan_grpc.server.http.openai.params import ResponseOptions
from yuan_grpc.server.http.openai.tokens import Prompt, TokenTexts, locate_prompt
from yuan_grpc.v1 import yuan_pb2 as pb

Result = TypeVar("Result")

_NO_PROMPT = Prompt()

INLINE_BYTES = 2**15
"""Size of a message above which it is converted outside the event loop: this many bytes take about 15 ms."""


@dataclass(frozen=True)
class OpenAIRequest:
    """A parsed request body.

    Attributes:
        requests: one request per prompt.
        model: the model name that the client used; empty if it gave none.
        options: how to respond.
        field_names: for each request, the names that the client used for fields of `GenerateRequest`.
    """

    requests: Sequence[pb.GenerateRequest]
    model: str
    options: ResponseOptions
    field_names: Sequence[Mapping[str, str]]


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

    def full(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        """Return a complete choice."""

    def delta(self, index: int, choice: pb.Choice, prompt: Prompt) -> dict[str, Any]:
        """Return a chunk of a choice. `prompt` is empty except for the choice's first chunk."""


async def send_response(
    call: HttpCall, parsed: OpenAIRequest, create_format: Callable[[TokenTexts], ChoiceFormat]
) -> None:
    """Generate, and send a complete or streamed response."""
    [first, *_] = parsed.requests
    skip = not first.HasField("skip_special_tokens") or first.skip_special_tokens
    engine = call.state.service.engine
    texts = TokenTexts(engine, as_ids=parsed.options.tokens_as_ids, skip_special_tokens=skip)
    response = _Response(call, parsed, create_format(texts))
    await call.run_until_disconnect(response.stream() if parsed.options.stream else response.send())


class _Response:
    """The response to one call. Choices are numbered across all prompts."""

    def __init__(self, call: HttpCall, parsed: OpenAIRequest, choice_format: ChoiceFormat) -> None:
        self._call = call
        self._parsed = parsed
        self._options = parsed.options
        self._format = choice_format
        self._service = call.state.service
        self._header = {
            "id": f"{choice_format.id_prefix}{call.request_id}",
            "object": choice_format.chunk_object_type if parsed.options.stream else choice_format.object_type,
            "created": int(time.time()),
            "model": parsed.model or self._service.engine.info.name,
        }
        self._usages = [pb.Usage() for _ in parsed.requests]
        self._write_lock = asyncio.Lock()
        self._has_started = False

    async def send(self) -> None:
        responses = await self._gather(self._generate)
        prompts = [await self._prompt(*pair) for pair in zip(self._parsed.requests, responses, strict=True)]
        if sum(response.ByteSize() for response in responses) > INLINE_BYTES:
            text = await asyncio.to_thread(lambda: encode_json(self._content(responses, prompts), in_loop=False))
            await self._call.respond_encoded(text.encode())
        else:
            await self._call.respond(self._content(responses, prompts))

    async def _generate(self, _: int, request: pb.GenerateRequest) -> pb.GenerateResponse:
        return await self._call.generate(request)

    async def _prompt(self, request: pb.GenerateRequest, response: pb.GenerateResponse) -> Prompt:
        prompt = Prompt(list(response.prompt_token_ids), list(response.prompt_logprobs))
        if prompt.logprobs:
            await locate_prompt(prompt, request, self._service)
        return prompt

    def _content(self, responses: Sequence[pb.GenerateResponse], prompts: Sequence[Prompt]) -> dict[str, Any]:
        choices = []
        for index, (request, response, prompt) in enumerate(
            zip(self._parsed.requests, responses, prompts, strict=True)
        ):
            for choice in response.choices:
                choices.append(self._format.full(index * num_choices(request) + choice.index, choice, prompt))
                if self._options.return_token_ids:
                    choices[-1] |= _token_ids(choice) | {"prompt_token_ids": prompt.token_ids}
        usage = _total_usage([response.usage for response in responses])
        return self._header | {"choices": choices, "usage": usage}

    async def stream(self) -> None:
        await self._gather(self._stream_prompt)
        if self._options.include_usage:
            await self._call.write_chunk(self._header | {"choices": [], "usage": _total_usage(self._usages)})
        await self._call.write_bytes(b"data: [DONE]\n\n")
        await self._call.end_stream()

    async def _stream_prompt(self, prompt_index: int, request: pb.GenerateRequest) -> None:
        include_token_ids = self._options.return_token_ids
        chunks = _PromptChunks(self._format, request, prompt_index * num_choices(request), include_token_ids)
        async with self._call.stream(request) as messages:
            async for message in messages:
                self._count_tokens(prompt_index, message)
                chunks.add_prompt(message)
                if message.choices and chunks.has_unlocated_prompt:
                    await locate_prompt(chunks.prompt, request, self._service)
                async with self._write_lock:  # while a prompt waits here, its engine request accumulates output
                    if not self._has_started:
                        self._has_started = True
                        await self._call.start_stream(SERVER_SENT_EVENTS)
                    if {field.name for field, _ in message.ListFields()} <= {"request_id", "model"}:  # a heartbeat
                        await self._call.write_bytes(b":\n\n")
                    await self._write_choices(chunks, message)

    def _count_tokens(self, prompt_index: int, message: pb.GenerateStreamResponse) -> None:
        if message.HasField("usage"):
            self._usages[prompt_index] = message.usage
        elif self._options.continuous_usage:
            self._usages[prompt_index].completion_tokens += sum(len(choice.token_ids) for choice in message.choices)

    async def _write_choices(self, chunks: "_PromptChunks", message: pb.GenerateStreamResponse) -> None:
        common = self._header | self._chunk_usage()
        is_small = chunks.size_with(message) <= INLINE_BYTES
        encoded: Iterable[bytes] = (
            encode_chunk(common | {"choices": [choice]}, SERVER_SENT_EVENTS, in_loop=is_small)
            for choice in chunks.convert(message)
        )
        if not is_small:
            encoded = await asyncio.to_thread(list, encoded)
        for chunk in encoded:
            await self._call.write_bytes(chunk)

    def _chunk_usage(self) -> dict[str, Any]:
        if self._options.continuous_usage:
            return {"usage": _total_usage(self._usages)}
        return {"usage": None} if self._options.include_usage else {}

    async def _gather(self, run: Callable[[int, pb.GenerateRequest], Awaitable[Result]]) -> list[Result]:
        """Run the requests concurrently, as many as the queue can hold, and return their results in order.

        The first failure cancels the others and is raised. A single request runs in the current task.
        """
        if len(self._parsed.requests) == 1:
            return [await self._run_one(run, 0)]
        feeder = QueueFeeder(self._service.queue_limit)

        async def run_permitted(index: int, request: pb.GenerateRequest) -> Result:
            async with feeder.permits.hold(num_parallel(request)):
                return await feeder.run(lambda: self._run_one(run, index))

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run_permitted(*numbered)) for numbered in enumerate(self._parsed.requests)]
        except BaseExceptionGroup as errors:
            error = errors.exceptions[0]
            raise error from error.__cause__
        return [task.result() for task in tasks]

    async def _run_one(self, run: Callable[[int, pb.GenerateRequest], Awaitable[Result]], index: int) -> Result:
        with naming_fields(self._parsed.field_names[index]):
            return await run(index, self._parsed.requests[index])


class _PromptChunks:
    """The chunks of one prompt's stream.

    Args:
        first_index: the index of the prompt's first choice.
        include_token_ids: whether choices have their token ids.

    Attributes:
        prompt: the parts of the prompt in the messages so far.
    """

    def __init__(
        self, choice_format: ChoiceFormat, request: pb.GenerateRequest, first_index: int, include_token_ids: bool
    ) -> None:
        self._format = choice_format
        self._first_index = first_index
        self._include_token_ids = include_token_ids
        self._not_opened = list(range(num_choices(request)))
        self._without_text = set(self._not_opened)
        self._prompt_size = 0
        self.prompt = Prompt()

    def add_prompt(self, message: pb.GenerateStreamResponse) -> None:
        """Keep the parts of the prompt for the first chunk of each choice."""
        if message.prompt_logprobs:
            self._prompt_size += message.ByteSize()
        self.prompt.token_ids += message.prompt_token_ids
        self.prompt.logprobs += message.prompt_logprobs

    @property
    def has_unlocated_prompt(self) -> bool:
        """Whether the prompt has log-probabilities without their offsets."""
        return bool(self.prompt.logprobs) and not self.prompt.text_offsets

    def size_with(self, message: pb.GenerateStreamResponse) -> int:
        """Return the size of a message in bytes, with the prompt that is kept for the first chunk with text."""
        return message.ByteSize() + (self._prompt_size if self._without_text else 0)

    def convert(self, message: pb.GenerateStreamResponse) -> Iterator[dict[str, Any]]:
        """Yield the chunks of a stream message."""
        for index in self._not_opened:
            if opening := self._format.opening(self._first_index + index):
                yield opening
        self._not_opened = []
        for choice in message.choices:
            is_first = choice.index in self._without_text
            self._without_text.discard(choice.index)
            prompt = self.prompt if is_first else _NO_PROMPT
            chunk = self._format.delta(self._first_index + choice.index, choice, prompt)
            if self._include_token_ids:
                chunk |= _token_ids(choice) | ({"prompt_token_ids": prompt.token_ids} if is_first else {})
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
