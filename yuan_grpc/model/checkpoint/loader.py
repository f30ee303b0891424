"""Loading a published checkpoint: what happens to each weight on its way into the model."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from yuan_grpc.model.checkpoint.layout import DERIVED, HEAD, published_shapes
from yuan_grpc.model.config import YuanConfig


@dataclass(frozen=True)
class Placement:
    """Where a published weight goes: a parameter, and which parts of it where several weights share one."""

    param: nn.Parameter
    parts: tuple[int, ...]

    def load(self, loaded: torch.Tensor) -> None:
        """Copies the weight, or this rank's share of it, into the parameter."""
        pieces = taps(loaded) if loaded.dim() == 4 else (loaded,)
        loader: Callable[..., None] = getattr(
            self.param, "weight_loader", _copy
        )  # a parallel layer's takes this rank's share
        if self.parts:
            for part, piece in zip(self.parts, pieces, strict=True):
                loader(self.param, piece, part)
        else:
            loader(self.param, torch.cat(pieces) if len(pieces) > 1 else pieces[0])


def taps(kernel: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """A published convolution [out, in, 2, 1] as two matrices [out, in]: of the token before, and of the token."""
    return kernel.squeeze(-1).unbind(-1)


def _copy(param: nn.Parameter, loaded: torch.Tensor) -> None:
    param.data.copy_(loaded)


def load_checkpoint(
    weights: Iterable[tuple[str, torch.Tensor]],
    config: YuanConfig,
    placement: Callable[[str], Placement | None],
) -> torch.Tensor | None:
    """Loads weights in whatever order they come, each as it comes, and checks that they are the ones there must be.

    Returns:
        The stored `lm_head.weight` of a model whose configuration ties it to the embedding, if there is one: whether
        it is needed can be told only once the embedding is loaded.

    Raises:
        ValueError: a weight is missing, unknown or of another shape; the message names it.
    """
    expected = published_shapes(config)
    missing = dict.fromkeys(expected)
    stored_head = None
    for name, loaded in weights:
        if name.endswith(DERIVED):
            continue
        if name not in expected:
            raise ValueError(f"the checkpoint has a weight no Yuan model has: {name}")
        if loaded.shape != expected[name]:
            raise ValueError(f"{name} must be of shape {list(expected[name])}, not {list(loaded.shape)}")
        missing.pop(name, None)
        if name == HEAD and config.tie_word_embeddings:
            stored_head = loaded
        elif place := placement(name):
            place.load(loaded)
    if config.tie_word_embeddings:
        missing.pop(HEAD, None)
    if missing:
        first, *others = missing
        raise ValueError(f"the checkpoint lacks {first}" + (f" and {len(others)} other weights" if others else ""))
    return stored_head
