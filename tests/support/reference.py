"""Reference implementation of Yuan 2.0 and Yuan2.0-M32 in plain torch: float32, whole sequences, no cache."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import silu, softmax


@dataclass(frozen=True)
class Continuation:
    """Greedy continuation with the log-probability of each token."""

    token_ids: list[int]
    logprobs: list[float]


class ReferenceYuan:
    """Yuan 2.0 with the weights of a checkpoint, evaluated on whole sequences."""

    def __init__(self, checkpoint: Path, num_tokens: int) -> None:
        self.config = json.loads((checkpoint / "config.json").read_text())
        self.weights = {
            name: weight.float()
            for file in sorted(checkpoint.glob("*.safetensors"))
            for name, weight in load_file(file).items()
        }
        if self.weights:  # else the caller sets those of a file in another format
            self.weights.setdefault("lm_head.weight", self.weights["model.embed_tokens.weight"])
        self.num_tokens = num_tokens
        self.heads = self.config["num_attention_heads"]
        self.rotated = self.config["hidden_size"] // self.heads
        self.head_dim = (self.config.get("attention_projection_size") or self.config["hidden_size"]) // self.heads
        self.scale = self.head_dim**-0.5

    def logprobs(self, token_ids: list[int]) -> Tensor:
        """Return log-probabilities of the next token after each of [tokens] ids: [tokens, num_tokens], no padding."""
        x = self.weights["model.embed_tokens.weight"][token_ids]
        for layer in range(self.config["num_hidden_layers"]):
            x = self._layer(x, f"model.layers.{layer}.")
        logits = self._norm(x, "model.norm.weight") @ self.weights["lm_head.weight"].T
        return torch.log_softmax(logits[:, : self.num_tokens], dim=-1)

    def continue_greedily(self, prompt: list[int], tokens: int) -> Continuation:
        """Append the most likely token repeatedly."""
        ids, logprobs = list(prompt), []
        for _ in range(tokens):
            logprob, token = self.logprobs(ids)[-1].max(dim=-1)
            ids.append(int(token))
            logprobs.append(float(logprob))
        return Continuation(ids[len(prompt) :], logprobs)

    def _layer(self, x: Tensor, prefix: str) -> Tensor:
        y = self._norm(x, prefix + "input_layernorm.weight")
        v = y @ self.weights[prefix + "self_attn.v_proj.weight"].T
        z = self._filter(y, prefix + "self_attn.lf_gate.")
        qk = torch.cat([z @ self.weights[prefix + f"self_attn.{name}_proj.weight"].T for name in "qk"], dim=-1)
        qk = qk.view(-1, self.heads, 2 * self.head_dim)
        q, k = self._rotate(qk[..., : self.head_dim]), self._rotate(qk[..., self.head_dim :])
        scores = torch.einsum("shd,thd->hst", q, k) * self.scale
        future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
        mixed = torch.einsum("hst,thd->shd", softmax(scores.masked_fill(future, -torch.inf), dim=-1), v.view_as(q))
        x = x + mixed.flatten(1) @ self.weights[prefix + "self_attn.o_proj.weight"].T
        y = self._norm(x, prefix + "post_attention_layernorm.weight")
        if self.config.get("moe_config"):
            return x + self._mix_experts(y, prefix + "mlp.")
        up, gate = (y @ self.weights[prefix + f"mlp.{name}_proj.weight"].T for name in ("up", "gate"))
        return x + (silu(up) * gate) @ self.weights[prefix + "mlp.down_proj.weight"].T

    def _mix_experts(self, y: Tensor, prefix: str) -> Tensor:
        """Run each token through its experts, one after the other."""
        moe = self.config["moe_config"]
        mixed = torch.zeros_like(y)
        for row, probabilities in enumerate(softmax(self._score_experts(y, prefix + "gate."), dim=-1)):
            shares, experts = probabilities.sort(descending=True)
            shares = shares[: moe["moe_top_k"]]
            if moe.get("norm_topk_prob", True):
                shares = shares / shares.sum()
            for share, expert in zip(shares, experts.tolist(), strict=False):
                mixed[row] += share * self._run_expert(y[row], f"{prefix}experts.{expert}.")
        return mixed

    def _score_experts(self, y: Tensor, prefix: str) -> Tensor:
        q, k, v = (y @ self.weights[f"{prefix}{name}.weight"].T for name in ("query", "key", "value"))
        return torch.einsum("tij,tj->ti", softmax(torch.einsum("ti,tj->tij", q, k), dim=-1), v)

    def _run_expert(self, token: Tensor, prefix: str) -> Tensor:
        h = self.weights[prefix + "w1.weight"] @ token
        width = len(h) // 2
        product: Tensor = self.weights[prefix + "w2.weight"] @ (silu(h[:width]) * h[width:])
        return product

    def _filter(self, y: Tensor, prefix: str) -> Tensor:
        h1 = self._convolve(y, prefix + "conv1.")
        h2 = self._convolve(h1, prefix + "conv2.")
        return self._norm(h2 + y, prefix + "output_layernorm.weight", eps=1e-6)

    def _convolve(self, x: Tensor, prefix: str) -> Tensor:
        kernel, bias = self.weights[prefix + "weight"], self.weights[prefix + "bias"]  # [out, in, 2, 1], [out]
        previous = torch.cat([torch.zeros_like(x[:1]), x[:-1]])
        return previous @ kernel[:, :, 0, 0].T + x @ kernel[:, :, 1, 0].T + bias

    def _norm(self, x: Tensor, name: str, eps: float | None = None) -> Tensor:
        eps = self.config["rms_norm_eps"] if eps is None else eps
        return self.weights[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)

    def _rotate(self, x: Tensor) -> Tensor:
        """Apply NeoX-style rotary embedding to the first dimensions of each head: [tokens, heads, head_dim]."""
        frequencies, magnitude = self._yarn() if self.config.get("use_yarn") else (self._frequencies(10_000.0), 1.0)
        angles = torch.arange(len(x))[:, None] * frequencies
        cos, sin = magnitude * angles.cos()[:, None], magnitude * angles.sin()[:, None]
        a, b = x[..., : self.rotated].chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin, x[..., self.rotated :]], dim=-1)

    def _frequencies(self, default_base: float) -> Tensor:
        base: float = self.config.get("rope_theta", default_base)
        return torch.pow(base, -torch.arange(0, self.rotated, 2) / self.rotated)

    def _yarn(self) -> tuple[Tensor, float]:
        """Return YaRN's frequencies, [head_dim / 2], and the factor for cosines and sines."""
        d, base, scaling = self.head_dim, self.config.get("rope_theta", 1e6), self.config.get("rope_scaling", {})
        s, original = scaling.get("factor", 128), scaling.get("original_max_position_embeddings", 8192)
        low, high = (d * math.log(original / (2 * math.pi * r)) / (2 * math.log(base)) for r in (32, 1))
        low, high = max(math.floor(low), 0), min(math.ceil(high), d - 1)
        ramp = ((torch.arange(d // 2) - low) / (high - low)).clamp(0, 1)
        mask = 1 - ramp
        return self._frequencies(1e6) / ((1 - mask) * s + mask), 0.1 * math.log(s) + 1
