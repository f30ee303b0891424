"""Greedy generation of a checkpoint: token ids with their log-probabilities, and their comparison."""

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variants import Shape

CHECKPOINT = Shape(hidden=512, layers=6, heads=8, width=2048, vocabulary=0, positions=2048)
"""Shape of the checkpoint `random`: large enough for products that a GPU splits, small enough to write quickly."""

ENGINE: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 1024, "gpu_memory_utilization": 0.5, "seed": 0}
"""Default engine arguments of every variant."""


@dataclass(frozen=True)
class Answer:
    """Greedy continuation of a prompt."""

    token_ids: list[int]
    logprobs: list[float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add options for the size of the random checkpoint."""
    group = parser.add_argument_group("the checkpoint `random`")
    for size in ("hidden", "layers", "heads", "width"):
        group.add_argument(f"--{size}", type=int, default=getattr(CHECKPOINT, size), help="default: %(default)s")


def checkpoint_path(model: str, folder: Path, arguments: argparse.Namespace) -> Path:
    """Return a variant's checkpoint: `random`, which is written to the folder if necessary; `demo`; or a path."""
    from yuan_grpc.model.checkpoint.random import DEMO, write_checkpoint

    if model == "demo":
        return DEMO
    if model != "random":
        return Path(model)
    if not folder.joinpath("config.json").exists():
        sizes = {
            "hidden_size": arguments.hidden,
            "num_hidden_layers": arguments.layers,
            "num_attention_heads": arguments.heads,
            "intermediate_size": arguments.width,
            "max_position_embeddings": CHECKPOINT.positions,
        }
        write_checkpoint(folder, DEMO, sizes)
    return folder


def vocabulary_size(checkpoint: Path) -> int:
    """Return the number of ids that are tokens; the other rows of the embedding are padding."""
    from yuan_grpc.model.tokenizer import YuanTokenizer

    return len(YuanTokenizer.from_pretrained(checkpoint))


def seeded_prompts(count: int, max_length: int, vocabulary: int) -> list[list[int]]:
    """Return prompts of random ids and lengths that are the same in every run."""
    generator = random.Random(0)
    return [[generator.randrange(vocabulary) for _ in range(generator.randint(1, max_length))] for _ in range(count)]


def start(checkpoint: str, engine: Mapping[str, Any]) -> Any:
    """Return vLLM's `LLM`."""
    from vllm import LLM

    return LLM(checkpoint, **ENGINE | dict(engine))


def generate(llm: Any, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Generate this number of tokens for each prompt, all in one batch."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    inputs = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    answers = []
    for output in llm.generate(inputs, sampling, use_tqdm=False):
        (choice,) = output.outputs
        ids = list(choice.token_ids)
        logprobs = [ranked[token].logprob for ranked, token in zip(choice.logprobs, ids, strict=True)]
        answers.append(Answer(ids, logprobs))
    return answers


def compare(answers: list[Answer], others: list[Answer]) -> dict[str, Any]:
    """Count differing answers and compare log-probabilities up to the first differing token of each.

    Returns:
        Counts, the earliest differing token and the largest difference; for the first five answers with different
        log-probabilities, `places` has their index and the positions of their first eight differing tokens.
    """
    first_differences, places, largest = [], [], 0.0
    for index, (answer, other) in enumerate(zip(answers, others, strict=True)):
        ids = zip(answer.token_ids, other.token_ids, strict=True)
        first = next((position for position, (a, b) in enumerate(ids) if a != b), None)
        if first is not None:
            first_differences.append(first)
        gaps = [abs(a - b) for a, b in zip(answer.logprobs[:first], other.logprobs[:first], strict=True)]
        largest = max(largest, *gaps, 0.0)
        if answer.logprobs != other.logprobs:
            pairs = zip(answer.logprobs, other.logprobs, strict=True)
            places.append([index, *(position for position, (a, b) in enumerate(pairs) if a != b)][:9])
    return {
        "answers": len(answers),
        "other_tokens": len(first_differences),
        "earliest": min(first_differences, default=None),
        "other_logprobs": len(places),
        "largest_difference": largest,
        "places": places[:5],
    }
