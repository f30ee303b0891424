"""Yuan checkpoints with random weights, of any size, in the published layout.

Writes the checkpoints that tests and benchmarks load:

    python -m yuan_grpc.model.checkpoint.random FOLDER --hidden-size 256 --num-hidden-layers 4 --num-attention-heads 4
"""

import argparse
import json
import shutil
from collections.abc import Iterator, Mapping
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from sentencepiece import SentencePieceTrainer, sentencepiece_model_pb2

from yuan_grpc.model.checkpoint.layout import HEAD, published_shapes
from yuan_grpc.model.config import ARCHITECTURE, YuanConfig
from yuan_grpc.model.tokenizer import ANSWER_SEPARATOR, APPENDED, MODEL_FILE, SPECIAL, YuanTokenizer

DEMO = Path(str(files("yuan_grpc") / "demo"))

DEFAULT_SIZES = {
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 2048,
}

OPTIONAL_FIELDS = ("attention_projection_size", "moe_config", "use_moe")
"""Fields of `config.json` that only Yuan2.0-M32 has."""

ROW_MULTIPLE = 64
"""The embedding is padded to a multiple of this number of rows, as in published checkpoints."""


def write_checkpoint(
    folder: Path,
    tokenizer: Path,
    sizes: Mapping[str, Any],
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    file_format: str = "safetensors",
    max_shard_size: str = "50GB",
) -> YuanConfig:
    """Write the configuration, the tokenizer and random weights, which depend on the seed only, not on the machine.

    Args:
        folder: The folder to write to; created if it does not exist. Existing files are replaced.
        tokenizer: A folder with a `tokenizer.model`.
        sizes: Fields of `config.json`; see `YuanConfig`.
        seed: The seed of the weights.
        dtype: The data type to store the weights in.
        file_format: "safetensors" or "bin" (`pytorch_model.bin`).
        max_shard_size: The maximum size of a file; larger checkpoints are split into several files with an index.

    Returns:
        The configuration of the checkpoint.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_tokenizer(folder, tokenizer / MODEL_FILE)
    tokens = YuanTokenizer(folder / MODEL_FILE)
    rows = (len(tokens) // ROW_MULTIPLE + 1) * ROW_MULTIPLE
    config = YuanConfig(vocab_size=rows, eod_token_id=tokens.eos_token_id, **sizes)
    write_config(folder, config, dtype, tokens)
    weights = {name: weight.to(dtype) for name, weight in random_weights(config, seed)}
    save_torch_state_dict(
        weights, folder, max_shard_size=max_shard_size, safe_serialization=file_format == "safetensors"
    )
    for file in folder.glob("*.safetensors"):
        file.chmod(0o644)  # safetensors makes files private, but a server may run as another user
    return config


def random_weights(config: YuanConfig, seed: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield float32 weights that keep activations near 1 and logits within a few units, for any size.

    `lm_head.weight` comes last. It equals the embedding if the configuration ties them, as in published checkpoints.
    """
    generator = np.random.default_rng(seed)
    embedding = None
    for name, shape in published_shapes(config).items():
        if name == HEAD and config.tie_word_embeddings:
            assert embedding is not None
            yield name, embedding.clone()
            continue
        noise = torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
        if "layernorm" in name or name == "model.norm.weight":
            weight = 1 + 0.1 * noise
        elif name.endswith(".bias"):
            weight = 0.1 * noise
        elif name in ("model.embed_tokens.weight", HEAD):
            weight = noise * 2 * config.hidden_size**-0.5
        else:
            weight = noise * float(np.prod(shape[1:])) ** -0.5
        if name == "model.embed_tokens.weight":
            embedding = weight
        yield name, weight


def write_tokenizer(folder: Path, model_file: Path) -> None:
    """Write a tokenizer next to a checkpoint, with the files that published checkpoints have."""
    if model_file.resolve() != (folder / MODEL_FILE).resolve():
        shutil.copyfile(model_file, folder / MODEL_FILE)
    _write_json(folder / "special_tokens_map.json", {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"})
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,  # as published, although wrong; this file is not read
            "add_eos_token": True,
            "bos_token": "<s>",
            "eos_token": "</s>",
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": "<unk>",
        },
    )


def train_tokenizer(
    corpus: Path, model_file: Path, pieces: int, *, character_coverage: float = 0.999, line_is_text: bool = True
) -> None:
    """Train a sentencepiece BPE model like the published one, with the special tokens last, as plain pieces.

    Args:
        corpus: A text file; pieces do not span lines.
        model_file: The file to write.
        pieces: The number of pieces to learn, including 259 control tokens and bytes; special tokens are added.
        character_coverage: The share of the corpus whose characters become pieces.
        line_is_text: Whether each line is a text, which gets a leading space, or may continue one.
    """
    with TemporaryDirectory() as scratch:
        SentencePieceTrainer.train(
            input=str(corpus),
            model_prefix=f"{scratch}/bpe",
            model_type="bpe",
            vocab_size=pieces,
            character_coverage=character_coverage,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=line_is_text,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            pad_id=-1,
            num_threads=1,
            minloglevel=2,
        )
        model = sentencepiece_model_pb2.ModelProto.FromString(Path(scratch, "bpe.model").read_bytes())
    present = {piece.piece for piece in model.pieces}
    for token in ("<n>", *SPECIAL):
        if token not in present and token not in APPENDED:
            model.pieces.add(piece=token, score=0.0, type=sentencepiece_model_pb2.ModelProto.SentencePiece.NORMAL)
    model.normalizer_spec.add_dummy_prefix = True
    model.trainer_spec.input[:] = []
    model.trainer_spec.model_prefix = ""
    model_file.write_bytes(model.SerializeToString(deterministic=True))


def write_config(folder: Path, config: YuanConfig, dtype: torch.dtype, tokens: YuanTokenizer) -> None:
    """Write `config.json` with the fields of published files."""
    _write_json(folder / "config.json", _published_config(config, dtype, tokens))


def _published_config(config: YuanConfig, dtype: torch.dtype, tokens: YuanTokenizer) -> dict[str, Any]:
    """Return `config.json` with the fields of published files, including the remote code, which is never loaded."""
    optional = {
        name: value for name in OPTIONAL_FIELDS if (value := getattr(config, name)) is not None and value is not False
    }
    return optional | {
        "architectures": [ARCHITECTURE],
        "auto_map": {
            "AutoConfig": "configuration_yuan.YuanConfig",
            "AutoModelForCausalLM": "yuan_hf_model.YuanForCausalLM",
        },
        "bos_token_id": config.eod_token_id,
        "eod_token": config.eod_token_id,
        "eod_token_id": config.eod_token_id,
        "eos_token_id": config.eod_token_id,
        "hidden_act": config.hidden_act,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "model_max_length": config.max_position_embeddings,
        "model_type": config.model_type,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "pad_token_id": tokens.pad_token_id,
        "rms_norm_eps": config.rms_norm_eps,
        "sep_token": tokens.convert_tokens_to_ids(ANSWER_SEPARATOR),
        "sep_token_id": config.eod_token_id,  # wrong, as in the published files; `sep_token` is right
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        "vocab_size": config.vocab_size,
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run the command line, which has one option per size, named as in `config.json`."""
    parser = argparse.ArgumentParser(prog="python -m yuan_grpc.model.checkpoint.random", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument(
        "--tokenizer", type=Path, default=DEMO, help="folder with a tokenizer.model (default: the demo checkpoint)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--file-format", choices=("safetensors", "bin"), default="safetensors")
    parser.add_argument("--max-shard-size", default="50GB", help="maximum size of a file, e.g. 5GB (default: 50GB)")
    for size, value in DEFAULT_SIZES.items():
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, default=value)
    parser.add_argument("--attention-projection-size", type=int, help="width of all heads (default: hidden size)")
    parser.add_argument("--moe-num-experts", type=int, help="experts of each layer, of which a token uses two")
    arguments = vars(parser.parse_args())
    dtype = getattr(torch, arguments.pop("dtype"))
    sizes = {size: arguments.pop(size) for size in (*DEFAULT_SIZES, "attention_projection_size")}
    if experts := arguments.pop("moe_num_experts"):
        sizes["moe_config"] = {"moe_num_experts": experts}
    write_checkpoint(arguments.pop("folder"), arguments.pop("tokenizer"), sizes, dtype=dtype, **arguments)


if __name__ == "__main__":
    main()
