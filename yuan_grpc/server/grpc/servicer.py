"""The RPCs of `yuan.v1.YuanService`, one short method each."""

import asyncio
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc import __version__
from yuan_grpc.server.core import response, validation
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.grpc.batch import run_batch
from yuan_grpc.server.grpc.stream_writer import StreamWriter
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

NAME = pb.DESCRIPTOR.services_by_name["YuanService"].full_name

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class YuanService(yuan_pb2_grpc.YuanServiceServicer):
    """Handlers raise; `StatusInterceptor` turns that into statuses. A handler that is cancelled frees its request."""

    def __init__(self, answers: GenerationService) -> None:
        self._answers = answers

    async def Generate(self, request: pb.GenerateRequest, context: "Context") -> pb.GenerateResponse:
        """Answers once, when all choices are finished."""
        return await self._answers.generate(request, context.time_remaining())

    async def GenerateStream(self, request: pb.GenerateRequest, context: "Context") -> None:
        """Answers piece by piece. Writes instead of yielding, so that a cancelled write ends this very frame."""
        writer = StreamWriter(context)
        async with self._answers.stream(request, context.time_remaining()) as parts:
            async for part in parts:
                await writer.write(part)

    async def GenerateBatch(self, items: AsyncIterator[pb.GenerateBatchRequest], context: "Context") -> None:
        """Answers each of many requests as soon as it is finished."""

        async def answer(request: pb.GenerateRequest) -> pb.GenerateResponse:
            return await self._answers.generate(request, context.time_remaining())

        with self._answers.inflight.track_unnamed():
            await run_batch(items, answer, StreamWriter(context).write)

    async def Abort(self, request: pb.AbortRequest, context: "Context") -> pb.AbortResponse:
        """Ends a running call by its name."""
        validation.validate_abort(request)
        await self._answers.inflight.abort(request.request_id)
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: "Context") -> pb.TokenizeResponse:
        """Text, or a conversation, to tokens."""
        validation.validate_tokenize(request)
        engine = self._answers.engine
        text = request.prompt
        if request.messages:
            validation.validate_messages(request.messages)
            text = engine.apply_chat_template([message.content for message in request.messages])
        return await asyncio.to_thread(response.tokenize_response, text, await engine.tokenize_with_offsets(text))

    async def Detokenize(self, request: pb.DetokenizeRequest, context: "Context") -> pb.DetokenizeResponse:
        """Token ids to text."""
        engine = self._answers.engine
        validation.validate_detokenize(request, engine.info)
        skip, ids = request.skip_special_tokens, request.token_ids
        return pb.DetokenizeResponse(text=await asyncio.to_thread(engine.detokenize, ids, skip_special_tokens=skip))

    async def GetModel(self, request: pb.GetModelRequest, context: "Context") -> pb.GetModelResponse:
        """What is served, and the limits."""
        engine = self._answers.engine
        return response.model_response(engine.info, __version__, engine.loras)

    async def ListLoras(self, request: pb.ListLorasRequest, context: "Context") -> pb.ListLorasResponse:
        """The loaded adapters, and those that could be."""
        engine = self._answers.engine
        return pb.ListLorasResponse(loras=[pb.Lora(name=n) for n in engine.loras], available=engine.available_loras)

    async def LoadLora(self, request: pb.LoadLoraRequest, context: "Context") -> pb.LoadLoraResponse:
        """Loads an adapter by name."""
        await self._answers.engine.load_lora(request.name)
        return pb.LoadLoraResponse(lora=pb.Lora(name=request.name))

    async def UnloadLora(self, request: pb.UnloadLoraRequest, context: "Context") -> pb.UnloadLoraResponse:
        """Unloads an adapter by name."""
        await self._answers.engine.unload_lora(request.name)
        return pb.UnloadLoraResponse()
