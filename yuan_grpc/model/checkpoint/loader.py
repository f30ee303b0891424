"""The loader of published checkpoints."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from yuan_grpc.model.checkpoint.layout import DERIVED, HEAD, published_shapes
from yuan_grpc.model.config import YuanConfig


@dataclass(frozen=True)
class Placement:
    """The parameter that a published weight is loaded into, and its parts there if several weights share it."""

    param: nn.Parameter
    parts: tuple[int, ...] | tuple[str, ...]

    expert: int | None = None
    """The expert that the weight belongs to, where the parameter has the weights of all experts."""

    def load(self, loaded: torch.Tensor) -> None:
        """Copy the weight, or this rank's share of it, into the parameter; nothing if the rank lacks the expert."""
        # Parameters of parallel layers have a loader that selects this rank's share.
        loader: Callable[..., None] = getattr(self.param, "weight_loader", _copy)
        if self.expert is not None:
            for part, tensor in zip(self.parts, loaded.chunk(len(self.parts)), strict=True):
                loader(self.param, tensor, f"{part}_weight", part, self.expert)
            return
        tensors = split_taps(loaded) if loaded.dim() == 4 else (loaded,)
        if self.parts:
            for part, tensor in zip(self.parts, tensors, strict=True):
                loader(self.param, tensor, part)
        else:
            loader(self.param, torch.cat(tensors) if len(tensors) > 1 else tensors[0])


def split_taps(kernel: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split a convolution kernel, [out, in, 2, 1], into two [out, in]: for the previous token and for the token."""
    return kernel.squeeze(-1).unbind(-1)


def _copy(param: nn.Parameter, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)


def load_checkpoint(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: YuanConfig,
    placement: Callable[[str], Placement | None],
) -> torch.Tensor | None:
    """Load each weight as it is read, in any order, and check for missing and unexpected weights.

    Args:
        weights: Names and tensors of the checkpoint.
        config: The configuration of the checkpoint.
        placement: Returns the placement of a weight by its name; None for weights of other pipeline stages.

    Returns:
        The stored `lm_head.weight` if the configuration ties it to the embedding, or None. It can be compared with the
        embedding only after both are loaded.

    Raises:
        ValueError: A weight is missing, unknown or of another shape; the message names it.
    """
    expected = published_shapes(config)
    missing = dict.fromkeys(expected)
    stored_head = None
    for name, loaded in weights:
        if name.endswith(DERIVED):
            continue
        if name not in expected:
            raise unknown_weight_error(name)
        check_shape(name, loaded, expected[name])
        missing.pop(name, None)
        if name == HEAD and config.tie_word_embeddings:
            stored_head = loaded
        elif place := placement(name):
            place.load(loaded)
    if config.tie_word_embeddings:
        missing.pop(HEAD, None)
    check_none_is_missing(missing)
    return stored_head


def unknown_weight_error(name: str) -> ValueError:
    """Return the error for a weight of the checkpoint that the model does not have."""
    return ValueError(f"the checkpoint has a weight that no Yuan model has: {name}")


def check_shape(name: str, loaded: torch.Tensor, expected: tuple[int, ...]) -> None:
    """Raise ValueError unless a weight of the checkpoint has its published shape."""
    if loaded.shape != expected:
        raise ValueError(f"{name} must be of shape {list(expected)}, not {list(loaded.shape)}")


def check_none_is_missing(missing: Collection[str]) -> None:
    """Raise ValueError if the checkpoint lacks a weight."""
    if missing:
        first, *others = missing
        raise ValueError(f"the checkpoint lacks {first}" + (f" and {len(others)} other weights" if others else ""))
