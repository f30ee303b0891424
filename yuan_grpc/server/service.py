"""The RPCs of `yuan.v1.YuanService`, one short method each."""

import asyncio
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager
from typing import TYPE_CHECKING

import grpc

from yuan_grpc.server import translate
from yuan_grpc.server.errors import DuplicateRequestError, UnavailableError
from yuan_grpc.server.generation import Engine, Step
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

NAME = pb.DESCRIPTOR.services_by_name["YuanService"].full_name

if TYPE_CHECKING:
    UnaryContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateResponse]
    StreamContext = grpc.aio.ServicerContext[pb.GenerateRequest, pb.GenerateStreamResponse]


class YuanService(yuan_pb2_grpc.YuanServiceServicer):
    """Handlers raise; `StatusInterceptor` turns that into statuses. A handler that is cancelled frees its request."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._running: set[str] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    async def Generate(self, request: pb.GenerateRequest, context: "UnaryContext") -> pb.GenerateResponse:
        """Answers once, when all choices are finished."""
        with self._named(request):
            reply, steps = await self._begin(request, stream=False)
            async with aclosing(steps):
                return reply.whole(await anext(steps))

    async def GenerateStream(self, request: pb.GenerateRequest, context: "StreamContext") -> None:
        """Answers piece by piece. Writes instead of yielding, so that a cancelled write ends this very frame."""
        with self._named(request):
            reply, steps = await self._begin(request, stream=True)
            async with aclosing(steps):
                async for step in steps:
                    await context.write(reply.part(step))

    async def idle(self) -> None:
        """Returns when no call is running, and every one that ran has freed its request."""
        await self._idle.wait()

    async def _begin(
        self, request: pb.GenerateRequest, *, stream: bool
    ) -> tuple[translate.Reply, AsyncGenerator[Step, None]]:
        """Checks the request; nothing is asked of the engine before the steps are iterated."""
        if not self._engine.ready:
            raise UnavailableError("the model is not being served: it is still loading, or the server is stopping")
        info = self._engine.info
        prompt = list(request.prompt_token_ids.ids) or await self._engine.tokenize(request.prompt)
        sampling = translate.sampling_of(request, prompt, info)
        reply = translate.Reply(
            request.request_id, info.name, len(prompt), self._echo(request, sampling.skip_special_tokens)
        )
        return reply, self._engine.generate(request.request_id, prompt, sampling, stream=stream)

    def _echo(self, request: pb.GenerateRequest, skip_special_tokens: bool) -> str:
        if not request.echo:
            return ""
        ids = request.prompt_token_ids.ids
        return self._engine.detokenize(ids, skip_special_tokens=skip_special_tokens) if ids else request.prompt

    @contextmanager
    def _named(self, request: pb.GenerateRequest) -> Iterator[None]:
        """Keeps others from taking the request's name while the call runs."""
        if request.request_id in self._running:
            raise DuplicateRequestError(f"`request_id` must not be that of a call still running: {request.request_id}")
        self._running.add(request.request_id)
        self._idle.clear()
        try:
            yield
        finally:
            self._running.discard(request.request_id)
            if not self._running:
                self._idle.set()
