"""Beam search in transformers over the reference model, to compare `BeamSearch` with."""

from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from uuid import uuid4

import torch
from reference import ReferenceYuan
from torch import Tensor
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from yuan_grpc.server.core.beam_search import BeamSearch
from yuan_grpc.server.engine.protocol import Engine
from yuan_grpc.server.engine.types import BeamSearchParams, ChoiceDelta, EngineRequest, Sampling


class HfYuan(PreTrainedModel, GenerationMixin):  # type: ignore[misc] # transformers is not followed
    """The reference model for `generate`, without a cache: every step computes whole sequences."""

    config_class = PretrainedConfig

    def __init__(self, reference: ReferenceYuan) -> None:
        super().__init__(PretrainedConfig(vocab_size=reference.num_tokens))
        self.reference = reference
        self.parameter = torch.nn.Parameter(torch.zeros(1))  # determines the device

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        """[sequences, tokens] ids -> log-probabilities, as logits that softmax does not change."""
        return CausalLMOutput(logits=torch.stack([self.reference.logprobs(ids.tolist()) for ids in input_ids]))


@dataclass(frozen=True)
class Search:
    """A search for both implementations.

    `BeamSearch` counts the prompt in the length, so `length_penalty` agrees only at 0 or for choices of equal length.
    """

    prompt: list[int]
    width: int
    ends: tuple[int, ...] = ()
    early_stopping: bool | Literal["never"] = False
    length_penalty: float = 0.0
    max_tokens: int = 12


def hf_choices(model: HfYuan, search: Search) -> list[tuple[list[int], float]]:
    """Return the beams of transformers, best first: tokens, including an ending one, and cumulative log-probability."""
    with _one_thread():
        found = model.generate(
            torch.tensor([search.prompt]),
            attention_mask=torch.ones(1, len(search.prompt), dtype=torch.long),
            max_new_tokens=search.max_tokens,
            eos_token_id=list(search.ends) or None,
            pad_token_id=search.ends[0] if search.ends else 0,
            num_beams=search.width,
            num_return_sequences=search.width,
            early_stopping=search.early_stopping,
            length_penalty=search.length_penalty,
            do_sample=False,
            use_cache=False,
            return_dict_in_generate=True,
            output_scores=True,
        )
    choices = [_up_to_an_end(ids[len(search.prompt) :], search.ends) for ids in found.sequences.tolist()]
    scores = found.sequences_scores.tolist()
    return [(ids, score * len(ids) ** search.length_penalty) for ids, score in zip(choices, scores, strict=True)]


def rare_tokens(model: HfYuan, prompt: list[int], width: int) -> tuple[int, ...]:
    """Return tokens to end at: rare ones in the best beams. The demo model seldom ends by itself."""
    counts = Counter(token_id for token_ids, _ in hf_choices(model, Search(prompt, width)) for token_id in token_ids)
    return tuple(token_id for token_id, _ in counts.most_common()[-5:])


async def our_choices(engine: Engine, search: Search) -> list[ChoiceDelta]:
    """Return the choices of `BeamSearch`. The model's end-of-text token does not end a choice."""
    sampling = Sampling(max_tokens=search.max_tokens, stop_token_ids=search.ends, ignore_eos=True)
    beam = BeamSearchParams(search.width, search.width, search.length_penalty, search.early_stopping)
    with _one_thread():
        async with aclosing(
            BeamSearch(engine, EngineRequest(uuid4().hex, search.prompt, sampling), beam).run()
        ) as outputs:
            *_, last = [output async for output in outputs]
    return list(last.deltas)


def _up_to_an_end(token_ids: list[int], ends: tuple[int, ...]) -> list[int]:
    first = next((index for index, token_id in enumerate(token_ids) if token_id in ends), len(token_ids))
    return token_ids[: first + 1]


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: with such small tensors, its threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
