"""The commands of the training: `python -m yuan_grpc.demo.training COMMAND`, from a checkout."""

import argparse
from pathlib import Path

import torch

from yuan_grpc.demo.training import checkpoint, suite
from yuan_grpc.demo.training.evaluation import evaluate, format_table
from yuan_grpc.demo.training.held_out import held_out_cases
from yuan_grpc.demo.training.model import TrainableYuan
from yuan_grpc.demo.training.training import Plan, make_shape, train, write_demo_tokenizer
from yuan_grpc.model.tokenizer import YuanTokenizer

RESULTS = Path(__file__).with_name("results")


def run_training(folder: Path, results: Path, plan: Plan, *, has_lfa: bool = True) -> None:
    """Train the tokenizer and the model, write the checkpoint, and evaluate what was written."""
    folder.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    tokenizer = write_demo_tokenizer(folder, plan.seed)
    name = "demo" if has_lfa else "without-lfa"
    shape = make_shape(tokenizer, has_lfa=has_lfa)
    model = train(shape, plan, tokenizer, results / f"{name}.jsonl")
    checkpoint.write(model, shape, folder)
    write_table(*checkpoint.read(folder, has_lfa=has_lfa), results / f"{name}.md")


def write_table(model: TrainableYuan, tokenizer: YuanTokenizer, file: Path | None) -> None:
    """Print the held-out table, and write it to a file."""
    table = format_table(evaluate(model, tokenizer, held_out_cases()))
    print(table, end="")
    if file:
        file.write_text(table, "utf-8")


def main() -> None:
    """Run a command."""
    parser = argparse.ArgumentParser(prog="python -m yuan_grpc.demo.training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    training = commands.add_parser("train", help="write the demo checkpoint, its curve and its held-out table")
    training.add_argument("folder", type=Path)
    training.add_argument("--steps", type=int, default=Plan.steps)
    training.add_argument("--seed", type=int, default=Plan.seed)
    training.add_argument("--results", type=Path, default=RESULTS, help="folder of the curve and the table")
    training.add_argument("--without-lfa", action="store_true", help="train with unfiltered queries and keys")
    evaluating = commands.add_parser("evaluate", help="print the held-out table of a checkpoint")
    evaluating.add_argument("folder", type=Path)
    writing = commands.add_parser("suite", help="write the tasks of the demo in HumanEval's format")
    writing.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the matrices are small: a second thread waits more than it computes
    if options.command == "train":
        plan = Plan(steps=options.steps, seed=options.seed)
        run_training(options.folder, options.results, plan, has_lfa=not options.without_lfa)
    elif options.command == "evaluate":
        write_table(*checkpoint.read(options.folder), None)
    else:
        suite.write(options.file)


if __name__ == "__main__":
    main()
