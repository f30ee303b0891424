"""Quantized checkpoints in the published layouts of GPTQ and AWQ, and the weights that a quantized checkpoint holds."""

import json
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Columns that AWQ stores in a word, from the lowest bits."""


def write_quantized(source: Path, target: Path, method: str, group_size: int) -> dict[str, Tensor]:
    """Write a checkpoint in the layout of "gptq" or "awq", rounded to nearest; return its weights in float32."""
    target.mkdir()
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json"):
        (target / name).write_bytes((source / name).read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4, "group_size": group_size} | (
        {"sym": True, "desc_act": False} if method == "gptq" else {"zero_point": True, "version": "gemm"}
    )
    (target / "config.json").write_text(json.dumps(config))
    stored, dequantized = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            stored[name], dequantized[name] = weight, weight.float()
            continue
        values, zeros, scales = _round(weight.float(), group_size, is_symmetric=method == "gptq")
        dequantized[name] = ((values - zeros) * scales).flatten(1)
        tensors = (_gptq if method == "gptq" else _awq)(values.flatten(1).T, zeros[..., 0].T, group_size)
        tensors["scales"] = scales[..., 0].T.contiguous().to(torch.bfloat16)
        stored |= {name.removesuffix("weight") + kind: tensor for kind, tensor in tensors.items()}
    save_file(stored, target / "model.safetensors")
    return dequantized


def _round(weight: Tensor, group_size: int, *, is_symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return values from 0 to 15, [rows, groups, group_size], and their zeros and scales, [rows, groups, 1]."""
    groups = weight.view(len(weight), -1, group_size)
    low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
    scales = groups.abs().amax(-1, keepdim=True) / 7 if is_symmetric else (high - low) / 15
    scales = scales.to(torch.bfloat16).float()
    zeros = torch.full_like(low, 8) if is_symmetric else (-low / scales).round().clamp(0, 15)
    return ((groups / scales).round() + zeros).clamp(0, 15), zeros, scales


def _pack(values: Tensor) -> Tensor:
    """Pack eight values of the last dimension into a word, the first in the lowest bits."""
    words = values.int().reshape(len(values), -1, 8) << torch.arange(0, 32, 4, dtype=torch.int32)
    return words.sum(-1, dtype=torch.int32)


def _gptq(values: Tensor, zeros: Tensor, group_size: int) -> dict[str, Tensor]:
    """Pack [columns, rows] along the columns, and zeros less one along the rows."""
    return {
        "qweight": _pack(values.T.contiguous()).T.contiguous(),
        "qzeros": _pack(zeros.contiguous() - 1),
        "g_idx": torch.arange(len(values), dtype=torch.int32) // group_size,
    }


def _awq(values: Tensor, zeros: Tensor, group_size: int) -> dict[str, Tensor]:
    """Pack [columns, rows] and the zeros along the rows, in AWQ's order."""

    def pack(numbers: Tensor) -> Tensor:
        return _pack(numbers.reshape(len(numbers), -1, 8)[..., AWQ_ORDER].flatten(-2))

    return {"qweight": pack(values), "qzeros": pack(zeros)}


def dequantize_compressed(checkpoint: Path) -> dict[str, Tensor]:
    """Return the weights of a checkpoint of `yuan-grpc quantize` in float32, unpacked by compressed-tensors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # those of torch while it is imported
        from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32

    weights = {}
    stored = load_file(checkpoint / "model.safetensors")
    for name, tensor in stored.items():
        module, _, kind = name.rpartition(".")
        scale = stored.get(f"{module}.weight_scale")
        if kind in ("weight_scale", "weight_shape"):
            continue
        if kind == "weight_packed":
            tensor = unpack_from_int32(tensor, 4, torch.Size(stored[f"{module}.weight_shape"].tolist()))
        value = tensor.float()
        if scale is not None:
            value = value * scale.float().repeat_interleave(value.shape[1] // scale.shape[1], 1)
        weights[f"{module}.{'bias' if kind == 'bias' else 'weight'}"] = value
    return weights
