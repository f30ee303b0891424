"""`vllm.grpc.engine.VllmEngine`, which SMG's router and the endpoint picker of llm-d speak, next to `yuan.v1`.

Requests become those of `yuan.v1`, so that checks, limits, deadlines and logs are the same. Responses have token ids
and no text. Methods for embeddings, profiles and cache events are UNIMPLEMENTED.
"""

import time
from datetime import UTC, datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import grpc
from smg_grpc_proto import vllm_engine_pb2 as vpb
from smg_grpc_proto.generated import common_pb2

from yuan_grpc.server.core.generation_service import GenerationService
from yuan_grpc.server.core.inflight import call_owner
from yuan_grpc.server.engine.load import EngineLoad
from yuan_grpc.server.errors import RequestNotFoundError, UnavailableError
from yuan_grpc.server.grpc import vllm_convert
from yuan_grpc.server.grpc.stream_writer import StreamWriter
from yuan_grpc.server.grpc.tokenizer_archive import TokenizerArchive
from yuan_grpc.server.settings.mesh import ENGINE_SERVICE as NAME

CONNECTION = NAME
"""Namespace of the request ids of all callers. Routers choose unique ids, and abort over another connection."""

CHUNK_BYTES = 64 * 1024
"""Size of a message of GetTokenizer, in bytes."""

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]


class VllmEngineService:
    """The RPC handlers. They raise errors, which `StatusInterceptor` turns into statuses."""

    def __init__(self, generation_service: GenerationService) -> None:
        self._service = generation_service
        self._started = time.monotonic()
        self._archive = TokenizerArchive()

    def attach(self, server: grpc.aio.Server) -> None:
        """Register the service on a server that has not started yet."""
        unary = (self.HealthCheck, self.Abort, self.GetModelInfo, self.GetServerInfo, self.GetLoads)
        handlers = {method.__name__: _unary_handler(method) for method in unary}
        handlers["Generate"] = _stream_handler(self.Generate, vpb.GenerateRequest)
        handlers["GetTokenizer"] = _stream_handler(self.GetTokenizer, common_pb2.GetTokenizerRequest)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(NAME, handlers),))
        server.add_registered_method_handlers(NAME, handlers)

    async def Generate(self, request: Any, context: "Context") -> None:
        """Write chunks as tokens are generated and each choice when it ends; unless `stream`, the choices only."""
        converted = vllm_convert.to_generate_request(request, self._service.engine.info)
        arguments = converted, context.time_remaining(), CONNECTION
        writer = StreamWriter(context, lambda: request.request_id)
        if not request.stream:
            for message in vllm_convert.complete_responses(request, await self._service.generate(*arguments)):
                await writer.write(message)
            return
        async with self._service.stream(*arguments) as messages:
            converter = vllm_convert.StreamConverter(request)
            async for message in messages:
                for response in converter.convert(message):
                    await writer.write(response)

    async def HealthCheck(self, request: Any, context: "Context") -> Any:
        """Return whether the engine accepts requests."""
        try:
            _ = self._service.engine
        except UnavailableError as error:
            return vpb.HealthCheckResponse(healthy=False, message=str(error))
        return vpb.HealthCheckResponse(healthy=True, message="the model is served")

    async def Abort(self, request: Any, context: "Context") -> Any:
        """End running calls of this service. Ids of calls that have ended are ignored."""
        owner = call_owner(CONNECTION) or CONNECTION
        for request_id in request.request_ids:
            try:
                await self._service.inflight.abort(request_id, owner)
            except RequestNotFoundError:
                continue
        return vpb.AbortResponse()

    async def GetModelInfo(self, request: Any, context: "Context") -> Any:
        """Describe the served model."""
        engine = self._service.engine
        info, tokenizer = engine.info, engine.tokenizer_info

        async def token_id(name: str) -> int:
            ids = await engine.tokenize(str(tokenizer.get(name) or ""))
            return ids[0] if len(ids) == 1 else 0

        return vpb.GetModelInfoResponse(
            model_path=info.path,
            is_generation=True,
            max_context_length=info.max_model_len,
            max_req_input_len=info.max_model_len,
            vocab_size=info.vocab_size,
            served_model_name=info.name,
            tokenizer_path=info.path,
            model_type="yuan",
            architectures=["YuanForCausalLM"],
            eos_token_ids=info.end_token_ids,
            pad_token_id=await token_id("pad_token"),
            bos_token_id=await token_id("bos_token"),
        )

    async def GetServerInfo(self, request: Any, context: "Context") -> Any:
        """Describe the server."""
        info = self._service.engine.info
        return vpb.GetServerInfoResponse(
            active_requests=self._service.inflight.count,
            uptime_seconds=time.monotonic() - self._started,
            server_type="vllm-grpc",
            data_parallel_size=info.data_parallel,
            model_dtype=f"torch.{info.dtype}",
            max_num_seqs=info.max_num_seqs,
        )

    async def GetLoads(self, request: Any, context: "Context") -> Any:
        """Return the load of each data-parallel rank."""
        loads = self._service.engine.loads
        if request.HasField("dp_rank"):
            loads = [load for load in loads if load.rank == request.dp_rank]
        return vpb.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=version("yuan-grpc"),
            dp_rank_count=len(loads),
            loads=map(_scheduler_load, loads),
        )

    async def GetTokenizer(self, request: Any, context: "Context") -> None:
        """Write the files of the tokenizer as a zip archive."""
        info, writer = self._service.engine.info, StreamWriter(context, str)
        data, digest = await self._archive.read(info.path, info.revision)
        for start in range(0, len(data), CHUNK_BYTES):
            end = start + CHUNK_BYTES
            chunk = common_pb2.GetTokenizerChunk(data=data[start:end], sha256=digest if end >= len(data) else "")
            await writer.write(chunk)


def _scheduler_load(load: EngineLoad) -> Any:
    return vpb.SchedulerLoad(
        dp_rank=load.rank,
        num_running_reqs=load.num_running,
        num_waiting_reqs=load.num_waiting,
        num_total_reqs=load.num_running + load.num_waiting,
        num_used_tokens=round(load.kv_cache_usage * load.kv_cache_tokens),
        max_total_num_tokens=load.kv_cache_tokens,
        token_usage=load.kv_cache_usage,
        utilization=load.kv_cache_usage,
        gen_throughput=load.tokens_per_second,
        max_running_requests=load.max_num_seqs,
    )


def _unary_handler(method: Any) -> "grpc.RpcMethodHandler[Any, Any]":
    request, response = (getattr(vpb, f"{method.__name__}{suffix}") for suffix in ("Request", "Response"))
    return grpc.unary_unary_rpc_method_handler(
        method, request_deserializer=request.FromString, response_serializer=response.SerializeToString
    )


def _stream_handler(method: Any, request: Any) -> "grpc.RpcMethodHandler[Any, Any]":
    return grpc.unary_stream_rpc_method_handler(
        method,
        request_deserializer=request.FromString,
        response_serializer=lambda message: message.SerializeToString(),
    )
