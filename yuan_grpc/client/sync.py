"""The client for threads."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterable, Iterator
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

import grpc

from yuan_grpc.client import requests, types
from yuan_grpc.client.base import Call, Caller, Readiness, Streaming, checked_many, deadline
from yuan_grpc.client.channel import SERVICE
from yuan_grpc.client.errors import InvalidRequestError, YuanError, error_of, translated
from yuan_grpc.client.google_rpc import HEALTH_WATCH, SERVING, HealthCheckResponse
from yuan_grpc.client.types import Completion, Loras, Model, Result, Token
from yuan_grpc.client.window import Window
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self, Unpack

    from yuan_grpc.client.requests import MessageLike, Parameters, Prompt


CLOSE_SECONDS = 5.0


class Client(Caller):
    """A connection to a Yuan server. Threads may share it; a process that forks makes its own after the fork.

    Every call raises `YuanError` when it does not end well, TypeError for a keyword or a value that no request has, and
    RuntimeError when the client is closed.
    """

    def _open(self) -> None:
        target, options = self._settings.uri, self._settings.channel_options()
        if self._credentials is None:
            channel = grpc.insecure_channel(target, options)
        else:
            channel = grpc.secure_channel(target, self._credentials, options)
        self._bare_channel = channel
        self._channel = grpc.intercept_channel(channel, *self._interceptors)
        self._stub = yuan_pb2_grpc.YuanServiceStub(self._channel)

    def close(self) -> None:
        """Ends the connection, and all calls that run over it. May be called twice."""
        if not self._closed:
            self._closed = True
            # A call that Ctrl-C met while it was being started is never counted out, and gRPC waits for it for ever.
            closing = Thread(target=self._bare_channel.close, name="yuan-grpc-close", daemon=True)
            closing.start()
            closing.join(CLOSE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def wait_until_ready(self, timeout: float = 60.0) -> None:
        """Returns when the server's health says that it serves: also one that is not there yet, or is loading.

        Where the target has several addresses, one of them is asked.

        Raises:
            DeadlineError: it does not, after `timeout` seconds.
        """
        self._check_open()
        ready = Readiness(SERVICE, timeout)
        while ready.seconds:
            try:
                if self._serves(ready):
                    return
            except grpc.RpcError as error:
                if not ready.refused(error):
                    raise error_of(error) from error
            self._check_open()
            time.sleep(ready.pause)
        raise ready.too_late()

    def generate(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Completion:
        """Generates, and returns when all choices are finished.

        Args:
            prompt: text, token ids, a conversation, or a ready request, over which the keywords then stand.
            parameters: see `Parameters`; `timeout` in seconds and `metadata` are of the call.
        """
        return types.answer_of(self._ask(self._generation("Generate", prompt, parameters)))

    def stream(self, prompt: Prompt, **parameters: Unpack[Parameters]) -> Stream:
        """Generates, and returns an iterator of the first choice's text, piece by piece. Arguments: as `generate`."""
        call = self._generation("GenerateStream", prompt, parameters)
        started = self._stub.GenerateStream(call.request, timeout=call.timeout, metadata=call.metadata)
        return Stream(started, call.request_id)

    def generate_many(
        self,
        prompts: Iterable[Prompt],
        *,
        concurrency: int = 64,
        ordered: bool = True,
        **parameters: Unpack[Parameters],
    ) -> Generator[Result, None, None]:
        """Generates for each of many prompts, and yields how each ended; one that fails harms no other.

        Nothing is sent before the first result is asked for, and what runs is cancelled when the generator is closed.

        Args:
            prompts: any iterable, also one without end: it is read as there is room.
            concurrency: how many may run, results that nobody has read yet included.
            ordered: yields in the order of the prompts; otherwise as they are finished.
            parameters: for all of them, as `generate`; the deadline is each one's own.
        """
        self._check_open()
        checked_many(parameters, concurrency)
        return self._many(iter(prompts), Window(concurrency, ordered=ordered), parameters)

    def tokenize(self, prompt: str | Iterable[MessageLike], *, timeout: float | None = None) -> list[Token]:
        """The tokens that a model would see of a text or a conversation."""
        request = requests.tokenize_request(prompt)
        return types.tokens_of(self._ask(self._quick("Tokenize", request, timeout)))

    def detokenize(
        self, token_ids: Iterable[int], *, skip_special_tokens: bool = False, timeout: float | None = None
    ) -> str:
        """The text of tokens."""
        request = requests.detokenize_request(token_ids, skip_special_tokens)
        text: str = self._ask(self._quick("Detokenize", request, timeout)).text
        return text

    def model(self, *, timeout: float | None = None) -> Model:
        """What is served, and its limits."""
        return types.model_of(self._ask(self._quick("GetModel", pb.GetModelRequest(), timeout)))

    def abort(self, request_id: str, *, timeout: float | None = None) -> None:
        """Ends a running call by its name; that call ends with `CancelledCallError`."""
        self._ask(self._quick("Abort", pb.AbortRequest(request_id=request_id), timeout))

    def loras(self, *, timeout: float | None = None) -> Loras:
        """The names of the LoRA adapters that are loaded, and of those that could be."""
        return types.loras_of(self._ask(self._quick("ListLoras", pb.ListLorasRequest(), timeout)))

    def load_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Loads an adapter out of the server's folder."""
        self._ask(self._quick("LoadLora", pb.LoadLoraRequest(name=name), timeout))

    def unload_lora(self, name: str, *, timeout: float | None = None) -> None:
        """Unloads an adapter; calls that run with it go on."""
        self._ask(self._quick("UnloadLora", pb.UnloadLoraRequest(name=name), timeout))

    def _future(self, call: Call) -> Any:
        return getattr(self._stub, call.rpc).future(call.request, timeout=call.timeout, metadata=call.metadata)

    def _ask(self, call: Call) -> Any:
        with translated(call.request_id):
            return getattr(self._stub, call.rpc)(call.request, timeout=call.timeout, metadata=call.metadata)

    def _many(self, prompts: Iterator[Prompt], window: Window, parameters: Parameters) -> Generator[Result, None, None]:
        running: dict[int, tuple[Prompt, Any]] = {}
        ended: SimpleQueue[int] = SimpleQueue()
        is_over = False
        try:
            while True:
                while window.has_room and not is_over:
                    try:
                        prompt = next(prompts)
                    except StopIteration:
                        is_over = True
                        break
                    self._launch(prompt, parameters, window, running, ended)
                    while not ended.empty():
                        _finish(ended.get(), running, window)
                    if window.is_ready:
                        break  # a source may be slow, or wait for this very result
                if window.is_empty:
                    return
                while not window.is_ready:
                    _finish(ended.get(), running, window)
                yield window.take()
        finally:
            for _, future in running.values():
                future.cancel()

    def _launch(
        self, prompt: Prompt, parameters: Parameters, window: Window, running: dict[int, Any], ended: SimpleQueue[int]
    ) -> None:
        try:
            future = self._future(self._generation("Generate", prompt, parameters))
        except InvalidRequestError as error:
            window.finish(Result(window.launch(), prompt, None, error))
            return
        index = window.launch()
        running[index] = prompt, future
        future.add_done_callback(lambda _: ended.put(index))

    def _serves(self, ready: Readiness) -> bool:
        """Watches a server's health until it serves, which is True, or the watch ends by itself."""
        watch: Any = self._channel.unary_stream(
            HEALTH_WATCH, lambda request: request.SerializeToString(), HealthCheckResponse.FromString
        )
        metadata = self._metadata(())
        healths = watch(ready.request, timeout=deadline(ready.seconds), metadata=metadata, wait_for_ready=True)
        try:
            for health in healths:
                if health.status == SERVING:
                    return True
                ready.saw(health.status)
            return False
        finally:
            healths.cancel()


class Stream(Streaming):
    """An iterator of the first choice's text, piece by piece, as it is generated.

    The call runs from the start; it is cancelled when the stream is closed, its `with` block left, or nobody holds
    it any more.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while True:
            try:
                part = next(self._call)
            except grpc.RpcError as error:
                if self._closed:
                    raise StopIteration from None
                raise error_of(error, self._name) from error
            if delta := self._gathering.add(part):
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
    """How a call ended that has."""
    request_id = prompt.request_id if isinstance(prompt, pb.GenerateRequest) else ""
    try:
        with translated(request_id):
            return Result(index, prompt, types.answer_of(future.result()), None)
    except YuanError as error:
        return Result(index, prompt, None, error)
