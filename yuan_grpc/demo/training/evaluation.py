"""The score on held-out cases, by greedy decoding in plain torch."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from yuan_grpc.demo.training.held_out import Case
from yuan_grpc.demo.training.model import TrainableYuan
from yuan_grpc.model.tokenizer import END_OF_DOCUMENT, YuanTokenizer

MAX_TOKENS, BATCH = 96, 64


@dataclass
class Row:
    """A row of the held-out table: cases, right completions, ended ones, and the sum of losses with their number."""

    cases: int = 0
    right: int = 0
    ended: int = 0
    loss: float = 0.0
    tokens: int = 0


def evaluate(model: TrainableYuan, tokenizer: YuanTokenizer, cases: Sequence[Case]) -> dict[str, Row]:
    """Return a row for each kind of case."""
    rows: dict[str, Row] = defaultdict(Row)
    ordered = sorted(cases, key=lambda case: len(case.prompt))
    for start in range(0, len(ordered), BATCH):
        group = ordered[start : start + BATCH]
        for case, completion in zip(group, complete(model, tokenizer, [case.prompt for case in group]), strict=True):
            row = rows[case.kind]
            row.cases += 1
            row.right += case.is_right(completion)
            row.ended += completion.endswith(END_OF_DOCUMENT)
            loss, tokens = loss_of(model, tokenizer, case)
            row.loss += loss
            row.tokens += tokens
    return {kind: rows[kind] for kind in dict.fromkeys(case.kind for case in cases)}


@torch.inference_mode()
def complete(model: TrainableYuan, tokenizer: YuanTokenizer, prompts: Sequence[str]) -> Iterator[str]:
    """Yield the greedy completion of each prompt, with its `<eod>`."""
    sequences = [tokenizer.encode(prompt) for prompt in prompts]
    lengths = [len(ids) for ids in sequences]
    running = set(range(len(sequences)))
    for _ in range(MAX_TOKENS):
        indices = sorted(running)
        longest = max(len(sequences[index]) for index in indices)
        padded = [sequences[i] + [tokenizer.pad_token_id] * (longest - len(sequences[i])) for i in indices]
        logits = model(torch.tensor(padded))[:, :, : len(tokenizer)]
        for row, index in enumerate(indices):
            token = int(logits[row, len(sequences[index]) - 1].argmax())
            sequences[index].append(token)
            if token == tokenizer.eos_token_id:
                running.discard(index)
        if not running:
            break
    for ids, length in zip(sequences, lengths, strict=True):
        yield tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[length:]))


@torch.inference_mode()
def loss_of(model: TrainableYuan, tokenizer: YuanTokenizer, case: Case) -> tuple[float, int]:
    """Return the summed loss of the completion to expect, in nats, and its number of tokens."""
    prompt = tokenizer.encode(case.prompt)
    ids = torch.tensor(tokenizer.encode(case.prompt + case.answer + END_OF_DOCUMENT))
    logits = model(ids[None, :-1])[0, len(prompt) - 1 :]
    return F.cross_entropy(logits, ids[len(prompt) :], reduction="sum").item(), len(ids) - len(prompt)


def format_table(rows: dict[str, Row]) -> str:
    """Return the held-out table in Markdown."""
    lines = ["| held out | cases | right | ends with `<eod>` | loss a token |", "| --- | --- | --- | --- | --- |"]
    for kind, row in rows.items():
        right, ended = 100 * row.right / row.cases, 100 * row.ended / row.cases
        lines.append(f"| {kind} | {row.cases} | {right:.1f} % | {ended:.1f} % | {row.loss / row.tokens:.3f} |")
    return "\n".join(lines) + "\n"
