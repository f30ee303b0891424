"""Answers to requests, whole or in parts: what every way into the service shares."""

from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from secrets import randbits
from uuid import uuid4

from yuan_grpc.server import checks, requests
from yuan_grpc.server.beam import BeamSearch
from yuan_grpc.server.calls import Calls
from yuan_grpc.server.errors import UnavailableError
from yuan_grpc.server.generation import Engine, Job, Run
from yuan_grpc.server.pacing import Pause, cut_off, paced
from yuan_grpc.server.replies import Reply
from yuan_grpc.server.runs import BestOf, Gathering, Sampled
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
        with self.calls.running(_named(request)):
            reply, run, choices = await self._begin(request, stream=request.partial_on_deadline)
            gathering = Gathering(choices)
            steps = paced(run.steps(), seconds=_cut_off(request, seconds))
            async with aclosing(steps):
                async for step in steps:
                    gathering.add(await run.rest() if isinstance(step, Pause) else step)
            return reply.whole(gathering.whole())

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
        reply, run, _ = await self._begin(request, stream=True)
        heartbeat = requests.heartbeat_seconds(request)
        steps = paced(run.steps(), heartbeat=heartbeat, seconds=_cut_off(request, seconds))
        async with aclosing(steps):
            async for step in steps:
                step = await run.rest() if step is Pause.DEADLINE else step
                for part in reply.heartbeat() if isinstance(step, Pause) else reply.parts(step):
                    yield part

    async def _begin(self, request: pb.GenerateRequest, *, stream: bool) -> tuple[Reply, Run, int]:
        """Checks the request; nothing is asked of the engine before the run's steps are iterated.

        Returns:
            What builds the responses, what yields their content, and how many choices it has.
        """
        engine = self.engine
        text, whole = await self._prompt(request)
        prompt = requests.truncated(request, whole, engine.info)
        checks.check_generate(request, prompt, engine.info, engine.loras)
        work = requests.work_of(request, prompt, engine.info)
        job = _seeded(work.job)
        n, echo = (work.beam or job.sampling).n, self._echo(request, text, prompt, len(prompt) < len(whole))
        reply = Reply(request, request.model or engine.info.name, prompt, echo, job.sampling.seed)
        if work.beam:
            return reply, BeamSearch(engine, job, work.beam, stream=stream), n
        if work.best_of > n:
            return reply, BestOf(engine, job, work.best_of), n
        return reply, Sampled(engine, job, stream=stream), n

    async def _prompt(self, request: pb.GenerateRequest) -> tuple[str, Sequence[int]]:
        """The prompt's text, where it was one, and all of its tokens."""
        ids, text = request.prompt_token_ids.ids, request.prompt
        if request.messages and request.WhichOneof("input") is None:
            text = self._engine.conversation([message.content for message in request.messages])
        return text, list(ids) or await self._engine.tokenize(text)

    def _echo(self, request: pb.GenerateRequest, text: str, prompt: Sequence[int], is_cut: bool) -> str:
        if not request.echo:
            return ""
        if text and not is_cut:
            return text
        skip = requests.skips_special_tokens(request)
        return self._engine.detokenize(prompt, skip_special_tokens=skip)


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


def _cut_off(request: pb.GenerateRequest, seconds: float | None) -> float | None:
    """After how many seconds the answer is to be cut short; None for never."""
    return cut_off(seconds) if request.partial_on_deadline and seconds is not None else None
