"""Quantization of a checkpoint by rounding: int4, int8 or fp8, in the format of compressed-tensors.

Each row of a linear layer, or each group of a row, gets a scale. The weights are rounded to its multiples, and no data
is needed. Norms, embedding, `lm_head` and the convolutions of LFA stay as they are.
"""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from yuan_grpc.model.checkpoint.layout import HEAD

CONFIG = "config.json"
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.safetensors.index.json", "*.bin.index.json")
MAX_SHARD_BYTES = 5 * 10**9
GROUP_SIZE = 128
PER_WORD = 8
"""Weights of four bits in a word of 32."""
LARGEST_INT4, LARGEST_INT8, LARGEST_FP8 = 7, 127, 448
SHRINKS = torch.linspace(1.0, 0.7, 13)
"""Factors of the scale to try for four bits. A smaller scale clips the largest weights and rounds the others less."""


@dataclass(frozen=True)
class Scheme:
    """A way to store the weights of a linear layer, and to compute with them.

    Attributes:
        format: the name that compressed-tensors has for the layout.
        bits: the size of a weight.
        type: "int" or "float".
        is_grouped: whether each group of a row has a scale, instead of each row.
        quantizes_activations: whether inputs are quantized too, with a scale for each token.
    """

    format: str
    bits: int
    type: str
    is_grouped: bool
    quantizes_activations: bool


SCHEMES = {
    "int4": Scheme("pack-quantized", 4, "int", is_grouped=True, quantizes_activations=False),
    "int8": Scheme("int-quantized", 8, "int", is_grouped=False, quantizes_activations=True),
    "fp8": Scheme("float-quantized", 8, "float", is_grouped=False, quantizes_activations=True),
}


def quantize_checkpoint(
    source: Path,
    target: Path,
    scheme: str,
    group_size: int = GROUP_SIZE,
    report: Callable[[str], None] = lambda name: None,
) -> None:
    """Write a quantized copy of a checkpoint, with all its other files. Needs memory for one file of weights.

    Args:
        source: the folder of a checkpoint in safetensors.
        target: a new folder.
        scheme: a key of `SCHEMES`.
        group_size: number of neighboring weights with one scale, for "int4".
        report: called with the name of each weight that has been written.

    Raises:
        ValueError: the checkpoint is quantized already, has experts, is in another format, or does not fit the group
            size, or the target exists.
        OSError: a file cannot be read or written.
    """
    files = sorted(source.glob("*.safetensors"))
    config = json.loads((source / CONFIG).read_text("utf-8"))
    if not files:
        raise ValueError(f"{source} must have *.safetensors files, not {_other_weights(source)}")
    if method := (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(f"{source} must not be quantized, but is with {method}")
    if config.get("moe_config"):
        raise ValueError(f"{source} must be a model without experts: quantized experts are not read")
    if target.exists():
        raise ValueError(f"{target} must be a new folder")
    kind, group = SCHEMES[scheme], group_size if SCHEMES[scheme].is_grouped else None
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        for file in source.iterdir():
            if file.is_file() and not any(file.match(pattern) for pattern in WEIGHTS):
                shutil.copyfile(file, folder / file.name)
        _write_weights(folder, _quantized(files, kind, group), report)
        config["quantization_config"] = quantization_config(kind, group)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        folder.rename(target)


def _other_weights(folder: Path) -> str:
    return ", ".join(sorted(file.name for pattern in WEIGHTS for file in folder.glob(pattern))) or "none"


def _quantized(files: list[Path], scheme: Scheme, group_size: int | None) -> Iterator[tuple[str, torch.Tensor]]:
    for file in files:
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - not a dictionary
                weight = opened.get_tensor(name)
                if name.endswith("_proj.weight"):
                    yield from quantize_weight(name, weight, scheme, group_size)
                else:
                    yield name, weight


def quantize_weight(
    name: str, weight: torch.Tensor, scheme: Scheme, group_size: int | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters of a linear layer, with their names.

    Args:
        name: the published name, which ends with `.weight`.
        weight: [rows, columns].
        scheme: the scheme.
        group_size: number of columns with one scale; None for whole rows.

    Raises:
        ValueError: the group size does not divide the number of columns.
    """
    rows, columns = weight.shape
    size = group_size or columns
    if columns % size or size % PER_WORD:
        raise ValueError(
            f"the group size must divide {columns}, the columns of {name}, and be a multiple of 8, not {size}"
        )
    groups = weight.float().view(rows, -1, size)
    if scheme.is_grouped:
        scale = _best_scale(groups, weight.dtype)
        values = pack(_rounded(groups, scale, LARGEST_INT4).view(rows, columns))
        stored = {"weight_packed": values, "weight_shape": torch.tensor([rows, columns])}
    elif scheme.type == "int":
        scale = _full_scale(groups, LARGEST_INT8, weight.dtype)
        stored = {"weight": _rounded(groups, scale, LARGEST_INT8).view(rows, columns).to(torch.int8)}
    else:
        scale = _full_scale(groups, LARGEST_FP8, weight.dtype)
        scaled = (groups / scale).clamp(-LARGEST_FP8, LARGEST_FP8)
        stored = {"weight": scaled.view(rows, columns).to(torch.float8_e4m3fn)}
    module = name.removesuffix("weight")
    yield from ((module + kind, tensor) for kind, tensor in stored.items())
    yield f"{module}weight_scale", scale[..., 0].to(weight.dtype)


def _full_scale(groups: torch.Tensor, largest: int, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale of each group, as it is stored, with which the largest weight is the largest number."""
    return _stored(groups.abs().amax(-1, keepdim=True) / largest, dtype)


def _stored(scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Round a scale to what is stored; that of a group of zeros is 1."""
    rounded = scale.to(dtype).float()
    return torch.where(rounded == 0, 1, rounded)


def _rounded(groups: torch.Tensor, scale: torch.Tensor, largest: int) -> torch.Tensor:
    return (groups / scale).round().clamp(-largest - 1, largest)


def _best_scale(groups: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the scale of each group, as it is stored, with the smallest sum of squared errors."""
    full = groups.abs().amax(-1, keepdim=True) / LARGEST_INT4
    best = smallest = torch.full_like(full, torch.inf)
    for shrink in SHRINKS:
        scale = _stored(full * shrink, dtype)
        error = (_rounded(groups, scale, LARGEST_INT4) * scale - groups).square().sum(-1, keepdim=True)
        best = torch.where(error < smallest, scale, best)
        smallest = torch.minimum(error, smallest)
    return best


def pack(values: torch.Tensor) -> torch.Tensor:
    """Pack integers from -8 to 7, [rows, columns], into words of eight, [rows, columns / 8], the first one lowest."""
    words = (values.to(torch.int32) + LARGEST_INT4 + 1).view(len(values), -1, PER_WORD)
    return (words << torch.arange(0, 32, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)


def quantization_config(scheme: Scheme, group_size: int | None) -> dict[str, Any]:
    """Return `quantization_config` of config.json as compressed-tensors writes it.

    Args:
        scheme: a value of `SCHEMES`.
        group_size: number of columns with one scale; None for whole rows.
    """

    def numbers(strategy: str, **fields: object) -> dict[str, Any]:
        kind = {"num_bits": scheme.bits, "type": scheme.type, "symmetric": True, "strategy": strategy}
        return kind | {"group_size": None, "dynamic": False} | fields

    weights = numbers("group", group_size=group_size) if group_size else numbers("channel")
    activations = numbers("token", dynamic=True) if scheme.quantizes_activations else None
    return {
        "quant_method": "compressed-tensors",
        "format": scheme.format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": activations}},
        "ignore": [HEAD.removesuffix(".weight")],
    }


def _write_weights(folder: Path, weights: Iterator[tuple[str, torch.Tensor]], report: Callable[[str], None]) -> None:
    """Write files of at most `MAX_SHARD_BYTES`, unless one weight is larger, and their index."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = size = 0

    def flush() -> None:
        save_file(shard, folder / f"{len(shards)}.partial", {"format": "pt"})
        shards.append(list(shard))

    for name, weight in weights:
        if shard and size + weight.nbytes > MAX_SHARD_BYTES:
            flush()
            shard, size = {}, 0
        shard[name] = weight.contiguous()
        size, total = size + weight.nbytes, total + weight.nbytes
        report(name)
    flush()
    names: dict[str, str] = {}
    for number, members in enumerate(shards):
        file = f"model-{number + 1:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        (folder / f"{number}.partial").rename(folder / file)
        (folder / file).chmod(0o644)  # safetensors makes files private, but a server may run as another user
        names |= dict.fromkeys(members, file)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": names}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
