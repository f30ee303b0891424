"""The attention router of Yuan2.0-M32.

A plain router scores each expert by itself. This one lets the experts of a token attend to each other:

    q, k, v = Wq x, Wk x, Wv x           one number per expert each
    r       = softmax(q kᵀ) v            over the columns, in float32, without scaling

No token sees another one.
"""

import torch
from torch import nn
from torch.nn.functional import linear


class AttentionRouter(nn.Module):
    """Scores of all experts; the same on every rank."""

    def __init__(self, hidden: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3 * experts, hidden), requires_grad=False)
        """Wq, Wk and Wv, one product."""
        self.weight.weight_loader = load_projection  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the scores of [tokens, hidden], float32 [tokens, experts]."""
        return attend(linear(x, self.weight).float())


def attend(projected: torch.Tensor) -> torch.Tensor:
    """Return softmax(q kᵀ) v for each token of `projected`, float32 [tokens, 3 * experts]: q, k and v."""
    q, k, v = projected.chunk(3, dim=-1)
    weights = torch.softmax(q[:, :, None] * k[:, None, :], dim=-1)
    return (weights * v[:, None, :]).sum(dim=-1)


def load_projection(param: nn.Parameter, loaded: torch.Tensor, projection: int) -> None:
    """Copy a published projection, [experts, hidden], into the parameter; 0 is query, 1 is key, 2 is value."""
    param.data.chunk(3)[projection].copy_(loaded)
