"""Training: the tokenizer, batches, and the loop."""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn import functional as F

from yuan_grpc.demo.training.corpus import SEPARATOR, TURN, Corpus, Sample
from yuan_grpc.demo.training.model import Shape, TrainableYuan
from yuan_grpc.model.checkpoint.random import ROW_MULTIPLE, train_tokenizer
from yuan_grpc.model.tokenizer import END_OF_DOCUMENT, MODEL_FILE, YuanTokenizer

TOKENIZER_SAMPLES = 20_000
PIECES = 2304
"""Pieces to learn, including bytes; the special tokens are added to these."""

PROMPT_WEIGHT = 0.1
"""Weight of the loss of a token of the prompt; one of the completion has weight 1."""

NEW_LINE = "\n"


@dataclass(frozen=True)
class Plan:
    """The budget and the settings of a training run."""

    steps: int = 800
    batch: int = 64
    warmup: int = 100
    learning_rate: float = 3e-3
    weight_decay: float = 0.05
    seed: int = 7


@dataclass(frozen=True)
class Batch:
    """Token ids, [samples, tokens], padded on the right, with the weight of each token's loss."""

    ids: Tensor
    weights: Tensor


def write_demo_tokenizer(folder: Path, seed: int) -> YuanTokenizer:
    """Train the tokenizer on the corpus and write its file."""
    corpus = Corpus(seed)
    texts = {line for _ in range(TOKENIZER_SAMPLES) for line in _lines(corpus.sample())}
    with TemporaryDirectory() as scratch:
        file = Path(scratch, "corpus.txt")
        file.write_text("\n".join(sorted(texts)) + "\n", "utf-8")
        train_tokenizer(file, folder / MODEL_FILE, PIECES, character_coverage=1.0, line_is_text=False)
    return YuanTokenizer(folder / MODEL_FILE)


def _lines(sample: Sample) -> list[str]:
    """Return the lines of a sample; those at the start of a segment begin with a space, as in `encode`."""
    text = f" {sample.prompt}{sample.completion}"
    return text.replace(SEPARATOR, f"{NEW_LINE} ").replace(TURN, NEW_LINE).split(NEW_LINE)


def encode(sample: Sample, tokenizer: YuanTokenizer) -> tuple[list[int], list[float]]:
    """Return the token ids of a sample, and the weights of their losses."""
    prompt = tokenizer.encode(sample.prompt)
    ids = tokenizer.encode(sample.prompt + sample.completion + END_OF_DOCUMENT)
    assert ids[: len(prompt)] == prompt
    return ids, [PROMPT_WEIGHT] * len(prompt) + [1.0] * (len(ids) - len(prompt))


def batches(corpus: Corpus, tokenizer: YuanTokenizer, size: int, pool: int = 16) -> Iterator[Batch]:
    """Yield batches of samples of similar lengths, which have little padding."""
    while True:
        encoded = sorted((encode(corpus.sample(), tokenizer) for _ in range(size * pool)), key=lambda one: len(one[0]))
        order = torch.randperm(pool).tolist()
        for index in order:
            yield make_batch(encoded[index * size : (index + 1) * size], tokenizer.pad_token_id)


def make_batch(encoded: list[tuple[list[int], list[float]]], padding: int) -> Batch:
    """Return samples as one batch."""
    length = max(len(ids) for ids, _ in encoded)
    ids = [ids + [padding] * (length - len(ids)) for ids, _ in encoded]
    weights = [weights + [0.0] * (length - len(weights)) for _, weights in encoded]
    return Batch(torch.tensor(ids), torch.tensor(weights))


def loss_of(model: TrainableYuan, batch: Batch) -> Tensor:
    """Return the weighted mean loss of a batch, computed in bfloat16 where that is safe."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(batch.ids[:, :-1])
    losses = F.cross_entropy(logits.float().flatten(0, 1), batch.ids[:, 1:].flatten(), reduction="none")
    weights = batch.weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def learning_rate(plan: Plan, step: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then half a cosine."""
    if step < plan.warmup:
        return plan.learning_rate * (step + 1) / plan.warmup
    progress = (step - plan.warmup) / (plan.steps - plan.warmup)
    return plan.learning_rate * (0.02 + 0.98 * (1 + math.cos(math.pi * progress)) / 2)


def train(shape: Shape, plan: Plan, tokenizer: YuanTokenizer, curve: Path) -> TrainableYuan:
    """Train a model, and write the curve of its loss as JSON lines."""
    torch.manual_seed(plan.seed)
    model = TrainableYuan(shape)
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    others = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    stream = batches(Corpus(plan.seed), tokenizer, plan.batch)
    mean, tokens, started, used = 0.0, 0, time.monotonic(), time.process_time()
    with curve.open("w", encoding="utf-8") as log:
        log.write(json.dumps({"shape": asdict(shape), "plan": asdict(plan)}) + "\n")
        for step in range(plan.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(plan, step)
            batch = next(stream)
            loss = loss_of(model, batch)
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            mean = loss.item() if step == 0 else 0.95 * mean + 0.05 * loss.item()
            tokens += batch.ids.numel()
            if step % 50 == 49:
                row = {"step": step + 1, "loss": round(mean, 4), "tokens": tokens}
                clock = {"seconds": round(time.monotonic() - started), "cpu": round(time.process_time() - used)}
                log.write(json.dumps(row | clock) + "\n")
                log.flush()
    return model


def make_shape(tokenizer: YuanTokenizer, *, has_lfa: bool = True) -> Shape:
    """Return the demo's shape; without LFA, the MLP is wider by as many parameters."""
    rows = (len(tokenizer) // ROW_MULTIPLE + 1) * ROW_MULTIPLE
    width = 704 if has_lfa else 872
    return Shape(rows, 256, width, num_hidden_layers=4, num_attention_heads=4, has_lfa=has_lfa)
