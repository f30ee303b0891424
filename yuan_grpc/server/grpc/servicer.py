"""The servicer of `yuan.v1.YuanService`, with one short method per RPC."""

from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc import __version__
from yuan_grpc.server.core import response, tokenization, validation
from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.inflight import call_owner
from yuan_grpc.server.core.queue_feeder import QueueFeeder
from yuan_grpc.server.grpc import request_id
from yuan_grpc.server.grpc.batch import run_batch
from yuan_grpc.server.grpc.stream_writer import StreamWriter
from yuan_grpc.server.security.identity import current_identity
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

NAME = pb.DESCRIPTOR.services_by_name["YuanService"].full_name

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class YuanService(yuan_pb2_grpc.YuanServiceServicer):
    """The RPC handlers. They raise errors, which `StatusInterceptor` turns into statuses, and free their engine
    requests when cancelled.
    """

    def __init__(self, generation_service: GenerationService) -> None:
        self._service = generation_service

    async def Generate(self, request: pb.GenerateRequest, context: "Context") -> pb.GenerateResponse:
        """Return one response when all choices are finished."""
        connection = request_id.set_from_metadata(request, context, self._service.inflight)
        return await self._service.generate(request, context.time_remaining(), connection)

    async def GenerateStream(self, request: pb.GenerateRequest, context: "Context") -> None:
        """Write the response incrementally.

        Messages are written, not yielded, so that a cancelled write raises in this method and frees the request.
        """
        connection = request_id.set_from_metadata(request, context, self._service.inflight)
        writer = StreamWriter(context, lambda: request.request_id)
        async with self._service.stream(request, context.time_remaining(), connection) as messages:
            async for message in messages:
                await writer.write(message)

    async def GenerateBatch(self, items: AsyncIterator[pb.GenerateBatchRequest], context: "Context") -> None:
        """Write the result of each request of the batch when it is finished."""

        async def generate(request: pb.GenerateRequest) -> pb.GenerateResponse:
            return await self._service.generate(request, context.time_remaining(), context.peer())

        with self._service.inflight.track_unnamed():
            feeder = QueueFeeder(self._service.queue_limit)
            writer = StreamWriter(context, lambda: request_id.from_metadata(context))
            await run_batch(items, generate, writer.write, feeder)

    async def Abort(self, request: pb.AbortRequest, context: "Context") -> pb.AbortResponse:
        """End a running call of the same caller, or of any for an administrator, by its request id."""
        validation.validate_abort(request)
        identity, owner = current_identity(), call_owner(context.peer())
        may_end_all = bool(identity.name) and identity.is_admin
        await self._service.inflight.abort(request.request_id, owner or "", of_all=may_end_all)
        return pb.AbortResponse()

    async def Tokenize(self, request: pb.TokenizeRequest, context: "Context") -> pb.TokenizeResponse:
        """Tokenize a text or a conversation."""
        return await tokenization.tokenize(self._service, request)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: "Context") -> pb.DetokenizeResponse:
        """Convert token ids to text."""
        return await tokenization.detokenize(self._service, request)

    async def GetModel(self, request: pb.GetModelRequest, context: "Context") -> pb.GetModelResponse:
        """Describe the served model and its limits."""
        engine = self._service.engine
        return response.model_response(engine.info, __version__, engine.loras)

    async def GetLoads(self, request: pb.GetLoadsRequest, context: "Context") -> pb.GetLoadsResponse:
        """Return the load of the engine."""
        return response.loads_response(self._service.engine.loads)

    async def ListLoras(self, request: pb.ListLorasRequest, context: "Context") -> pb.ListLorasResponse:
        """List the loaded adapters and those that can be loaded."""
        engine = self._service.engine
        return pb.ListLorasResponse(loras=[pb.Lora(name=n) for n in engine.loras], available=engine.available_loras)

    async def LoadLora(self, request: pb.LoadLoraRequest, context: "Context") -> pb.LoadLoraResponse:
        """Load an adapter by name."""
        await self._service.engine.load_lora(request.name)
        return pb.LoadLoraResponse(lora=pb.Lora(name=request.name))

    async def UnloadLora(self, request: pb.UnloadLoraRequest, context: "Context") -> pb.UnloadLoraResponse:
        """Unload an adapter by name."""
        await self._service.engine.unload_lora(request.name)
        return pb.UnloadLoraResponse()
