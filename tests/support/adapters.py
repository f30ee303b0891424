"""LoRA adapters with random weights in the format of PEFT, and checkpoints with adapters merged in."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

PREFIX = "base_model.model."


def write_adapter(
    folder: Path, weights: Mapping[str, Tensor], modules: Iterable[str], *, rank: int = 8, seed: int = 0, **config: Any
) -> dict[str, Tensor]:
    """Write an adapter for the modules and return its tensors.

    Args:
        folder: The folder to write to; created if it does not exist.
        weights: The weights of the checkpoint.
        modules: Ends of module names: `q_proj` for every layer, a longer name for a single layer.
        rank: The rank of all modules.
        seed: The seed of the weights.
        config: Additional fields of `adapter_config.json`.
    """
    generator = torch.Generator().manual_seed(seed)
    suffixes = tuple(f"{module}.weight" for module in modules)
    tensors: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if name.endswith(suffixes):
            module, (outputs, *inputs) = name.removesuffix(".weight"), weight.shape
            a = torch.randn(rank, *inputs, generator=generator) * weight[0].numel() ** -0.5
            b = torch.randn(outputs, rank, *[1] * len(inputs[1:]), generator=generator) * rank**-0.5
            tensors |= {f"{PREFIX}{module}.lora_A.weight": a, f"{PREFIX}{module}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "r": rank, "lora_alpha": rank // 2, "target_modules": list(modules)} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    save_file(tensors, folder / "adapter_model.safetensors")
    return tensors


def merge_adapter(weights: Mapping[str, Tensor], adapter: Path) -> dict[str, Tensor]:
    """Return the checkpoint's weights with B·A * alpha / rank added."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    result = dict(weights)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if name.endswith(".lora_A.weight"):
            module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[name.replace("lora_A", "lora_B")]
            delta = b.flatten(1) @ a.flatten(1) * config["lora_alpha"] / config["r"]
            weight = result[f"{module}.weight"]
            result[f"{module}.weight"] = weight + delta.view_as(weight)
    return result
