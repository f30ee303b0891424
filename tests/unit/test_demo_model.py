"""The demo checkpoint, and the module it was trained with."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from reference import ReferenceYuan

from yuan_grpc.demo.training import checkpoint
from yuan_grpc.demo.training.corpus import Corpus
from yuan_grpc.demo.training.model import Shape, TrainableYuan
from yuan_grpc.demo.training.training import Plan, batches, loss_of, make_shape, train, write_demo_tokenizer
from yuan_grpc.model.tokenizer import YuanTokenizer
from yuan_grpc.server.settings.demo import DEMO, LOAD_TEST, M32_LOAD_TEST

PROMPT = "世界上最高的山是什么<sep>"
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2}
CURVES = Path(__file__).parents[2] / "yuan_grpc" / "demo" / "training" / "results"
pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def tokenizer() -> YuanTokenizer:
    return YuanTokenizer.from_pretrained(DEMO)


def test_the_trainable_module_computes_what_the_reference_does(tokenizer: YuanTokenizer) -> None:
    model, _ = checkpoint.read(Path(DEMO))
    ids = tokenizer.encode(f"{PROMPT}世界上最高的山是珠穆朗玛峰。<eod>")
    with torch.inference_mode():
        logits = model(torch.tensor([ids, ids[::-1]]))[:, :, : len(tokenizer)]
    reference = ReferenceYuan(Path(DEMO), len(tokenizer))
    for row, sequence in zip(logits, (ids, ids[::-1]), strict=True):
        assert torch.allclose(row.log_softmax(-1), reference.logprobs(sequence), atol=2e-4)


def test_the_tokenizer_of_the_demo_can_be_trained_again(tmp_path: Path) -> None:
    write_demo_tokenizer(tmp_path, Plan.seed)
    assert (tmp_path / "tokenizer.model").read_bytes() == Path(DEMO, "tokenizer.model").read_bytes()


def test_the_demo_fits_the_wheel() -> None:
    files = [file for file in Path(DEMO).iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.mark.parametrize("folder", [DEMO, LOAD_TEST, M32_LOAD_TEST])
def test_the_ids_of_special_tokens_are_those_of_the_tokenizer(tokenizer: YuanTokenizer, folder: str) -> None:
    config = json.loads(Path(folder, "config.json").read_text("utf-8"))
    assert config["eod_token_id"] == tokenizer.eos_token_id == tokenizer.encode("<eod>")[0]
    assert config["vocab_size"] > len(tokenizer)


def test_the_load_test_has_the_published_shape_of_2b() -> None:
    config = json.loads(Path(LOAD_TEST, "config.json").read_text("utf-8"))
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    assert [config[name] for name in sizes] == [2048, 8192, 24, 32, 135040]


def test_the_load_tests_are_the_folders_that_training_writes(tokenizer: YuanTokenizer, tmp_path: Path) -> None:
    checkpoint.write_load_tests(tmp_path, tokenizer)
    for folder in (LOAD_TEST, M32_LOAD_TEST):
        written = tmp_path / Path(folder).name / "config.json"
        assert written.read_bytes() == Path(folder, "config.json").read_bytes()
    m32 = json.loads(Path(M32_LOAD_TEST, "config.json").read_text("utf-8"))
    assert (m32["num_attention_heads"], m32["attention_projection_size"]) == (16, 4096)
    experts = m32["moe_config"]
    assert (experts["moe_num_experts"], experts["moe_top_k"], experts["ffn_hidden_size"]) == (32, 2, 8192)


@pytest.mark.parametrize("has_lfa", [True, False])
def test_a_few_steps_of_training_reduce_the_loss_and_can_be_repeated(
    tokenizer: YuanTokenizer, tmp_path: Path, has_lfa: bool
) -> None:
    shape = Shape(make_shape(tokenizer).vocab_size, **SMALL, has_lfa=has_lfa)
    plan = Plan(steps=20, batch=8, warmup=2)
    first, second = (train(shape, plan, tokenizer, tmp_path / name) for name in ("first", "second"))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
    batch = next(batches(Corpus(99), tokenizer, 32))
    with torch.inference_mode():
        assert loss_of(first, batch) < loss_of(TrainableYuan(shape), batch) - 0.5


def test_the_committed_curve_falls() -> None:
    rows = [json.loads(line) for line in (CURVES / "demo.jsonl").read_text("utf-8").splitlines()[1:]]
    assert rows[-1]["step"] == Plan.steps
    assert sum(after["loss"] < before["loss"] for before, after in pairwise(rows)) > 0.7 * (len(rows) - 1)
