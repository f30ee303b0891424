"""Tests of writing and loading checkpoints in the published layout."""

import json
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from yuan_grpc.model.checkpoint.layout import published_shapes
from yuan_grpc.model.checkpoint.loader import Placement, load_checkpoint
from yuan_grpc.model.checkpoint.random import random_weights, write_checkpoint
from yuan_grpc.model.config import YuanConfig

SIZES: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIG = YuanConfig(vocab_size=16, **SIZES)

RANDOM_CHECKPOINT = {
    "config.json": "7d2aa5bd6da276fef099df1d515100b3a58b309c5871f7dbdef18fa05dbf98e4",
    "model.safetensors": "ed11980ff09c51048f5e8c28c9513a5ebf372ad71544da2cb480edde30a54a31",
    "tokenizer.model": "b36d6806804f175720da832df8e2ae35ffffb464f0e00fecee9cbf7ded2b82b5",
}


def weights(config: YuanConfig = CONFIG) -> dict[str, torch.Tensor]:
    return dict(random_weights(config, seed=0))


def place_nothing(name: str) -> Placement | None:
    return None


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("file", "digest"), RANDOM_CHECKPOINT.items(), ids=RANDOM_CHECKPOINT)
def test_the_random_checkpoint_has_the_bytes_that_other_tests_expect(demo: Path, file: str, digest: str) -> None:
    assert sha256((demo / file).read_bytes()).hexdigest() == digest


def test_a_random_checkpoint_has_padding_rows_and_a_stored_copy_of_its_head(demo: Path) -> None:
    stored = load_file(demo / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])
    assert len(stored["lm_head.weight"]) == json.loads((demo / "config.json").read_text())["vocab_size"] > 1169


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second, other = weights(), weights(), dict(random_weights(CONFIG, seed=1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_the_sizes_can_be_chosen(demo: Path, tmp_path: Path) -> None:
    config = write_checkpoint(tmp_path, demo, SIZES | {"tie_word_embeddings": False}, file_format="bin")
    stored = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    assert {name: tuple(weight.shape) for name, weight in stored.items()} == published_shapes(config)
    assert not torch.equal(stored["lm_head.weight"], stored["model.embed_tokens.weight"])


def test_loading_a_complete_checkpoint_returns_its_tied_head() -> None:
    stored = weights() | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}
    assert load_checkpoint(stored.items(), CONFIG, place_nothing) is stored["lm_head.weight"]


def test_a_tied_head_need_not_be_stored() -> None:
    stored = weights()
    del stored["lm_head.weight"]
    assert load_checkpoint(stored.items(), CONFIG, place_nothing) is None


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.lf_gate.conv1.bias", "model.norm.weight"])
def test_a_missing_weight_is_named(name: str) -> None:
    stored = weights()
    del stored[name]
    with pytest.raises(ValueError, match=f"the checkpoint lacks {name}$"):
        load_checkpoint(stored.items(), CONFIG, place_nothing)


def test_an_untied_head_must_be_stored() -> None:
    config = YuanConfig(vocab_size=16, tie_word_embeddings=False, **SIZES)
    stored = weights(config)
    del stored["lm_head.weight"]
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        load_checkpoint(stored.items(), config, place_nothing)


@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias"])
def test_an_unknown_weight_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"a weight that no Yuan model has: {name}"):
        load_checkpoint((weights() | {name: torch.zeros(1)}).items(), CONFIG, place_nothing)


def test_a_weight_of_another_shape_is_named() -> None:
    stored = weights() | {"model.norm.weight": torch.zeros(7)}
    with pytest.raises(ValueError, match=r"model.norm.weight must be of shape \[8\], not \[7\]"):
        load_checkpoint(stored.items(), CONFIG, place_nothing)


def test_each_weight_is_placed_as_soon_as_it_is_read() -> None:
    placed: list[str] = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in weights().items():
            yield name, weight
            if name != "lm_head.weight":  # placed last, after a comparison with the embedding
                assert placed[-1] == name

    def place(name: str) -> None:
        placed.append(name)

    load_checkpoint(stream(), CONFIG, place)
