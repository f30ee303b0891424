"""Greedy answers of a checkpoint with random weights, token by token with their log-probabilities."""

import argparse
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from variants import Shape

CHECKPOINT = Shape(hidden=512, layers=6, heads=8, width=2048, vocabulary=0, positions=2048)
"""What `random` names: large enough for products that a GPU splits, small enough to write at once."""

ENGINE: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": 1024, "gpu_memory_utilization": 0.5, "seed": 0}
"""Engine arguments of every variant, before its own."""


@dataclass(frozen=True)
class Answer:
    """A greedy continuation."""

    token_ids: list[int]
    logprobs: list[float]


def add_options(parser: argparse.ArgumentParser) -> None:
    """How large the random checkpoint is."""
    group = parser.add_argument_group("the checkpoint called `random`")
    for size in ("hidden", "layers", "heads", "width"):
        group.add_argument(f"--{size}", type=int, default=getattr(CHECKPOINT, size), help="default: %(default)s")


def checkpoint_of(model: str, folder: Path, arguments: argparse.Namespace) -> Path:
    """The checkpoint that a variant's model names: `random`, written to the folder at need; `demo`; or a path."""
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


def known_tokens(checkpoint: Path) -> int:
    """How many ids are tokens; the embedding's other rows are padding."""
    from yuan_grpc.model.tokenizer import YuanTokenizer

    return len(YuanTokenizer.from_pretrained(checkpoint))


def prompts_of(number: int, longest: int, tokens: int) -> list[list[int]]:
    """So many prompts of random ids and lengths, the same each time."""
    generator = random.Random(0)
    return [[generator.randrange(tokens) for _ in range(generator.randint(1, longest))] for _ in range(number)]


def start(checkpoint: str, engine: Mapping[str, Any]) -> Any:
    """vLLM's `LLM`."""
    from vllm import LLM

    return LLM(checkpoint, **ENGINE | dict(engine))


def answer(llm: Any, prompts: list[list[int]], tokens: int) -> list[Answer]:
    """Answers all prompts together, with so many tokens each."""
    from vllm import SamplingParams, TokensPrompt

    sampling = SamplingParams(temperature=0, max_tokens=tokens, logprobs=0, ignore_eos=True, detokenize=False)
    asked = [TokensPrompt(prompt_token_ids=prompt) for prompt in prompts]
    answers = []
    for output in llm.generate(asked, sampling, use_tqdm=False):
        (choice,) = output.outputs
        ids = list(choice.token_ids)
        logprobs = [ranked[token].logprob for ranked, token in zip(choice.logprobs, ids, strict=True)]
        answers.append(Answer(ids, logprobs))
    return answers


def compare(ours: list[Answer], theirs: list[Answer]) -> dict[str, Any]:
    """How many answers differ, in what, and from which token on; log-probabilities up to there are compared.

    Of the first that differ: their place, and their first tokens that have another log-probability.
    """
    firsts, places, largest = [], [], 0.0
    for place, (one, other) in enumerate(zip(ours, theirs, strict=True)):
        ids = zip(one.token_ids, other.token_ids, strict=True)
        first = next((at for at, (a, b) in enumerate(ids) if a != b), None)
        if first is not None:
            firsts.append(first)
        gaps = [abs(a - b) for a, b in zip(one.logprobs[:first], other.logprobs[:first], strict=True)]
        largest = max(largest, *gaps, 0.0)
        if one.logprobs != other.logprobs:
            pairs = zip(one.logprobs, other.logprobs, strict=True)
            places.append([place, *(at for at, (a, b) in enumerate(pairs) if a != b)][:9])
    return {
        "answers": len(ours),
        "other_tokens": len(firsts),
        "earliest": min(firsts, default=None),
        "other_logprobs": len(places),
        "largest_difference": largest,
        "places": places[:5],
    }
