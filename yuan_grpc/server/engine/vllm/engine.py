"""vLLM's async engine behind the `Engine` protocol."""

import asyncio
import gc
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import TypeVar

from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from yuan_grpc.server.engine.types import INLINE_ENTRIES, EngineRequest, ModelInfo, Sampling, StepOutput
from yuan_grpc.server.engine.vllm import convert
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.lora import LoraRegistry
from yuan_grpc.server.errors import OverloadedError, UnavailableError

INLINE_CHARACTERS = 16_384
"""Longer texts are tokenized in a thread (sentencepiece lets go of the GIL), for they would hold up every stream."""

TERMINATION_SECONDS = 10
POLL_SECONDS = 0.1

Result = TypeVar("Result")


class VllmEngine:
    """One vLLM engine, in processes of its own, from `start` to `stop`.

    Args:
        options: what `parse_engine_flags` returned.
        lora_folder: has the adapters that can be loaded; None for none.
    """

    def __init__(self, options: EngineOptions, lora_folder: Path | None = None) -> None:
        self._options = options
        lora, name = options.config.lora_config, str(options.config.model_config.served_model_name)
        self._adapters = LoraRegistry(lora_folder, lora.max_cpu_loras if lora else 0, name)
        self._starting: Thread | None = None
        self._started: AsyncLLM | None = None
        self._info: ModelInfo | None = None
        self._warm = False

    async def start(self) -> None:
        """Loads the model and has it answer, so that no caller's request is the first.

        Raises:
            Exception: whatever keeps the engine's processes from starting; they have logged why.
        """
        self._starting, started = _in_daemon_thread(self._options.start)
        self._started = await started
        for sampling in (Sampling(max_tokens=2, temperature=0, logprobs=1), Sampling(max_tokens=2, top_p=0.9, seed=0)):
            async with aclosing(self.generate(EngineRequest("warm-up", [0], sampling), stream=False)) as steps:
                async for _ in steps:
                    pass
        # What importing vLLM has made is here to stay; looking through it took 0.28 s each time, and no stream moved.
        gc.collect()
        gc.freeze()
        self._warm = True

    async def wait_until_dead(self) -> None:
        """Returns when the started engine has died."""
        handler = self._llm.output_handler  # ends when the engine's processes do
        assert handler is not None
        await asyncio.wait([handler])
        self._warm = False

    def stop(self) -> None:
        """Ends the engine's processes, whatever they are doing, starting included."""
        self._warm = False
        if self._started is not None:
            self._started.shutdown(timeout=TERMINATION_SECONDS)
            self._started = None
        elif self._starting is not None:
            while self._starting.is_alive() or multiprocessing.active_children():  # for it may yet start another
                for process in multiprocessing.active_children():
                    process.kill()  # while it is being set up, the engine does not listen to anything less
                self._starting.join(POLL_SECONDS)

    @property
    def info(self) -> ModelInfo:
        """What is served, from the model's files and vLLM's configuration."""
        if self._info is None:
            llm = self._llm
            tokenizer = llm.get_tokenizer()
            more = llm.input_processor.generation_config_fields.get("eos_token_id") or []
            ends = dict.fromkeys([tokenizer.eos_token_id, *([more] if isinstance(more, int) else more)])
            self._info = self._options.describe(len(tokenizer), list(ends), can_load_loras=self._adapters.can_load)
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether the engine has answered its warm-up and lives."""
        return self._warm and not self._llm.errored

    async def tokenize(self, text: str) -> list[int]:
        """Text to token ids, none added."""
        encode = self._llm.get_tokenizer().encode
        if len(text) <= INLINE_CHARACTERS:
            return encode(text, add_special_tokens=False)
        return await asyncio.to_thread(encode, text, add_special_tokens=False)

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Text to tokens with their pieces and stretches."""
        tokens: list[tuple[int, str, int, int]] = await asyncio.to_thread(
            self._llm.get_tokenizer().encode_with_offsets, text
        )
        return tokens

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""
        return self._llm.get_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        """A conversation in the model's own format."""
        text: str = self._llm.get_tokenizer().apply_chat_template([{"content": turn} for turn in turns])
        return text

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        """The text that tokens add behind a job's prompt, and the stop string that came up in it."""
        return convert.decode_continuation(request, token_ids, ended, self._llm.get_tokenizer())

    @property
    def loras(self) -> Sequence[str]:
        """The names of loaded adapters."""
        return self._adapters.loaded

    @property
    def available_loras(self) -> Sequence[str]:
        """The names of adapters that could be loaded."""
        return self._adapters.available

    async def load_lora(self, name: str) -> None:
        """Loads an adapter; see `Engine.load_lora`."""
        await self._adapters.load(self._llm, name)

    async def unload_lora(self, name: str) -> None:
        """Forgets an adapter; see `Engine.unload_lora`."""
        await self._adapters.unload(self._llm, name)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        """Runs one job; see `Engine.generate`."""
        llm, outputs, finished = self._llm, None, False
        steps = convert.OutputConverter(request, llm.get_tokenizer(), deadline)
        async with self._adapter(request.lora) as lora:
            try:
                outputs = await self._admitted(llm, request, lora, stream=stream)
                yield StepOutput()
                async with _cutting(llm, request, outputs, deadline):
                    while not finished:
                        output = outputs.get_nowait() or await outputs.get()
                        finished = output.finished
                        yield await _converted(steps, output)
            except EngineDeadError as error:
                raise UnavailableError("the engine was lost while the request was running") from error
            finally:
                if not finished:
                    await _abort(llm, request, outputs)

    async def _admitted(
        self, llm: AsyncLLM, request: EngineRequest, lora: LoRARequest | None, *, stream: bool
    ) -> RequestOutputCollector:
        try:
            params = convert.to_sampling_params(request.sampling, stream)
            convert.ban(request.sampling, params, llm.get_tokenizer())
            return await llm.add_request(
                request.request_id,
                tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
                params,
                lora_request=lora,
                priority=request.priority,
            )
        except (QueueOverflowError, MaxQueuedTokensError) as error:
            raise OverloadedError("the engine has as many requests as it may") from error
        except (VLLMClientError, ValueError) as error:  # what our own checks do not know of
            raise convert.refusal(error, request) from error

    @asynccontextmanager
    async def pin_lora(self, lora: str) -> AsyncGenerator[str, None]:
        """Keeps an adapter from being unloaded; see `Engine.holding`."""
        async with self._adapters.pin_lora(self._llm, lora) as request:
            yield request.lora_name

    @asynccontextmanager
    async def _adapter(self, name: str) -> AsyncGenerator[LoRARequest | None, None]:
        if not name:
            yield None
            return
        async with self._adapters.pin_lora(self._llm, name) as request:
            yield request

    @property
    def _llm(self) -> AsyncLLM:
        if self._started is None:
            raise UnavailableError("the model is still being loaded")
        return self._started


async def _converted(steps: convert.OutputConverter, output: RequestOutput) -> StepOutput:
    if convert.entries(output) > INLINE_ENTRIES:
        return await asyncio.to_thread(steps.step, output)
    return steps.step(output)


@asynccontextmanager
async def _cutting(
    llm: AsyncLLM, request: EngineRequest, outputs: RequestOutputCollector, deadline: asyncio.Event | None
) -> AsyncGenerator[None, None]:
    """Within it a job ends once `deadline` is set: vLLM then puts what it has kept back behind the job's outputs."""

    async def end(deadline: asyncio.Event) -> None:
        await deadline.wait()
        await _abort(llm, request, outputs)

    ending = asyncio.ensure_future(end(deadline)) if deadline else None
    try:
        yield
    finally:
        if ending:
            ending.cancel()


async def _abort(llm: AsyncLLM, request: EngineRequest, outputs: RequestOutputCollector | None) -> None:
    """By vLLM's own name, without which it remembers a job of several choices for ever. It has told none where the job
    was cancelled on its way into the queue, from which vLLM does not take it by itself."""
    with suppress(EngineDeadError):
        if outputs is None:
            await llm.abort(request.request_id)
        else:
            await llm.abort(outputs.request_id, internal=True)


def _in_daemon_thread(call: Callable[[], Result]) -> tuple[Thread, asyncio.Future[Result]]:
    """Makes a call that blocks for long, in a thread that does not keep the process from ending."""
    done: Future[Result] = Future()
    done.set_running_or_notify_cancel()  # from here on whoever waits may be cancelled, but not the call

    def run() -> None:
        try:
            done.set_result(call())
        except BaseException as error:
            done.set_exception(error)

    thread = Thread(target=run, name="engine-start", daemon=True)
    thread.start()
    return thread, asyncio.wrap_future(done)
