"""The demo checkpoint: writing a trained model in the published layout, and reading it for training code."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from yuan_grpc.demo.training.model import Shape, TrainableYuan
from yuan_grpc.model.checkpoint.random import write_config, write_tokenizer
from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.tokenizer import MODEL_FILE, YuanTokenizer

CONTEXT = 2048
"""`max_position_embeddings`. The model was trained on shorter texts."""

WEIGHTS = "model.safetensors"
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

LOAD_TESTS: dict[str, dict[str, Any]] = {
    "2b-shape": {},
    "m32-shape": {
        "num_attention_heads": 16,
        "attention_projection_size": 4096,
        "moe_config": {"moe_num_experts": 32, "moe_top_k": 2, "ffn_hidden_size": 8192},
        "max_position_embeddings": 16384,
    },
}
"""Subfolders with the configuration of a published model, and where it differs from that of Yuan2.0-2B.

`yuan-grpc serve --demo NAME` gives them random weights.
"""


def write(model: TrainableYuan, shape: Shape, folder: Path) -> None:
    """Write configurations and bfloat16 weights next to `tokenizer.model`. The head is tied, and not stored."""
    write_tokenizer(folder, folder / MODEL_FILE)
    tokens = YuanTokenizer(folder / MODEL_FILE)
    sizes: dict[str, Any] = {name: getattr(shape, name) for name in SIZES}
    config = YuanConfig(eod_token_id=tokens.eos_token_id, max_position_embeddings=CONTEXT, **sizes)
    write_config(folder, config, torch.bfloat16, tokens)
    write_load_tests(folder, tokens)
    weights = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in model.state_dict().items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # safetensors makes files private, but a server may run as another user


def write_load_tests(folder: Path, tokens: YuanTokenizer) -> None:
    """Write the configurations of `LOAD_TESTS` to subfolders."""
    for name, fields in LOAD_TESTS.items():
        (folder / name).mkdir(exist_ok=True)
        config = YuanConfig(eod_token_id=tokens.eos_token_id, **fields)
        write_config(folder / name, config, torch.bfloat16, tokens)


def read(folder: Path, *, has_lfa: bool = True) -> tuple[TrainableYuan, YuanTokenizer]:
    """Return the model with the weights as they are served, in float32, and the tokenizer."""
    config = json.loads((folder / "config.json").read_text("utf-8"))
    model = TrainableYuan(Shape(**{name: config[name] for name in SIZES}, has_lfa=has_lfa))
    model.load_state_dict({name: weight.float() for name, weight in load_file(folder / WEIGHTS).items()})
    return model.eval(), YuanTokenizer(folder / MODEL_FILE)
