"""Yuan 2.0 as a trainable module of plain torch: batches of whole sequences, no cache.

The formulas are those of `yuan_grpc/model/yuan.py`, which serves the result. The names of the parameters are those of
published checkpoints.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

LFA_EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    """The sizes of a model, under their names in `config.json`. Without `has_lfa`, queries and keys are unfiltered."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    rms_norm_eps: float = 1e-6
    has_lfa: bool = True


class Convolution(nn.Module):
    """A dense causal convolution over two tokens."""

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, width, 2, 1) * (2 * width) ** -0.5)
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Convolve [batch, tokens, width] to [batch, tokens, channels]; the token before the first one is zero."""
        pairs = torch.cat([F.pad(x, (0, 0, 1, -1)), x], dim=-1)
        return F.linear(pairs, self.weight.squeeze(-1).transpose(1, 2).flatten(1), self.bias)


class Filter(nn.Module):
    """Localized filtering: two convolutions with a residual connection and a norm."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.conv1 = Convolution(hidden, hidden // 2)
        self.conv2 = Convolution(hidden // 2, hidden)
        self.output_layernorm = nn.RMSNorm(hidden, eps=LFA_EPS)

    def forward(self, y: Tensor) -> Tensor:
        """Mix each token with the two before it."""
        filtered: Tensor = self.output_layernorm(self.conv2(self.conv1(y)) + y)
        return filtered


class Attention(nn.Module):
    """Causal attention whose queries and keys are computed from filtered tokens."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden_size
        self.heads = shape.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (_linear(hidden, hidden) for _ in range(4))
        self.lf_gate: nn.Module = Filter(hidden) if shape.has_lfa else nn.Identity()

    def forward(self, y: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attend over [batch, tokens, hidden], with cosines and sines of [tokens, head_dim / 2]."""
        z = self.lf_gate(y)
        joined = torch.cat([self.q_proj(z), self.k_proj(z)], dim=-1)
        # A head's query and key are next to each other in the joined columns.
        q, k = joined.view(*joined.shape[:2], self.heads, -1).transpose(1, 2).chunk(2, dim=-1)
        v = self.v_proj(y).view(*y.shape[:2], self.heads, -1).transpose(1, 2)
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        output: Tensor = self.o_proj(_attend(q, k, v).transpose(1, 2).flatten(2))
        return output


class Mlp(nn.Module):
    """A gated MLP. The activation is on `up`, not on `gate`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.up_proj, self.gate_proj = (_linear(shape.hidden_size, shape.intermediate_size) for _ in range(2))
        self.down_proj = _linear(shape.intermediate_size, shape.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        """Transform each token by itself."""
        output: Tensor = self.down_proj(F.silu(self.up_proj(y)) * self.gate_proj(y))
        return output


class Layer(nn.Module):
    """A decoder layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add the outputs of attention and MLP to the residual stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        output: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return output


class Decoder(nn.Module):
    """The embedding, the layers and the last norm: the parameters that a checkpoint has under `model.`."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        nn.init.normal_(self.embed_tokens.weight, std=shape.hidden_size**-0.5)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, eps=shape.rms_norm_eps)


class TrainableYuan(nn.Module):
    """A Yuan model whose head is the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.model = Decoder(shape)
        self.head_dim = shape.hidden_size // shape.num_attention_heads
        for name, weight in self.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                nn.init.zeros_(weight)  # a layer begins as the identity

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next token after each of [batch, tokens] ids: [batch, tokens, vocabulary]."""
        x = self.model.embed_tokens(ids)
        cos, sin = self._rotation(ids.shape[1])
        for layer in self.model.layers:
            x = layer(x, cos, sin)
        return F.linear(self.model.norm(x), self.model.embed_tokens.weight)

    def _rotation(self, tokens: int) -> tuple[Tensor, Tensor]:
        frequencies = torch.pow(10_000.0, -torch.arange(0, self.head_dim, 2) / self.head_dim)
        angles = torch.arange(tokens)[:, None] * frequencies
        return angles.cos(), angles.sin()


def _linear(width: int, channels: int) -> nn.Linear:
    layer = nn.Linear(width, channels, bias=False)
    nn.init.normal_(layer.weight, std=width**-0.5)
    return layer


def _attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend causally. For short sequences this trains faster on CPUs than torch's fused attention."""
    scores = (q @ k.transpose(-1, -2)).float() * q.shape[-1] ** -0.5
    future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    mixed: Tensor = scores.masked_fill(future, -torch.inf).softmax(-1).to(v.dtype) @ v
    return mixed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
