"""Answers to requests, whole or in parts: what every way into the service shares."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from secrets import randbits
from uuid import uuid4

from yuan_grpc.server import checks, requests
from yuan_grpc.server.beam import BeamSearch
from yuan_grpc.server.calls import Calls
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.server.generation import INLINE_ENTRIES, Engine, Job, Step
from yuan_grpc.server.pacing import cut_before, with_heartbeats
from yuan_grpc.server.replies import Reply
from yuan_grpc.server.runs import Gathering, alike, best_of
from yuan_grpc.v1 import yuan_pb2 as pb

SEED_BITS = 48
"""Of a seed that the server draws: a number that any JSON reader keeps whole."""


class Answers:
    """Checks requests, runs them on the engine and builds what is answered; raises what `errors` has.

    Args:
        engine: what generates.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.calls = Calls()

    @property
    def engine(self) -> Engine:
        """The engine, ready to be asked.

        Raises:
            UnavailableError: it is not.
        """
        if not self._engine.ready:
            raise UnavailableError("the model is not being served: it is still loading, or the server is stopping")
        return self._engine

    async def whole(self, request: pb.GenerateRequest, seconds: float | None = None) -> pb.GenerateResponse:
        """All choices, when they are finished. Cancelled, it frees what it held in the engine.

        Args:
            request: is given a name where it has none.
            seconds: how many are left until the caller's deadline, which matters to `partial_on_deadline` alone.
        """
        with self.calls.running(_named(request)), cut_before(_until(request, seconds)) as cut:
            reply, steps, choices = await self._begin(request, stream=False, cut=cut)
            gathering = Gathering(choices)
            async with aclosing(steps):
                async for step in steps:
                    gathering.add(step)
            whole = gathering.whole()
            if whole.entries > INLINE_ENTRIES:
                return await asyncio.to_thread(reply.whole, whole)
            return reply.whole(whole)

    @asynccontextmanager
    async def in_parts(
        self, request: pb.GenerateRequest, seconds: float | None = None
    ) -> AsyncGenerator[AsyncGenerator[pb.GenerateStreamResponse, None], None]:
        """The parts of an answer as they come. Leaving the block frees what they held in the engine; for the arguments
        see `whole`."""
        with self.calls.running(_named(request)):
            parts = self._parts(request, seconds)
            async with aclosing(parts):
                yield parts

    async def _parts(
        self, request: pb.GenerateRequest, seconds: float | None
    ) -> AsyncGenerator[pb.GenerateStreamResponse, None]:
        with cut_before(_until(request, seconds)) as cut:
            reply, steps, _ = await self._begin(request, stream=True, cut=cut)
            paced = with_heartbeats(steps, requests.heartbeat_seconds(request))
            async with aclosing(paced):
                async for step in paced:
                    for part in reply.heartbeat() if step is None else reply.parts(step):
                        yield part

    async def _begin(
        self, request: pb.GenerateRequest, *, stream: bool, cut: asyncio.Event | None
    ) -> tuple[Reply, AsyncGenerator[Step, None], int]:
        """Checks the request; nothing is asked of the engine before the steps are iterated.

        Returns:
            What builds the responses, what yields their content, and how many choices it has.
        """
        engine = self.engine
        whole = list(request.prompt_token_ids.ids) or await engine.tokenize(self._text(request))
        prompt = requests.truncated(request, whole, engine.info)
        checks.check_generate(request, prompt, engine.info, engine.loras)
        work = requests.work_of(request, prompt, engine.info)
        job = _seeded(work.job)
        echo = await self.echo(request, prompt)
        reply = Reply(request, request.model or engine.info.name, prompt, echo, job.sampling.seed)
        if work.beam:
            return reply, BeamSearch(engine, job, work.beam, stream=stream, cut=cut).steps(), work.beam.n
        n = job.sampling.n
        if work.best_of > n:
            return reply, best_of(engine, job, work.best_of, cut=cut), n
        if n > 1 and job.sampling.is_greedy:
            one = replace(job, sampling=replace(job.sampling, n=1))
            return reply, alike(engine.generate(one, stream=stream, cut=cut), n), n
        return reply, engine.generate(job, stream=stream, cut=cut), n

    async def echo(self, request: pb.GenerateRequest, prompt: Sequence[int]) -> str:
        """What each choice's text begins with, where that is asked for. The model sees `prompt` of it."""
        if not request.echo:
            return ""
        text, may_be_cut = self._text(request), request.HasField("truncate_prompt_tokens")
        if text and not (may_be_cut and len(prompt) < len(await self._engine.tokenize(text))):
            return text
        return self._engine.detokenize(prompt, skip_special_tokens=requests.skips_special_tokens(request))

    def _text(self, request: pb.GenerateRequest) -> str:
        """The prompt's, where it was one, or the conversation's."""
        if request.messages and request.WhichOneof("input") is None:
            return self._engine.conversation([message.content for message in request.messages])
        return request.prompt


def _named(request: pb.GenerateRequest) -> str:
    """The request's name, from now on: where it has none, one that no other has."""
    request.request_id = request.request_id or uuid4().hex
    return request.request_id


def _seeded(job: Job) -> Job:
    """The job with a seed, where something is left to chance: so that an answer can be had again."""
    sampling = job.sampling
    if sampling.is_greedy:
        return replace(job, sampling=replace(sampling, seed=None))
    return job if sampling.seed is not None else replace(job, sampling=replace(sampling, seed=randbits(SEED_BITS)))


def _until(request: pb.GenerateRequest, seconds: float | None) -> float | None:
    """How many seconds are left to an answer that is to be what there is by then; None for any number."""
    return seconds if request.partial_on_deadline else None
