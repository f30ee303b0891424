"""The asyncio client."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc.client import requests, types
from yuan_grpc.client.base import (
    BaseClient,
    BaseStream,
    PreparedCall,
    Readiness,
    check_many_arguments,
    check_readable,
    grpc_timeout,
    is_transient,
)
from yuan_grpc.client.channel import SERVICE
from yuan_grpc.client.connections import Connection, Connections
from yuan_grpc.client.errors import CancelledCallError, YuanError, error_from_rpc, translate_errors
from yuan_grpc.client.google_rpc import HEALTH_WATCH, SERVING, HealthCheckResponse
from yuan_grpc.client.types import Completion, Loras, Model, Result, Token
from yuan_grpc.client.window import Window
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from yuan_grpc.client.requests import MessageLike, Parameters, Prompt


_END = object()


class AsyncClient(BaseClient):
    """An asyncio client of a Yuan server, bound to the event loop in which it is first used.

    A failed call raises `YuanError`, an unknown parameter or a value of the wrong type TypeError, and a closed client
    RuntimeError. Cancelling a task cancels its call.
    """

    def _open(self) -> None:
        self._connections = Connections(self._connect, self._settings.connections)

    async def close(self) -> None:
        """Close all connections and cancel their calls. Closing twice is harmless."""
        self._closed = True
        for connection in self._connections.opened:
            await connection.channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_until_ready(self, timeout: float = 60.0, *, connect_timeout: float = math.inf) -> None:
        """Wait until the server reports that it is serving. It may still be unreachable or loading the model.

        If the target has several addresses, only one is checked.

        Raises:
            DeadlineError: the server was not ready within `timeout` seconds, or has not reported its health at all
                within `connect_timeout` seconds.
        """
        self._check_open()
        ready = Readiness(SERVICE, timeout, connect_timeout)
        while ready.remaining_seconds:
            try:
                if await self._is_serving(ready):
                    return
            except grpc.RpcError as error:
                ready.record_error(error)
                if not is_transient(error):
                    raise error_from_rpc(error) from error
            self._check_open()
            await asyncio.sleep(ready.poll_delay)
        raise ready.timeout_error()

    async def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """Generate a completion and return it when all choices are finished.

        Args:
            prompt: text, token ids, a conversation, or a GenerateRequest, whose fields the parameters override.
            parameters: see `Parameters`. `timeout` (seconds) and `metadata` apply to the call.
        """
        call = self._prepare_generation("Generate", prompt, parameters)
        return types.completion_of_call(await self._invoke(call), call.request_id)

    def stream(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> AsyncStream:
        """Start generating and return an iterator over the first choice's text. Takes the arguments of `generate`."""
        call = self._prepare_generation("GenerateStream", prompt, parameters)
        return AsyncStream(self, self._start(call), call.request_id)

    def generate_many(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        **parameters: Unpack[Parameters],
    ) -> AsyncGenerator[Result, None]:
        """Generate a completion for each prompt and yield the results; a failed request does not affect the others.

        The first requests are sent when the first result is requested. Closing the generator cancels all running
        requests; use `contextlib.aclosing` around a loop that may exit early.

        Args:
            prompts: any iterable, also async, even an endless one; it is read as capacity becomes free.
            concurrency: maximum number of running requests plus unread results.
            ordered: yield results in the order of the prompts, otherwise as they finish.
            parameters: as for `generate`, applied to every request; the timeout counts for each request separately.
        """
        self._check_open()
        check_many_arguments(parameters, concurrency)
        return self._many(_iterate(prompts), Window(concurrency, ordered=ordered), parameters)

    async def tokenize(self, prompt: str | Iterable[MessageLike], *, timeout: float | None = None) -> list[Token]:
        """Return the tokens the model would receive for a text or a conversation."""
        request = requests.tokenize_request(prompt)
        return types.tokens_from_proto(
            await self._invoke(self._prepare_with_short_timeout("Tokenize", request, timeout))
        )

    async def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """Return the text of token ids."""
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = (await self._invoke(self._prepare_with_short_timeout("Detokenize", request, timeout))).text
        return text

    async def model(self, *, timeout: float | None = None) -> Model:
        """Return the served model and its limits."""
        return types.model_from_proto(
            await self._invoke(self._prepare_with_short_timeout("GetModel", pb.GetModelRequest(), timeout))
        )

    async def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Abort a running call by its request id; that call raises `CancelledCallError`."""
        await self._invoke(self._prepare_with_short_timeout("Abort", pb.AbortRequest(request_id=request_id), timeout))

    async def loras(self, *, timeout: float | None = None) -> Loras:
        """Return the names of the loaded LoRA adapters and of those the server can load."""
        return types.loras_from_proto(
            await self._invoke(self._prepare_with_short_timeout("ListLoras", pb.ListLorasRequest(), timeout))
        )

    async def load_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Load an adapter from the server's LoRA folder."""
        await self._invoke(self._prepare_with_short_timeout("LoadLora", pb.LoadLoraRequest(name=name), timeout))

    async def unload_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Unload an adapter; running calls that use it continue."""
        await self._invoke(self._prepare_with_short_timeout("UnloadLora", pb.UnloadLoraRequest(name=name), timeout))

    def _connect(self) -> Connection:
        """Open a connection, on first use, because it belongs to the running event loop."""
        target, options = self._settings.uri, self._settings.channel_options()
        if self._credentials is None:
            channel = grpc.aio.insecure_channel(target, options, interceptors=self._interceptors)
        else:
            channel = grpc.aio.secure_channel(target, self._credentials, options, interceptors=self._interceptors)
        return Connection(channel, yuan_pb2_grpc.YuanServiceStub(channel))

    def _start(self, call: PreparedCall) -> Any:
        connection = self._connections.acquire(call.rpc, call.request_id)
        try:
            method = getattr(connection.stub, call.rpc)
            started = method(call.request, timeout=call.timeout, metadata=call.metadata)
        except BaseException:
            self._connections.release(connection, call.rpc, call.request_id)
            raise
        started.add_done_callback(lambda _: self._connections.release(connection, call.rpc, call.request_id))
        return started

    async def _invoke(self, call: PreparedCall) -> Any:
        started = self._start(call)
        with translate_errors(call.request_id):
            try:
                return check_readable(await started, call.request_id)
            except asyncio.CancelledError:
                self._raise_if_closed(call.request_id)
                raise

    def _raise_if_closed(self, request_id: str = "") -> None:
        """Raise `CancelledCallError` if the client was closed and the current task was not cancelled.

        gRPC raises CancelledError in both cases, which would otherwise end a task that was never cancelled.
        """
        if self._closed and not _is_task_cancelled():
            raise CancelledCallError(grpc.StatusCode.CANCELLED, "the client was closed", request_id=request_id)

    async def _many(
        self, prompts: AsyncGenerator[Prompt, None], window: Window, parameters: Parameters
    ) -> AsyncGenerator[Result, None]:
        running: set[asyncio.Task[None]] = set()
        next_prompt: asyncio.Task[Any] | None = None
        exhausted = False
        try:
            while True:
                if window.has_capacity and not exhausted and next_prompt is None:
                    next_prompt = asyncio.ensure_future(anext(prompts, _END))
                if window.is_ready:
                    yield window.pop()
                    continue
                if window.is_empty and next_prompt is None:
                    return
                # The source may be slow, or wait for results of running requests.
                tasks = [*running, next_prompt] if next_prompt else running
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in running & done:
                    running.discard(task)
                    task.result()  # re-raise programming errors
                if next_prompt in done:
                    prompt, next_prompt = next_prompt.result(), None
                    exhausted = prompt is _END
                    if not exhausted:
                        running.add(asyncio.ensure_future(self._run(window, window.start(), prompt, parameters)))
        finally:
            await _cancel([*running, *([next_prompt] if next_prompt else [])])
            await prompts.aclose()

    async def _run(self, window: Window, index: int, prompt: Prompt, parameters: Parameters) -> None:
        try:
            result = Result(index, prompt, await self.generate(prompt, **parameters), None)
        except YuanError as error:
            result = Result(index, prompt, None, error)
        window.finish(result)

    async def _is_serving(self, ready: Readiness) -> bool:
        """Watch the server's health; return True once it is serving, False if the watch ends first."""
        watch: Any = self._connections.first.channel.unary_stream(
            HEALTH_WATCH, lambda request: request.SerializeToString(), HealthCheckResponse.FromString
        )
        timeout, metadata = grpc_timeout(ready.remaining_seconds), self._metadata(())
        updates = watch(ready.request, timeout=timeout, metadata=metadata, wait_for_ready=True)
        try:
            async for health in updates:
                if health.status == SERVING:
                    return True
                ready.record_status(health.status)
            return False
        except asyncio.CancelledError:
            self._raise_if_closed()
            raise
        finally:
            updates.cancel()


class AsyncStream(BaseStream):
    """An async iterator over the first choice's text, as it is generated.

    The call starts immediately. It is cancelled when the stream is closed or garbage-collected, or when its `async
    with` block ends.
    """

    def __init__(self, client: AsyncClient, call: Any, request_id: str) -> None:
        super().__init__(call, request_id)
        self._client = client
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (message := await self._read()) is not grpc.aio.EOF:
            if delta := self._add(message):
                return delta
        self._check_complete()
        raise StopAsyncIteration

    async def _read(self) -> Any:
        try:
            with translate_errors(self._request_id):
                return await self._call.read()
        except asyncio.CancelledError:
            if self._closed and not _is_task_cancelled():
                return grpc.aio.EOF
            self._client._raise_if_closed(self._request_id)
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)  # any thread may collect it


async def _iterate(prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> AsyncGenerator[Prompt, None]:
    if isinstance(prompts, AsyncIterable):
        async for prompt in prompts:
            yield prompt
    else:
        for prompt in prompts:
            yield prompt


async def _cancel(tasks: list[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_task_cancelled() -> bool:
    """Return whether the current task was cancelled; always False before Python 3.11, which does not expose it."""
    task = asyncio.current_task()
    return task is not None and hasattr(task, "cancelling") and task.cancelling() > 0
