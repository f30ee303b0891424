"""The `Engine` implementation on vLLM's async engine."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Mapping, MutableSequence, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import xgrammar
from vllm.envs import enable_envs_cache
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMClientError
from vllm.inputs.engine import tokens_input
from vllm.lora.request import LoRARequest
from vllm.outputs import RequestOutput
from vllm.utils.async_utils import cancel_task_threadsafe
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.exceptions import EngineDeadError
from vllm.v1.engine.output_processor import RequestOutputCollector

from yuan_grpc.server.engine.load import EngineLoad, LoadBoard, SharedLoadBoard
from yuan_grpc.server.engine.types import INLINE_ENTRIES, EngineRequest, ModelInfo, Sampling, StepOutput
from yuan_grpc.server.engine.vllm import convert
from yuan_grpc.server.engine.vllm.args import EngineOptions
from yuan_grpc.server.engine.vllm.constraints.compiler import ConstraintCompiler
from yuan_grpc.server.engine.vllm.launch import Launch
from yuan_grpc.server.engine.vllm.lora import LoraRegistry, create_registry
from yuan_grpc.server.engine.vllm.processes import ProcessTree
from yuan_grpc.server.engine.vllm.shared_engine import ClientLink
from yuan_grpc.server.errors import OverloadedError, UnavailableError
from yuan_grpc.vllm_check import NO_FUNCTION, check_vllm

TARGETS = {
    "vllm.v1.engine.core_client:AsyncMPClient.get_output_async": "self",
    "vllm.sampling_params:SamplingParams._bad_words_token_ids": NO_FUNCTION,  # `convert` sets it
}

INLINE_CHARACTERS = 16_384
"""Length of the longest text to tokenize on the event loop. Longer ones would block every stream, and are tokenized in
a thread; sentencepiece releases the GIL."""

TERMINATION_SECONDS = 10


@dataclass(frozen=True)
class Shared:
    """An engine that another process has started: the connection to it, and the adapters loaded there."""

    link: ClientLink
    adapters: LoraRegistry


class VllmEngine:
    """One vLLM engine, in its own processes, from `start` to `stop`.

    Args:
        options: the result of `parse_engine_flags`.
        lora_folder: the folder of the adapters that can be loaded; None for none.
        owns_process: whether nothing else in this process uses vLLM; its environment variables are then read only once.
        shared: the connection to an engine that another process has started; None to start one.
    """

    def __init__(
        self,
        options: EngineOptions,
        lora_folder: Path | None = None,
        *,
        owns_process: bool = False,
        shared: Shared | None = None,
    ) -> None:
        self._options = options
        self._owns_process = owns_process
        self._shared = shared
        self._adapters = shared.adapters if shared else create_registry(options, lora_folder)
        self._board = SharedLoadBoard(shared.link.loads) if shared else LoadBoard()
        self._constraints = ConstraintCompiler(self._describe_grammars)
        self._launch = Launch()
        self._async_llm: AsyncLLM | None = None
        self._info: ModelInfo | None = None
        self._processes: ProcessTree | None = None
        self._is_warm = False
        self._progress: MutableSequence[int] = shared.link.progress if shared else [0]
        self._index = shared.link.index if shared else 0

    async def start(self) -> None:
        """Load the model and run warm-up requests, so that no caller's request is the first.

        Raises:
            StartError: the engine could not be started.
        """
        with self._launch.failures_described():
            check_vllm(__name__, TARGETS)
            self._async_llm = llm = await self._launch.run(self._connect)
            core: Any = llm.engine_core
            self._count_outputs(core)
            manager = core.resources.engine_manager  # None if another process has started the engine
            self._processes = ProcessTree(process.pid for process in getattr(manager, "processes", ()))
            await self._warm_up()
        # The objects that importing vLLM creates are permanent. Scanning them blocked every stream for 0.28 s.
        gc.collect()
        gc.freeze()
        if self._owns_process:
            enable_envs_cache()  # vLLM reads several variables for each token
        self._is_warm = True

    def _connect(self, folder: str) -> AsyncLLM:
        if self._shared:
            return self._shared.link.connect(self._options, self._board)
        return self._options.start(folder, self._board)

    def _count_outputs(self, core: Any) -> None:
        """Count the engine's outputs. Each step has at least its statistics, even during a long prompt."""
        get_output = core.get_output_async

        async def get_and_count() -> Any:
            outputs = await get_output()
            self._progress[self._index] += 1
            return outputs

        core.get_output_async = get_and_count

    async def _warm_up(self) -> None:
        for sampling in (Sampling(max_tokens=2, temperature=0, logprobs=1), Sampling(max_tokens=2, top_p=0.9, seed=0)):
            async with aclosing(self.generate(EngineRequest("warm-up", [0], sampling), stream=False)) as outputs:
                async for _ in outputs:
                    pass

    async def wait_until_dead(self) -> None:
        """Wait until the started engine has died."""
        handler = self._llm.output_handler  # ends with the engine's processes
        assert handler is not None
        await asyncio.wait([handler])
        self._is_warm = False

    def set_lost(self) -> None:
        """End all requests, because the process that started the engine reports that it has died."""
        if self._async_llm is not None:
            core = cast(AsyncMPClient, self._async_llm.engine_core)
            core.resources.engine_dead = True
            core.outputs_queue.put_nowait(EngineDeadError())

    def stop(self) -> None:
        """Stop the engine's processes, or the connection to them, in any state, including during their start."""
        self._is_warm = False
        self._constraints.stop()
        if self._async_llm is not None:
            if handler := self._async_llm.output_handler:
                cancel_task_threadsafe(handler)  # otherwise it reports the end of the engine as an error
            if self._processes:
                self._processes.resume()
            self._async_llm.shutdown(timeout=TERMINATION_SECONDS)
            if self._processes:
                self._processes.kill()
            self._async_llm = None
        else:
            self._launch.kill()
        self._launch.clean_up()

    @property
    def info(self) -> ModelInfo:
        """The served model, from its files and vLLM's configuration."""
        if self._info is None:
            llm = self._llm
            tokenizer = llm.get_tokenizer()
            others = llm.input_processor.generation_config_fields.get("eos_token_id") or []
            end_ids = dict.fromkeys([tokenizer.eos_token_id, *([others] if isinstance(others, int) else others)])
            info = self._options.describe(len(tokenizer), list(end_ids), can_load_loras=self._adapters.can_load)
            self._info = replace(info, max_token_characters=tokenizer.max_chars_per_token)
        return self._info

    @property
    def is_ready(self) -> bool:
        """Whether the engine has completed its warm-up and is alive."""
        return self._is_warm and not self._llm.errored

    @property
    def is_busy(self) -> bool:
        """Whether the engine has requests that have not ended."""
        return self._async_llm is not None and self._async_llm.output_processor.has_unfinished_requests()

    @property
    def progress(self) -> int:
        """Number of the engine's outputs so far, for all front ends."""
        return sum(self._progress)

    @property
    def loads(self) -> Sequence[EngineLoad]:
        """The load of each data-parallel rank at its last step."""
        return self._board.read()

    async def tokenize(self, text: str) -> list[int]:
        """Return the token ids of a text, without special tokens added."""
        encode = self._llm.get_tokenizer().encode
        if len(text) <= INLINE_CHARACTERS:
            return encode(text, add_special_tokens=False)
        return await asyncio.to_thread(encode, text, add_special_tokens=False)

    async def tokenize_with_offsets(self, text: str) -> list[tuple[int, str, int, int]]:
        """Return the tokens of a text with their pieces and spans."""
        tokens: list[tuple[int, str, int, int]] = await asyncio.to_thread(
            self._llm.get_tokenizer().encode_with_offsets, text
        )
        return tokens

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Return the text of token ids."""
        return self._llm.get_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    def token_bytes(self, token_id: int, *, skip_special_tokens: bool) -> bytes:
        """Return the bytes that a token adds to a text."""
        raw: bytes = self._llm.get_tokenizer().token_bytes(token_id, skip_special_tokens)
        return raw

    @property
    def tokenizer_info(self) -> Mapping[str, Any]:
        """The tokenizer's special tokens and chat template."""
        info: Mapping[str, Any] = self._llm.get_tokenizer().describe()
        return info

    def apply_chat_template(self, turns: Sequence[str]) -> str:
        """Return a conversation in the model's format."""
        text: str = self._llm.get_tokenizer().apply_chat_template([{"content": turn} for turn in turns])
        return text

    def decode_continuation(
        self, request: EngineRequest, token_ids: Sequence[int], *, ended: bool
    ) -> tuple[str, str | None]:
        """Return the text that tokens add to a request's prompt, and the stop string that ends it."""
        return convert.decode_continuation(request, token_ids, ended, self._llm.get_tokenizer())

    @property
    def loras(self) -> Sequence[str]:
        """The names of loaded adapters."""
        return self._adapters.loaded

    @property
    def available_loras(self) -> Sequence[str]:
        """The names of adapters that can be loaded."""
        return self._adapters.available

    async def load_lora(self, name: str) -> None:
        """Load an adapter; see `Engine.load_lora`."""
        await self._adapters.load(self._llm, name)

    async def unload_lora(self, name: str) -> None:
        """Unload an adapter; see `Engine.unload_lora`."""
        await self._adapters.unload(self._llm, name)

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        """Run one request; see `Engine.generate`."""
        llm, outputs, is_finished = self._llm, None, False
        sampling = await self._check_constraint(request.sampling)
        converter = convert.OutputConverter(request, llm.get_tokenizer(), deadline)
        async with self._lora_request(request.lora) as lora:
            try:
                outputs = await self._add_request(llm, request, sampling, lora, stream=stream)
                yield StepOutput()
                async with _abort_at_deadline(llm, request, outputs, deadline):
                    while not is_finished:
                        output = outputs.get_nowait() or await outputs.get()
                        is_finished = output.finished
                        yield await _convert(converter, output)
            except EngineDeadError as error:
                raise UnavailableError("the engine was lost while the request was running") from error
            finally:
                if not is_finished:
                    await _abort(llm, request, outputs)

    async def _check_constraint(self, sampling: Sampling) -> Sampling:
        """Return the parameters with an enforceable constraint. Errors refer to the constraint in the request."""
        if (constraint := sampling.structured_outputs) is None:
            return sampling
        return replace(sampling, structured_outputs=await self._constraints.check(constraint))

    def _describe_grammars(self) -> dict[str, Any]:
        """Return the tokenizer and the options with which vLLM compiles constraints."""
        vocab_size = self._options.config.model_config.get_vocab_size()
        info = xgrammar.TokenizerInfo.from_huggingface(self._llm.get_tokenizer(), vocab_size=vocab_size)
        is_compact = self._options.config.structured_outputs_config.disable_any_whitespace
        options = {"any_whitespace": not is_compact, "separators": (",", ":") if is_compact else None}
        return {"tokenizer": info.serialize_json(), "json_options": options}

    async def _add_request(
        self, llm: AsyncLLM, request: EngineRequest, sampling: Sampling, lora: LoRARequest | None, *, stream: bool
    ) -> RequestOutputCollector:
        try:
            params = convert.to_sampling_params(sampling, stream)
            if self._options.config.speculative_config:
                convert.check_drafts(params)
            convert.set_bad_words(request.sampling, params, llm.get_tokenizer())
            return await llm.add_request(
                request.request_id,
                tokens_input(list(request.prompt), cache_salt=request.cache_salt or None),
                params,
                lora_request=lora,
                trace_headers=request.trace_headers or None,
                priority=request.priority,
            )
        except QueueOverflowError as error:
            limit = self._options.config.scheduler_config.max_num_queued_reqs
            raise OverloadedError(f"the request queue is full (limit {limit})") from error
        except MaxQueuedTokensError as error:
            limit = self._options.config.scheduler_config.max_num_queued_tokens
            raise OverloadedError(f"the queue of prompt tokens is full (limit {limit})") from error
        except (VLLMClientError, ValueError) as error:  # rules that only vLLM can check
            raise convert.to_invalid_request_error(error, request) from error

    @asynccontextmanager
    async def pin_lora(self, lora: str) -> AsyncGenerator[str, None]:
        """Keep an adapter in memory; see `Engine.pin_lora`."""
        async with self._adapters.pin_lora(self._llm, lora) as lora_request:
            yield lora_request.lora_name

    @asynccontextmanager
    async def _lora_request(self, name: str) -> AsyncGenerator[LoRARequest | None, None]:
        if not name:
            yield None
            return
        async with self._adapters.pin_lora(self._llm, name) as lora_request:
            yield lora_request

    @property
    def _llm(self) -> AsyncLLM:
        if self._async_llm is None:
            raise UnavailableError("the model is still loading")
        return self._async_llm


async def _convert(converter: convert.OutputConverter, output: RequestOutput) -> StepOutput:
    if convert.num_logprobs(output) > INLINE_ENTRIES:
        return await asyncio.to_thread(converter.step, output)
    return converter.step(output)


@asynccontextmanager
async def _abort_at_deadline(
    llm: AsyncLLM, request: EngineRequest, outputs: RequestOutputCollector, deadline: asyncio.Event | None
) -> AsyncGenerator[None, None]:
    """Abort the request when `deadline` is set. vLLM then adds the text it held back to the request's outputs."""

    async def abort(deadline: asyncio.Event) -> None:
        await deadline.wait()
        await _abort(llm, request, outputs)

    task = asyncio.ensure_future(abort(deadline)) if deadline else None
    try:
        yield
    finally:
        if task:
            task.cancel()


async def _abort(llm: AsyncLLM, request: EngineRequest, outputs: RequestOutputCollector | None) -> None:
    """Abort with vLLM's internal request id; otherwise vLLM never forgets a request with several choices.

    Without outputs there is no internal id: the request was cancelled while vLLM was adding it to the queue. vLLM does
    not remove it by itself.
    """
    with suppress(EngineDeadError):
        if outputs is None:
            await llm.abort(request.request_id)
        else:
            await llm.abort(outputs.request_id, internal=True)
