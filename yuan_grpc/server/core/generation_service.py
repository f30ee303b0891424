"""Answers to requests, whole or in parts: what every way into the service shares."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from secrets import randbits
from uuid import uuid4

from yuan_grpc.server.core import convert, validation
from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.core.best_of import OutputAccumulator, best_of, replicate_choices
from yuan_grpc.server.core.deadline import deadline_event, with_heartbeats
from yuan_grpc.server.core.inflight import InflightRequests
from yuan_grpc.server.core.response import ResponseBuilder
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import INLINE_ENTRIES, EngineRequest, StepOutput
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.v1 import yuan_pb2 as pb

SEED_BITS = 48
"""Of a seed that the server draws: a number that any JSON reader keeps whole."""


class GenerationService:
    """Checks requests, runs them on the engine and builds what is answered; raises what `errors` has.

    Args:
        engine: what generates.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inflight = InflightRequests()

    @property
    def engine(self) -> Engine:
        """The engine, ready to be asked.

        Raises:
            UnavailableError: it is not.
        """
        if not self._engine.is_ready:
            raise UnavailableError("the model is not being served: it is still loading, or the server is stopping")
        return self._engine

    async def generate(self, request: pb.GenerateRequest, seconds: float | None = None) -> pb.GenerateResponse:
        """All choices, when they are finished. Cancelled, it frees what it held in the engine.

        Args:
            request: is given a name where it has none.
            seconds: how many are left until the caller's deadline, which matters to `partial_on_deadline` alone.
        """
        with self.inflight.track(_named(request)), deadline_event(_until(request, seconds)) as deadline:
            reply, outputs, choices = await self._begin(request, stream=False, deadline=deadline)
            gathering = OutputAccumulator(choices)
            async with aclosing(outputs):
                async for output in outputs:
                    gathering.add(output)
            whole = gathering.whole()
            if whole.entries > INLINE_ENTRIES:
                return await asyncio.to_thread(reply.build_response, whole)
            return reply.build_response(whole)

    @asynccontextmanager
    async def stream(
        self, request: pb.GenerateRequest, seconds: float | None = None
    ) -> AsyncGenerator[AsyncGenerator[pb.GenerateStreamResponse, None], None]:
        """The parts of an answer as they come. Leaving the block frees what they held in the engine; for the arguments
        see `whole`."""
        with self.inflight.track(_named(request)):
            parts = self._parts(request, seconds)
            async with aclosing(parts):
                yield parts

    async def _parts(
        self, request: pb.GenerateRequest, seconds: float | None
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        with deadline_event(_until(request, seconds)) as deadline:
            reply, outputs, _ = await self._begin(request, stream=True, deadline=deadline)
            paced = with_heartbeats(outputs, convert.heartbeat_seconds(request))
            async with aclosing(paced):
                async for output in paced:
                    for part in reply.heartbeat() if output is None else reply.build_stream_messages(output):
                        yield part

    async def _begin(
        self, request: pb.GenerateRequest, *, stream: bool, deadline: asyncio.Event | None
    ) -> tuple[ResponseBuilder, AsyncGenerator[StepOutput, None], int]:
        """Checks the request; nothing is asked of the engine before the steps are iterated.

        Returns:
            What builds the responses, what yields their content, and how many choices it has.
        """
        engine = self.engine
        whole = list(request.prompt_token_ids.ids) or await engine.tokenize(self._text(request))
        prompt = convert.truncated(request, whole, engine.info)
        validation.validate_generate(request, prompt, engine.info, engine.loras)
        work = convert.plan_request(request, prompt, engine.info)
        engine_request = _seeded(work.engine_request)
        echo = await self.echo(request, prompt)
        reply = ResponseBuilder(request, request.model or engine.info.name, prompt, echo, engine_request.sampling.seed)
        if work.beam:
            return (
                reply,
                BeamSearch(engine, engine_request, work.beam, stream=stream, deadline=deadline).run(),
                work.beam.n,
            )
        n = engine_request.sampling.n
        if work.best_of > n:
            return reply, best_of(engine, engine_request, work.best_of, deadline=deadline), n
        if n > 1 and engine_request.sampling.is_greedy:
            one = replace(engine_request, sampling=replace(engine_request.sampling, n=1))
            return reply, replicate_choices(engine.generate(one, stream=stream, deadline=deadline), n), n
        return reply, engine.generate(engine_request, stream=stream, deadline=deadline), n

    async def echo(self, request: pb.GenerateRequest, prompt: Sequence[int]) -> str:
        """What each choice's text begins with, where that is asked for. The model sees `prompt` of it."""
        if not request.echo:
            return ""
        text, may_be_cut = self._text(request), request.HasField("truncate_prompt_tokens")
        if text and not (may_be_cut and len(prompt) < len(await self._engine.tokenize(text))):
            return text
        return self._engine.detokenize(prompt, skip_special_tokens=convert.skips_special_tokens(request))

    def _text(self, request: pb.GenerateRequest) -> str:
        """The prompt's, where it was one, or the conversation's."""
        if request.messages and request.WhichOneof("input") is None:
            return self._engine.apply_chat_template([message.content for message in request.messages])
        return request.prompt


def _named(request: pb.GenerateRequest) -> str:
    """The request's name, from now on: where it has none, one that no other has."""
    request.request_id = request.request_id or uuid4().hex
    return request.request_id


def _seeded(engine_request: EngineRequest) -> EngineRequest:
    """The job with a seed, where something is left to chance: so that an answer can be had again."""
    sampling = engine_request.sampling
    if sampling.is_greedy:
        return replace(engine_request, sampling=replace(sampling, seed=None))
    return (
        engine_request
        if sampling.seed is not None
        else replace(engine_request, sampling=replace(sampling, seed=randbits(SEED_BITS)))
    )


def _until(request: pb.GenerateRequest, seconds: float | None) -> float | None:
    """How many seconds are left to an answer that is to be what there is by then; None for any number."""
    return seconds if request.partial_on_deadline else None
