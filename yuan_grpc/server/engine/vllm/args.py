"""vLLM's command-line flags, parsed and checked, and the model description they result in."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn

import vllm
from pydantic import ValidationError
from vllm.config import VllmConfig
from vllm.engine import arg_utils
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.async_llm import AsyncLLM

from yuan_grpc.server.engine.load import LoadBoard
from yuan_grpc.server.engine.types import LoraInfo, ModelInfo
from yuan_grpc.server.engine.vllm import env
from yuan_grpc.server.engine.vllm.load import LoadLogger
from yuan_grpc.server.engine.vllm.stat_logger import StatLogger

BEAM_SEARCH_LOGPROBS = 2048
"""Log-probabilities per position. Beam search may request this many, regardless of the callers' limit."""

MAX_NUM_SEQS = 256
"""Sequences computed at a time on GPUs, unless the operator chooses: the most that were measured."""

LONG_PREFILL_TOKENS = 1024
"""Most tokens of one prompt in a step that other requests share, unless the operator chooses: see decision 0099."""

MAX_MESSAGE = 300
"""Length above which a message about a configuration has more than its cause, in characters."""


@dataclass(frozen=True)
class EngineOptions:
    """Parsed vLLM flags: vLLM's configuration, and the options it keeps elsewhere.

    Attributes:
        max_logprobs: the limit for callers; -1 for none.
    """

    config: VllmConfig
    arguments: AsyncEngineArgs
    max_logprobs: int

    def start(self, folder: str, board: LoadBoard) -> AsyncLLM:
        """Start the engine's processes and block until the model is loaded.

        Args:
            folder: a private folder for their sockets and temporary files.
            board: gets the load after each step, unless the statistics are disabled.
        """
        with env.temporary_folder(folder):
            return AsyncLLM.from_vllm_config(
                self.config,
                usage_context=UsageContext.ENGINE_CONTEXT,
                enable_log_requests=self.arguments.enable_log_requests,
                aggregate_engine_logging=self.arguments.aggregate_engine_logging,
                disable_log_stats=self.arguments.disable_log_stats,
                stat_loggers=self.stat_loggers(board),
            )

    def stat_loggers(self, board: LoadBoard) -> list[Any] | None:
        """Return what vLLM calls after each step: metrics, and the load on a board, unless statistics are disabled."""
        return None if self.arguments.disable_log_stats else [partial(LoadLogger, board), StatLogger]

    def describe(self, vocab_size: int, end_token_ids: Sequence[int], *, can_load_loras: bool) -> ModelInfo:
        """Return the description of the served model.

        Args:
            vocab_size: the tokenizer's number of tokens.
            end_token_ids: the tokens that end a text by themselves.
            can_load_loras: whether adapters can be loaded and unloaded.
        """
        model, parallel, scheduler = self.config.model_config, self.config.parallel_config, self.config.scheduler_config
        sizes, lora = model.hf_config, self.config.lora_config
        return ModelInfo(
            name=str(model.served_model_name),
            max_model_len=model.max_model_len,
            vocab_size=vocab_size,
            max_logprobs=vocab_size if self.max_logprobs == -1 else self.max_logprobs,
            end_token_ids=tuple(end_token_ids),
            path=model.model,
            revision=model.revision or "",
            vllm_version=vllm.__version__,
            dtype=str(model.dtype).removeprefix("torch."),
            quantization=model.quantization or "",
            layers=sizes.num_hidden_layers,
            hidden=sizes.hidden_size,
            heads=sizes.num_attention_heads,
            intermediate=sizes.intermediate_size,
            tensor_parallel=parallel.tensor_parallel_size,
            pipeline_parallel=parallel.pipeline_parallel_size,
            data_parallel=parallel.data_parallel_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_queued_reqs=scheduler.max_num_queued_reqs,
            cache_tokens=(self.config.cache_config.num_gpu_blocks or 0) * (self.config.cache_config.block_size or 0),
            priority_scheduling=scheduler.policy == "priority",
            prefix_caching=bool(self.config.cache_config.enable_prefix_caching),
            lora=lora and LoraInfo(lora.max_loras, lora.max_lora_rank, can_load_loras),
        )


def format_help(word: str) -> str:
    """Return vLLM's help by group: all flags, or those with a word in their name or group.

    Raises:
        LookupError: no flag has the word.
    """
    arg_utils.NEEDS_HELP = True  # else vLLM leaves the descriptions out
    arg_utils._compute_kwargs.cache_clear()  # of arguments without descriptions
    parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser(prog="yuan-grpc serve", add_help=False))
    formatter = parser._get_formatter()
    word = word.lower().replace("_", "-")
    matches = [action for group in parser._action_groups for action in _matches(group, word)]
    if not matches:
        titles = ", ".join(group.title for group in parser._action_groups if group._group_actions)
        raise LookupError(f"no engine option matches {word!r}; the groups are {titles}")
    for group in parser._action_groups:
        formatter.start_section(group.title)
        formatter.add_text(group.description if word == "all" else None)
        formatter.add_arguments(_matches(group, word))
        formatter.end_section()
    formatter.add_text(parser._json_tip)
    return str(formatter.format_help())


def _matches(group: Any, word: str) -> list[Any]:
    """Return the actions of the group that the word selects."""
    if word in ("all", group.title.lower()):
        return list(group._group_actions)
    return [action for action in group._group_actions if any(word in flag for flag in action.option_strings)]


def _shorten(message: str) -> str:
    """Return a message of pydantic without its prefix; of a long one, the first sentence."""
    message = message.removeprefix("Value error, ")
    return message if len(message) <= MAX_MESSAGE else message.partition(". ")[0]


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, which raises an exception instead of ending the process."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse_engine_flags(flags: Sequence[str]) -> EngineOptions:
    """Parse vLLM's command-line flags and check them against the model's files.

    Raises:
        ValueError, OSError: an unknown flag, a malformed value, values that do not fit each other or the model, or a
            missing model.
    """
    parser = _Parser(add_help=False)
    AsyncEngineArgs.add_cli_args(parser)
    # `engine_log` reports progress, and `_create_config` chooses the threshold.
    parser.set_defaults(use_tqdm_on_load=False, long_prefill_token_threshold=None)
    arguments: AsyncEngineArgs = AsyncEngineArgs.from_cli_args(parser.parse_args(list(flags)))
    if arguments.skip_tokenizer_init:
        raise ValueError("`--skip-tokenizer-init` cannot be set: this service takes and returns text")
    try:
        config = _create_config(arguments)
    except ValidationError as error:  # its own text is a page long
        raise ValueError("; ".join(_shorten(one["msg"]) for one in error.errors())) from error
    except KeyError as error:  # an object in the overrides replaces the one in config.json
        raise ValueError(f"an object in `--hf-overrides` must be complete, and {error} is missing") from error
    max_logprobs = config.model_config.max_logprobs
    config.model_config.max_logprobs = max(max_logprobs, BEAM_SEARCH_LOGPROBS) if max_logprobs >= 0 else max_logprobs
    return EngineOptions(config, arguments, max_logprobs)


def _create_config(arguments: AsyncEngineArgs) -> VllmConfig:
    """Return vLLM's configuration with the size of a step that `vllm serve` has, where none is chosen.

    Without the usage context, vLLM computes at most 2,048 tokens and 128 sequences in a step on any machine.
    """
    is_chosen = arguments.max_num_seqs is not None or arguments.performance_mode == "throughput"
    if current_platform.is_cuda() and not is_chosen:
        arguments.max_num_seqs = MAX_NUM_SEQS
    threshold: int | None = arguments.long_prefill_token_threshold
    arguments.long_prefill_token_threshold = threshold or 0
    config = arguments.create_engine_config(UsageContext.OPENAI_API_SERVER)
    scheduler = config.scheduler_config
    largest_chunk = min(scheduler.max_num_batched_tokens, config.model_config.max_model_len)
    if threshold is None and largest_chunk > LONG_PREFILL_TOKENS:
        scheduler.long_prefill_token_threshold = LONG_PREFILL_TOKENS
    return config
