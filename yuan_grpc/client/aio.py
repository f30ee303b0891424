"""The client for asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc.client import requests, types
from yuan_grpc.client.base import Call, Caller, Readiness, Streaming, checked_many, deadline
from yuan_grpc.client.channel import SERVICE
from yuan_grpc.client.errors import CancelledCallError, YuanError, error_of, translated
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


class AsyncClient(Caller):
    """A connection to a Yuan server, of the event loop in which it is first used.

    Every call raises `YuanError` when it does not end well, TypeError for a keyword or a value that no request has, and
    RuntimeError when the client is closed. A task that is cancelled cancels its call.
    """

    _channel: grpc.aio.Channel | None = None

    async def close(self) -> None:
        """Ends the connection, and all calls that run over it. May be called twice."""
        self._closed = True
        if self._channel is not None:
            await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server's health says that it serves: also one that is not there yet, or is loading.

        Where the target has several addresses, one of them is asked.

        Raises:
            DeadlineError: it does not, after `timeout` seconds.
        """
        self._check_open()
        ready = Readiness(SERVICE, timeout)
        while ready.seconds:
            try:
                if await self._serves(ready):
                    return
            except grpc.RpcError as error:
                if not ready.refused(error):
                    raise error_of(error) from error
            self._check_open()
            await asyncio.sleep(ready.pause)
        raise ready.too_late()

    async def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """Generates, and returns when all choices are finished.

        Args:
            prompt: text, token ids, a conversation, or a ready request, over which the keywords then stand.
            parameters: see `Parameters`; `timeout` in seconds and `metadata` are of the call.
        """
        return types.answer_of(await self._ask(self._generation("Generate", prompt, parameters)))

    def stream(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> AsyncStream:
        """Generates, and returns an iterator of the first choice's text, piece by piece. Arguments: as `generate`."""
        call = self._generation("GenerateStream", prompt, parameters)
        return AsyncStream(self, self._start(call), call.request_id)

    def generate_many(
        self,
        prompts: Iterable[Prompt] | AsyncIterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        **parameters: Unpack[Parameters],
    ) -> AsyncGenerator[Result, None]:
        """Generates for each of many prompts, and yields how each ended; one that fails harms no other.

        Nothing is sent before the first result is asked for. What runs is cancelled when the generator is closed, for
        which a loop that may be left early wants `contextlib.aclosing`.

        Args:
            prompts: any iterable, also an async one or one without end: it is read as there is room.
            concurrency: how many may run, results that nobody has read yet included.
            ordered: yields in the order of the prompts; otherwise as they are finished.
            parameters: for all of them, as `generate`; the deadline is each one's own.
        """
        self._check_open()
        checked_many(parameters, concurrency)
        return self._many(_each(prompts), Window(concurrency, ordered=ordered), parameters)

    async def tokenize(self, prompt: str | Iterable[MessageLike], *, timeout: float | None = None) -> list[Token]:
        """The tokens that a model would see of a text or a conversation."""
        request = requests.tokenize_request(prompt)
        return types.tokens_of(await self._ask(self._quick("Tokenize", request, timeout)))

    async def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """The text of tokens."""
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = (await self._ask(self._quick("Detokenize", request, timeout))).text
        return text

    async def model(self, *, timeout: float | None = None) -> Model:
        """What is served, and its limits."""
        return types.model_of(await self._ask(self._quick("GetModel", pb.GetModelRequest(), timeout)))

    async def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running call by its name; that call ends with `CancelledCallError`."""
        await self._ask(self._quick("Abort", pb.AbortRequest(request_id=request_id), timeout))

    async def loras(self, *, timeout: float | None = None) -> Loras:
        """The names of the LoRA adapters that are loaded, and of those that could be."""
        return types.loras_of(await self._ask(self._quick("ListLoras", pb.ListLorasRequest(), timeout)))

    async def load_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Loads an adapter out of the server's folder."""
        await self._ask(self._quick("LoadLora", pb.LoadLoraRequest(name=name), timeout))

    async def unload_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Unloads an adapter; calls that run with it go on."""
        await self._ask(self._quick("UnloadLora", pb.UnloadLoraRequest(name=name), timeout))

    def _connected(self) -> grpc.aio.Channel:
        """The channel, made at its first use: it belongs to the loop that then runs."""
        if self._channel is None:
            target, options = self._settings.uri, self._settings.channel_options()
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(target, options, interceptors=self._interceptors)
            else:
                channel = grpc.aio.secure_channel(target, self._credentials, options, interceptors=self._interceptors)
            self._channel, self._stub = channel, yuan_pb2_grpc.YuanServiceStub(channel)
        return self._channel

    def _start(self, call: Call) -> Any:
        self._connected()
        return getattr(self._stub, call.rpc)(call.request, timeout=call.timeout, metadata=call.metadata)

    async def _ask(self, call: Call) -> Any:
        started = self._start(call)
        with translated(call.request_id):
            try:
                return await started
            except asyncio.CancelledError:
                self._check_own_end(call.request_id)
                raise

    def _check_own_end(self, request_id: str = "") -> None:
        """Tells a call that ended because its client was closed from a task that was cancelled.

        gRPC raises CancelledError for both, which would end a task that nobody wanted to end.
        """
        if self._closed and not _is_told_to_end():
            raise CancelledCallError(grpc.StatusCode.CANCELLED, "the client was closed", request_id=request_id)

    async def _many(
        self, prompts: AsyncGenerator[Prompt, None], window: Window, parameters: Parameters
    ) -> AsyncGenerator[Result, None]:
        running: set[asyncio.Task[None]] = set()
        coming: asyncio.Task[Any] | None = None
        is_over = False
        try:
            while True:
                if window.has_room and not is_over and coming is None:
                    coming = asyncio.ensure_future(anext(prompts, _END))
                if window.is_ready:
                    yield window.take()
                    continue
                if window.is_empty and coming is None:
                    return
                # A source may be slow, or wait for the very results that come meanwhile.
                tasks = [*running, coming] if coming else running
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in running & done:
                    running.discard(task)
                    task.result()  # raises what is a mistake of the program
                if coming in done:
                    prompt, coming = coming.result(), None
                    is_over = prompt is _END
                    if not is_over:
                        running.add(asyncio.ensure_future(self._run(window, window.launch(), prompt, parameters)))
        finally:
            await _cancel([*running, *([coming] if coming else [])])
            await prompts.aclose()

    async def _run(self, window: Window, index: int, prompt: Prompt, parameters: Parameters) -> None:
        try:
            result = Result(index, prompt, await self.generate(prompt, **parameters), None)
        except YuanError as error:
            result = Result(index, prompt, None, error)
        window.finish(result)

    async def _serves(self, ready: Readiness) -> bool:
        """Watches a server's health until it serves, which is True, or the watch ends by itself."""
        watch: Any = self._connected().unary_stream(
            HEALTH_WATCH, lambda request: request.SerializeToString(), HealthCheckResponse.FromString
        )
        metadata = self._metadata(())
        healths = watch(ready.request, timeout=deadline(ready.seconds), metadata=metadata, wait_for_ready=True)
        try:
            async for health in healths:
                if health.status == SERVING:
                    return True
                ready.saw(health.status)
            return False
        except asyncio.CancelledError:
            self._check_own_end()
            raise
        finally:
            healths.cancel()


class AsyncStream(Streaming):
    """An async iterator of the first choice's text, piece by piece, as it is generated.

    The call runs from the start; it is cancelled when the stream is closed, its `async with` block left, or nobody
    holds it any more.
    """

    def __init__(self, client: AsyncClient, call: Any, request_id: str) -> None:
        super().__init__(call, request_id)
        self._client = client
        self._loop = asyncio.get_running_loop()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        while (part := await self._read()) is not grpc.aio.EOF:
            if delta := self._gathering.add(part):
                return delta
        raise StopAsyncIteration

    async def _read(self) -> Any:
        try:
            with translated(self._name):
                return await self._call.read()
        except asyncio.CancelledError:
            if self._closed and not _is_told_to_end():
                return grpc.aio.EOF
            self._client._check_own_end(self._name)
            raise

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._call.cancel)  # whichever thread collects it


async def _each(prompts: Iterable[Prompt] | AsyncIterable[Prompt]) -> AsyncGenerator[Prompt, None]:
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


def _is_told_to_end() -> bool:
    """Whether somebody has cancelled the current task, as far as this Python tells (3.11 does)."""
    task = asyncio.current_task()
    return task is not None and hasattr(task, "cancelling") and task.cancelling() > 0
