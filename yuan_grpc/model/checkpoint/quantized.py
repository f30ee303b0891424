"""The loader of quantized checkpoints: GPTQ, AWQ, compressed-tensors and fp8.

Such a checkpoint has the published names, except that a linear layer has the parameters of its format instead of
`weight`, or scales in addition to it. vLLM's layers for the format have parameters of the same names, and load them.
Convolutions, norms and the embedding are not quantized.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import nn

from yuan_grpc.model.checkpoint.layout import DERIVED, HEAD, published_shapes
from yuan_grpc.model.checkpoint.loader import Placement, check_none_is_missing, check_shape, unknown_weight_error
from yuan_grpc.model.checkpoint.mapping import QUANTIZED_MODULES, parameter_of
from yuan_grpc.model.config import YuanConfig

GROUP_INDICES = ("g_idx", "weight_g_idx")
"""Names of the group of each input. They are stored even if the groups are consecutive."""
OPTIONAL = (*GROUP_INDICES, "weight_shape")


def load_quantized_checkpoint(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: YuanConfig,
    model: nn.Module,
    is_on_other_rank: Callable[[str], bool],
) -> tuple[set[str], torch.Tensor | None]:
    """Load each weight as it is read, in any order, and check for missing and unexpected weights.

    Args:
        weights: Names and tensors of the checkpoint.
        config: The configuration of the checkpoint.
        model: The model, whose linear layers are vLLM's for the format.
        is_on_other_rank: Returns whether a parameter belongs to another pipeline stage.

    Returns:
        The names of the loaded parameters, and the stored `lm_head.weight` if it is tied to the embedding.

    Raises:
        ValueError: A weight is missing, unknown, of another shape, or of a kind that vLLM's layer does not take; the
            message names it.
    """
    loader = _Loader(config, model, is_on_other_rank)
    for name, tensor in weights:
        if not name.endswith(DERIVED):
            loader.load(name, tensor)
    loader.check_missing()
    return {target for target, _ in loader.loaded}, loader.stored_head


class _Loader:
    def __init__(self, config: YuanConfig, model: nn.Module, is_on_other_rank: Callable[[str], bool]) -> None:
        self.config = config
        self.shapes = published_shapes(config)
        self.parameters = dict(model.named_parameters())
        self.is_on_other_rank = is_on_other_rank
        self.loaded: set[tuple[str, tuple[int, ...] | tuple[str, ...]]] = set()
        self.stored_head: torch.Tensor | None = None

    def load(self, name: str, tensor: torch.Tensor) -> None:
        module, _, kind = name.rpartition(".")
        if f"{module}.weight" not in self.shapes:
            raise unknown_weight_error(name)
        if name in self.shapes:
            check_shape(name, tensor, self.shapes[name])
        if name == HEAD and self.config.tie_word_embeddings:
            self.stored_head = tensor
            return
        target, parts, _ = parameter_of(name, QUANTIZED_MODULES)
        if (name not in self.shapes and self._is_redundant(name, kind, tensor)) or self.is_on_other_rank(target):
            return
        if (param := self.parameters.get(target)) is None:
            raise ValueError(f"vLLM's layer for this format of a quantized checkpoint does not take {name}")
        try:
            Placement(param, parts).load(tensor)
        except (AssertionError, RuntimeError) as error:
            raise ValueError(
                f"{name} of shape {list(tensor.shape)} does not fit `quantization_config` in config.json"
            ) from error
        self.loaded.add((target, parts))

    def _is_redundant(self, name: str, kind: str, tensor: torch.Tensor) -> bool:
        """Return whether a parameter holds nothing: groups in the order of the inputs, or a bias of zero."""
        if kind == "bias":
            return not tensor.any()
        if kind in GROUP_INDICES and not self._is_known(name):
            if (tensor.diff() < 0).any():
                raise ValueError(f"{name} must be in ascending order: vLLM does not support `desc_act`")
            return True
        return False

    def _is_known(self, name: str) -> bool:
        return parameter_of(name, QUANTIZED_MODULES).name in self.parameters

    def check_missing(self) -> None:
        """Raise an error for the first parameter of this rank, or part of one, that was not loaded."""
        check_none_is_missing([name for name in self._required() if not self._is_loaded(name)])

    def _required(self) -> list[str]:
        """Return the names that the checkpoint must have, by the parameters of the model's layers."""
        kinds = defaultdict[str, list[str]](list)  # by layer
        for parameter in self.parameters:
            layer, _, kind = parameter.rpartition(".")
            kinds[layer].append(kind)
        required = []
        for name in self.shapes:
            module = name.removesuffix(".weight")
            layer = parameter_of(name, QUANTIZED_MODULES).name.removesuffix(".weight")
            if name.endswith(".weight"):
                required += [f"{module}.{kind}" for kind in kinds[layer] if kind not in OPTIONAL]
            else:
                required.append(name)
        tied = {HEAD} if self.config.tie_word_embeddings else set[str]()
        return [name for name in required if name not in tied]

    def _is_loaded(self, name: str) -> bool:
        target, parts, _ = parameter_of(name, QUANTIZED_MODULES)
        return (target, parts) in self.loaded or self.is_on_other_rank(target)
