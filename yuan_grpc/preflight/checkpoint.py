"""A check of a checkpoint's files, without loading them."""

import json
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from yuan_grpc.model.checkpoint.layout import DERIVED, HEAD, published_shapes
from yuan_grpc.model.variants import parse_experts, reject_unsupported
from yuan_grpc.preflight.safetensors import Header, read_header
from yuan_grpc.server.start_error import StartError

ARCHITECTURE = "YuanForCausalLM"
MODEL_TYPES = ("yuan", "yuan2")
TOKENIZER = "tokenizer.model"
LFS_POINTER = b"version https://git-lfs"
CHECKED_FORMATS = ("", "auto", "safetensors", "hf", "pt")
SIZES = {"vocab_size": 135040, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24}
"""Fields of `config.json` that determine the shapes, with the defaults of `YuanConfig`."""


def check(folder: Path, flags: Mapping[str, str]) -> int:
    """Check configuration, tokenizer and weights; return the size of the weights in bytes, 0 if unknown.

    Args:
        flags: vLLM's flags by name.

    Raises:
        StartError: a file is missing, incomplete, or of another model.
    """
    config = _read_config(folder)
    _check_architecture(config)
    if "--hf-overrides" not in flags:
        _check_variant(config)
    _check_tokenizer(folder, flags)
    if flags.get("--load-format", "") not in CHECKED_FORMATS:
        return 0
    overridden = {"--hf-overrides", "--hf-config-path", "--quantization", "--model-loader-extra-config"} & flags.keys()
    has_other_names = overridden or config.get("quantization_config")
    return _check_weights(folder, None if has_other_names else config)


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    if not file.is_file():
        inner = [path.parent.name for path in sorted(folder.glob("*/config.json"))]
        hint = f": did you mean its subfolder {inner[0]}?" if inner else ": name the folder of a checkpoint"
        raise StartError(f"{folder} has no config.json{hint}")
    try:
        config = json.loads(file.read_text("utf-8"))
    except ValueError as error:
        raise StartError(f"{file} is not valid JSON ({error}): copy it from the published checkpoint") from None
    if not isinstance(config, dict):
        raise StartError(f"{file} must be a JSON object: copy it from the published checkpoint")
    return config


def _check_architecture(config: Mapping[str, Any]) -> None:
    architectures, model_type = config.get("architectures") or [], config.get("model_type")
    if ARCHITECTURE not in architectures and (architectures or model_type not in MODEL_TYPES):
        name = ", ".join(map(str, architectures)) or f"model_type {model_type!r}"
        raise StartError(f"not a Yuan model: config.json names {name}, and this server runs {ARCHITECTURE} only")


def _check_variant(config: Mapping[str, Any]) -> None:
    """Reject models of the same name that are not supported, before their weights seem to have the wrong shapes."""
    try:
        reject_unsupported(config)
        parse_experts(config.get("use_moe"), config.get("moe_config"), SIZES["intermediate_size"])
    except ValueError as error:
        raise StartError(str(error)) from None


def _check_tokenizer(folder: Path, flags: Mapping[str, str]) -> None:
    if name := flags.get("--tokenizer"):
        folder = Path(name)
        if not folder.is_dir():  # an id on the hub
            return
    file = folder / TOKENIZER
    if not file.is_file():
        raise StartError(f"{folder} has no {TOKENIZER}: copy it from the published checkpoint, or set --tokenizer")
    _check_pointer(file)
    from sentencepiece import SentencePieceProcessor

    try:
        SentencePieceProcessor(model_file=str(file))
    except (RuntimeError, OSError):
        raise StartError(f"{file} is incomplete or not a sentencepiece model: copy it again") from None


def _check_weights(folder: Path, config: Mapping[str, Any] | None) -> int:
    """Check the files that vLLM would load; their names and shapes too, unless the configuration is overridden."""
    if files := _listed_files(folder, "*.safetensors"):
        headers = {file: _check_safetensors(file) for file in files}
        if config is not None:
            _check_names(config, headers)
        return sum(header.data_bytes for header in headers.values())
    files = _listed_files(folder, "*.bin") or _listed_files(folder, "*.pt")
    if not files:
        raise StartError(f"{folder} has no weights, that is no *.safetensors or *.bin file: download them")
    for file in files:
        _check_archive(file)
    return sum(file.stat().st_size for file in files)


def _listed_files(folder: Path, pattern: str) -> list[Path]:
    """Return the weight files of a kind, checked against the index of a checkpoint in several files."""
    files = sorted(file for file in folder.glob(pattern) if file.name != "training_args.bin")
    for index in sorted(folder.glob(f"{pattern}.index.json")):
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise StartError(f"{index} is not a valid index of weights: copy it again") from None
        if missing := [name for name in names if not (folder / name).is_file()]:
            others = f" and {len(missing) - 1} other files" if len(missing) > 1 else ""
            raise StartError(f"{folder} lacks {missing[0]}{others}, which {index.name} lists: download it")
        return [folder / name for name in names]
    return files


def _check_safetensors(file: Path) -> Header:
    _check_pointer(file)
    try:
        return read_header(file)
    except ValueError as error:
        raise StartError(f"{file} is incomplete or damaged: {error}; download it again") from None


def _check_archive(file: Path) -> None:
    _check_pointer(file)
    with file.open("rb") as opened:
        is_archive = opened.read(2) == b"PK"
    if not file.stat().st_size or (is_archive and not zipfile.is_zipfile(file)):
        raise StartError(f"{file} is incomplete: its end is missing; download it again")


def _check_pointer(file: Path) -> None:
    with file.open("rb") as opened:
        if opened.read(len(LFS_POINTER)) == LFS_POINTER:
            raise StartError(f"{file} is a pointer of Git LFS, not the file: run `git lfs pull` in its folder")


def _check_names(config: Mapping[str, Any], headers: Mapping[Path, Header]) -> None:
    """Check names and shapes, with the rules of the loader."""
    sizes = {name: config.get(name, default) for name, default in SIZES.items()}
    if not all(isinstance(size, int) for size in sizes.values()):
        return
    attention = config.get("attention_projection_size") or sizes["hidden_size"]
    moe = parse_experts(config.get("use_moe"), config.get("moe_config"), sizes["intermediate_size"])
    expected = published_shapes(SimpleNamespace(**sizes, attention_size=attention, moe_config=moe))
    shapes = {name: shape for header in headers.values() for name, shape in header.shapes.items()}
    _check_shapes(shapes, expected)
    optional = {HEAD} if config.get("tie_word_embeddings", True) else set[str]()
    if missing := [name for name in expected if name not in shapes and name not in optional]:
        others = f" and {len(missing) - 1} other weights" if len(missing) > 1 else ""
        raise StartError(f"the checkpoint lacks {missing[0]}{others}: {_file_list(headers)} may be incomplete")


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        if name.endswith(DERIVED):
            continue
        if name not in expected:
            raise StartError(f"the checkpoint has a weight that a Yuan model of this config.json lacks: {name}")
        if shape != expected[name]:
            raise StartError(f"{name} must be of shape {list(expected[name])} by config.json, not {list(shape)}")


def _file_list(files: Iterable[Path]) -> str:
    first, *others = sorted(file.name for file in files)
    return first + (f" and {len(others)} other files" if others else "")
