"""vLLM's async engine behind the `Engine` protocol: the server's one door to vLLM."""

import asyncio
import multiprocessing
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future
from contextlib import aclosing, suppress
from dataclasses import dataclass
from threading import Thread
from typing import TypeVar

from pydantic import ValidationError
from vllm import SamplingParams
from vllm.config import VllmConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.exceptions import MaxQueuedTokensError, QueueOverflowError, VLLMValidationError
from vllm.inputs.engine import tokens_input
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput, RequestOutput
from vllm.sampling_params import RequestOutputKind
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError

from yuan_grpc.server.errors import InvalidRequestError, OverloadedError, UnavailableError, Violation
from yuan_grpc.server.generation import FinishReason, ModelInfo, Piece, Position, RankedToken, Sampling, Step

INLINE_CHARACTERS = 16_384
"""Longer texts are tokenized in a thread (sentencepiece lets go of the GIL), for they would hold up every stream."""

TERMINATION_SECONDS = 10
POLL_SECONDS = 0.1

_FINISH_REASONS = {None: None, "stop": FinishReason.STOP, "length": FinishReason.LENGTH}

Result = TypeVar("Result")


@dataclass(frozen=True)
class EngineOptions:
    """vLLM's flags, read: its configuration, and what it keeps outside of that."""

    config: VllmConfig
    arguments: AsyncEngineArgs

    def start(self) -> AsyncLLM:
        """Starts the engine's processes and waits until the model is loaded, which blocks for long."""
        return AsyncLLM.from_vllm_config(
            self.config,
            usage_context=UsageContext.ENGINE_CONTEXT,
            enable_log_requests=self.arguments.enable_log_requests,
            aggregate_engine_logging=self.arguments.aggregate_engine_logging,
            disable_log_stats=self.arguments.disable_log_stats,
        )


def read_engine_flags(flags: Sequence[str]) -> EngineOptions:
    """Reads vLLM's own command-line flags and checks them against the model's files.

    Raises:
        SystemExit: an unknown flag or a malformed value; argparse has said which.
        ValueError, OSError: values that do not fit each other or the model, or a model that is not there.
    """
    parser = FlexibleArgumentParser(
        prog="yuan-grpc serve", usage="yuan-grpc serve [OPTIONS] (see yuan-grpc serve --help)", add_help=False
    )
    AsyncEngineArgs.add_cli_args(parser)
    arguments: AsyncEngineArgs = AsyncEngineArgs.from_cli_args(parser.parse_args(list(flags)))
    if arguments.skip_tokenizer_init:
        raise ValueError("`--skip-tokenizer-init` cannot be set: this service takes and returns text")
    try:
        return EngineOptions(arguments.create_engine_config(), arguments)
    except ValidationError as error:  # whose own text is a page
        raise ValueError("; ".join(one["msg"] for one in error.errors())) from error


class VllmEngine:
    """One vLLM engine, in processes of its own, from `start` to `stop`.

    Args:
        options: what `read_engine_flags` returned.
    """

    def __init__(self, options: EngineOptions) -> None:
        self._options = options
        self._starting: Thread | None = None
        self._started: AsyncLLM | None = None
        self._warm = False

    async def start(self) -> None:
        """Loads the model and has it answer, so that no caller's request is the first.

        Raises:
            Exception: whatever keeps the engine's processes from starting; they have logged why.
        """
        self._starting, started = _in_daemon_thread(self._options.start)
        self._started = await started
        for sampling in (Sampling(max_tokens=2, temperature=0, logprobs=1), Sampling(max_tokens=2, top_p=0.9, seed=0)):
            async with aclosing(self.generate("warm-up", [0], sampling, stream=False)) as steps:
                await anext(steps)
        self._warm = True

    async def lost(self) -> None:
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
        model, tokens = self._options.config.model_config, len(self._llm.get_tokenizer())
        return ModelInfo(
            name=str(model.served_model_name),
            context=model.max_model_len,
            tokens=tokens,
            max_logprobs=tokens if model.max_logprobs == -1 else model.max_logprobs,
        )

    @property
    def ready(self) -> bool:
        """Whether the engine has answered its warm-up and lives."""
        return self._warm and not self._llm.errored

    async def tokenize(self, text: str) -> list[int]:
        """Text to token ids, none added."""
        encode = self._llm.get_tokenizer().encode
        if len(text) <= INLINE_CHARACTERS:
            return encode(text, add_special_tokens=False)
        return await asyncio.to_thread(encode, text, add_special_tokens=False)

    def detokenize(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """Token ids to text."""
        return self._llm.get_tokenizer().decode(token_ids, skip_special_tokens=skip_special_tokens)

    async def generate(
        self, request_id: str, prompt: Sequence[int], sampling: Sampling, *, stream: bool
    ) -> AsyncGenerator[Step, None]:
        """Runs one request; see `Engine.generate`. The id must not be that of a request still running."""
        llm, finished = self._llm, False
        try:
            running = llm.generate(tokens_input(list(prompt)), _vllm_params(sampling, stream), request_id)
            async with aclosing(running) as outputs:
                async for output in outputs:
                    finished = output.finished
                    yield self._step(output, sampling.logprobs or 0)
        except EngineDeadError as error:
            raise UnavailableError("the engine was lost while the request was running") from error
        except (QueueOverflowError, MaxQueuedTokensError) as error:
            raise OverloadedError("the engine has as many requests as it may") from error
        except VLLMValidationError as error:  # what our own checks do not know of
            raise InvalidRequestError([Violation(error.parameter or "request", str(error))]) from error
        finally:
            # vLLM aborts what is cancelled while it generates, but not what is cancelled on its way into the queue.
            if not finished:
                with suppress(EngineDeadError):
                    await llm.abort(request_id)

    @property
    def _llm(self) -> AsyncLLM:
        if self._started is None:
            raise UnavailableError("the model is still being loaded")
        return self._started

    def _step(self, output: RequestOutput, top: int) -> Step:
        return Step([self._piece(completion, top) for completion in output.outputs], output.num_cached_tokens or 0)

    def _piece(self, completion: CompletionOutput, top: int) -> Piece:
        if completion.finish_reason not in _FINISH_REASONS:
            raise UnavailableError("the engine gave the request up")
        finish_reason = _FINISH_REASONS[completion.finish_reason]
        stopped_by = completion.stop_reason
        if finish_reason is FinishReason.STOP and stopped_by is None:  # how vLLM says: at the end-of-text token
            stopped_by = self._llm.get_tokenizer().eos_token_id
        return Piece(
            index=completion.index,
            text=completion.text,
            token_ids=completion.token_ids,
            positions=_positions(completion, top),
            cumulative_logprob=completion.cumulative_logprob,
            finish_reason=finish_reason,
            stopped_by=stopped_by,
        )


def _vllm_params(sampling: Sampling, stream: bool) -> SamplingParams:
    """vLLM takes the most likely token at temperature 0, of one choice.

    Several choices are then sampled, from that one token.
    """
    fields = vars(sampling) | {"stop": list(sampling.stop), "stop_token_ids": list(sampling.stop_token_ids)}
    if sampling.is_greedy:
        several = sampling.n > 1
        fields |= {"temperature": float(several), "top_p": 1.0, "top_k": int(several), "min_p": 0.0}
    kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
    return SamplingParams(**fields, output_kind=kind)


def _positions(completion: CompletionOutput, top: int) -> list[Position]:
    """vLLM's dictionaries hold the chosen token and the `top` most likely ones, of which it may be one."""
    if completion.logprobs is None:
        return []
    positions = []
    for ranked, chosen in zip(completion.logprobs, completion.token_ids, strict=True):
        tokens = {token_id: _ranked_token(token_id, logprob) for token_id, logprob in ranked.items()}
        likely = (token for token in tokens.values() if token.rank <= top)
        positions.append(Position(tokens[chosen], sorted(likely, key=lambda token: token.rank)))
    return positions


def _ranked_token(token_id: int, logprob: Logprob) -> RankedToken:
    return RankedToken(token_id, logprob.decoded_token or "", logprob.logprob, logprob.rank or 0)


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
