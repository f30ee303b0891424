"""The synchronous client."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread
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
from yuan_grpc.client.errors import InvalidRequestError, YuanError, error_from_rpc, translate_errors
from yuan_grpc.client.google_rpc import HEALTH_WATCH, SERVING, HealthCheckResponse
from yuan_grpc.client.types import Completion, Loras, Model, Result, Token
from yuan_grpc.client.window import Window
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from yuan_grpc.client.requests import MessageLike, Parameters, Prompt


CLOSE_TIMEOUT_SECONDS = 5.0
"""Maximum time to wait for the channel to close."""


class Client(BaseClient):
    """A synchronous client of a Yuan server. Threads may share it; a forked process must create its own after the fork.

    A failed call raises `YuanError`, an unknown parameter or a value of the wrong type TypeError, and a closed client
    RuntimeError.
    """

    def _open(self) -> None:
        self._base_channels: list[grpc.Channel] = []
        self._connections = Connections(self._connect, self._settings.connections)

    def _connect(self) -> Connection:
        target, options = self._settings.uri, self._settings.channel_options()
        if self._credentials is None:
            base_channel = grpc.insecure_channel(target, options)
        else:
            base_channel = grpc.secure_channel(target, self._credentials, options)
        self._base_channels.append(base_channel)
        channel = grpc.intercept_channel(base_channel, *self._interceptors)
        return Connection(channel, yuan_pb2_grpc.YuanServiceStub(channel))

    def close(self) -> None:
        """Close all connections and cancel their calls. Closing twice is harmless."""
        if not self._closed:
            self._closed = True
            # gRPC waits forever for a call that KeyboardInterrupt hit while it was starting.
            closing = Thread(target=self._close_channels, name="yuan-grpc-close", daemon=True)
            closing.start()
            closing.join(CLOSE_TIMEOUT_SECONDS)

    def _close_channels(self) -> None:
        for channel in self._base_channels:
            channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout: float = 60.0, *, connect_timeout: float = math.inf) -> None:
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
                if self._is_serving(ready):
                    return
            except grpc.RpcError as error:
                ready.record_error(error)
                if not is_transient(error):
                    raise error_from_rpc(error) from error
            self._check_open()
            time.sleep(ready.poll_delay)
        raise ready.timeout_error()

    def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """Generate a completion and return it when all choices are finished.

        Args:
            prompt: text, token ids, a conversation, or a GenerateRequest, whose fields the parameters override.
            parameters: see `Parameters`. `timeout` (seconds) and `metadata` apply to the call.
        """
        call = self._prepare_generation("Generate", prompt, parameters)
        return types.completion_of_call(self._invoke(call), call.request_id)

    def stream(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Stream:
        """Start generating and return an iterator over the first choice's text. Takes the arguments of `generate`."""
        call = self._prepare_generation("GenerateStream", prompt, parameters)
        return Stream(self._start(call, lambda stub: stub.GenerateStream), call.request_id)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        **parameters: Unpack[Parameters],
    ) -> Generator[Result, None, None]:
        """Generate a completion for each prompt and yield the results; a failed request does not affect the others.

        The first requests are sent when the first result is requested. Closing the generator cancels all running
        requests.

        Args:
            prompts: any iterable, even an endless one; it is read as capacity becomes free.
            concurrency: maximum number of running requests plus unread results.
            ordered: yield results in the order of the prompts, otherwise as they finish.
            parameters: as for `generate`, applied to every request; the timeout counts for each request separately.
        """
        self._check_open()
        check_many_arguments(parameters, concurrency)
        return self._many(iter(prompts), Window(concurrency, ordered=ordered), parameters)

    def tokenize(self, prompt: str | Iterable[MessageLike], *, timeout: float | None = None) -> list[Token]:
        """Return the tokens the model would receive for a text or a conversation."""
        request = requests.tokenize_request(prompt)
        return types.tokens_from_proto(self._invoke(self._prepare_with_short_timeout("Tokenize", request, timeout)))

    def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """Return the text of token ids."""
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = self._invoke(self._prepare_with_short_timeout("Detokenize", request, timeout)).text
        return text

    def model(self, *, timeout: float | None = None) -> Model:
        """Return the served model and its limits."""
        return types.model_from_proto(
            self._invoke(self._prepare_with_short_timeout("GetModel", pb.GetModelRequest(), timeout))
        )

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Abort a running call by its request id; that call raises `CancelledCallError`."""
        self._invoke(self._prepare_with_short_timeout("Abort", pb.AbortRequest(request_id=request_id), timeout))

    def loras(self, *, timeout: float | None = None) -> Loras:
        """Return the names of the loaded LoRA adapters and of those the server can load."""
        return types.loras_from_proto(
            self._invoke(self._prepare_with_short_timeout("ListLoras", pb.ListLorasRequest(), timeout))
        )

    def load_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Load an adapter from the server's LoRA folder."""
        self._invoke(self._prepare_with_short_timeout("LoadLora", pb.LoadLoraRequest(name=name), timeout))

    def unload_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Unload an adapter; running calls that use it continue."""
        self._invoke(self._prepare_with_short_timeout("UnloadLora", pb.UnloadLoraRequest(name=name), timeout))

    def _start_future(self, call: PreparedCall) -> Any:
        return self._start(call, lambda stub: getattr(stub, call.rpc).future)

    def _start(self, call: PreparedCall, method_of: Callable[[Any], Any]) -> Any:
        connection = self._connections.acquire(call.rpc, call.request_id)
        try:
            method = method_of(connection.stub)
            started = method(call.request, timeout=call.timeout, metadata=call.metadata)
        except BaseException:
            self._connections.release(connection, call.rpc, call.request_id)
            raise
        started.add_done_callback(lambda _: self._connections.release(connection, call.rpc, call.request_id))
        return started

    def _invoke(self, call: PreparedCall) -> Any:
        connection = self._connections.acquire(call.rpc, call.request_id)
        try:
            with translate_errors(call.request_id):
                method = getattr(connection.stub, call.rpc)
                response = method(call.request, timeout=call.timeout, metadata=call.metadata)
        finally:
            self._connections.release(connection, call.rpc, call.request_id)
        return check_readable(response, call.request_id)

    def _many(self, prompts: Iterator[Prompt], window: Window, parameters: Parameters) -> Generator[Result, None, None]:
        running: dict[int, tuple[Prompt, Any]] = {}
        finished: SimpleQueue[int] = SimpleQueue()
        exhausted = False
        try:
            while True:
                while window.has_capacity and not exhausted:
                    try:
                        prompt = next(prompts)
                    except StopIteration:
                        exhausted = True
                        break
                    self._submit(prompt, parameters, window, running, finished)
                    while not finished.empty():
                        _finish(finished.get(), running, window)
                    if window.is_ready:
                        break  # the source may be slow, or wait for this result
                if window.is_empty:
                    return
                while not window.is_ready:
                    _finish(finished.get(), running, window)
                yield window.pop()
        finally:
            for _, future in running.values():
                future.cancel()

    def _submit(
        self,
        prompt: Prompt,
        parameters: Parameters,
        window: Window,
        running: dict[int, Any],
        finished: SimpleQueue[int],
    ) -> None:
        try:
            future = self._start_future(self._prepare_generation("Generate", prompt, parameters))
        except InvalidRequestError as error:
            window.finish(Result(window.start(), prompt, None, error))
            return
        index = window.start()
        running[index] = prompt, future
        future.add_done_callback(lambda _: finished.put(index))

    def _is_serving(self, ready: Readiness) -> bool:
        """Watch the server's health; return True once it is serving, False if the watch ends first."""
        watch: Any = self._connections.first.channel.unary_stream(
            HEALTH_WATCH, lambda request: request.SerializeToString(), HealthCheckResponse.FromString
        )
        timeout, metadata = grpc_timeout(ready.remaining_seconds), self._metadata(())
        updates = watch(ready.request, timeout=timeout, metadata=metadata, wait_for_ready=True)
        try:
            for health in updates:
                if health.status == SERVING:
                    return True
                ready.record_status(health.status)
            return False
        finally:
            updates.cancel()


class Stream(BaseStream):
    """An iterator over the first choice's text, as it is generated.

    The call starts immediately. It is cancelled when the stream is closed or garbage-collected, or when its `with`
    block ends.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            try:
                message = next(self._call)
            except StopIteration:
                self._check_complete()
                raise
            except grpc.RpcError as error:
                if self._closed:
                    raise StopIteration from None
                raise error_from_rpc(error, self._request_id) from error
            if delta := self._add(message):
                return delta

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _finish(index: int, running: dict[int, tuple[Prompt, Any]], window: Window) -> None:
    prompt, future = running.pop(index)
    window.finish(_result(index, prompt, future))


def _result(index: int, prompt: Prompt, future: Any) -> Result:
    """Return the result of a finished call."""
    request_id = prompt.request_id if isinstance(prompt, pb.GenerateRequest) else ""
    try:
        with translate_errors(request_id):
            response = check_readable(future.result(), request_id)
        return Result(index, prompt, types.completion_of_call(response, request_id), None)
    except YuanError as error:
        return Result(index, prompt, None, error)
