"""The complete Yuan 2.0 and Yuan2.0-M32 model, built from vLLM's layers."""

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar, cast

import torch
from torch import nn
from torch.utils.serialization import config as serialization
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.tokenizers.registry import cached_tokenizer_from_config

from yuan_grpc.model.attention.backend import attention_backend
from yuan_grpc.model.checkpoint.loader import Placement, load_checkpoint
from yuan_grpc.model.checkpoint.mapping import parameter_of
from yuan_grpc.model.checkpoint.progress import report_progress
from yuan_grpc.model.checkpoint.quantized import load_quantized_checkpoint
from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.hopper import is_hopper
from yuan_grpc.model.lfa.layer import LocalizedFiltering
from yuan_grpc.model.lfa.ops import new_plan
from yuan_grpc.model.linear import has_quantized_weights, input_projection, query_key_projection
from yuan_grpc.model.moe.layer import YuanExperts
from yuan_grpc.model.patches import cpu_expert_map, cpu_lora_slots, cpu_seeds, lora_classes, prompt_graphs
from yuan_grpc.model.rotary import rotary_embedding

logger = init_logger("vllm.yuan_grpc.model")


class YuanAttention(nn.Module):
    """Attention with queries and keys computed from the filtered input and values from the unfiltered input."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        hidden, self.head_dim = config.hidden_size, config.head_dim
        ranks = get_tensor_model_parallel_world_size()
        heads, self.sizes = config.num_attention_heads // ranks, [hidden // ranks, config.attention_size // ranks]
        self.input_proj = input_projection(config, vllm_config, f"{prefix}.input_proj")
        self.qk_proj = query_key_projection(config, vllm_config, f"{prefix}.qk_proj")
        self.o_proj = RowParallelLinear(
            config.attention_size, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = rotary_embedding(config, vllm_config.model_config.max_model_len)
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
            attn_backend=attention_backend(vllm_config, self.head_dim),
        )
        # After the attention: NIXL compares the engines' backends, and takes the first layer's.
        self.lf_gate = LocalizedFiltering(config, vllm_config, f"{prefix}.lf_gate")

    def forward(self, positions: torch.Tensor, y: torch.Tensor, plan: torch.Tensor) -> torch.Tensor:
        projected, _ = self.input_proj(y)  # [tokens, (hidden + heads * head_dim) / ranks]
        contributions, v = projected.split(self.sizes, dim=-1)
        qk, _ = self.qk_proj(self.lf_gate(contributions, y, plan))
        q, k = qk.chunk(2, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class YuanMLP(nn.Module):
    """Gated MLP with the activation on `up`: down(silu(up(x)) * gate(x))."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        hidden, width, quant_config = config.hidden_size, config.intermediate_size, vllm_config.quant_config
        self.up_gate_proj = MergedColumnParallelLinear(
            hidden, [width] * 2, bias=False, quant_config=quant_config, prefix=f"{prefix}.up_gate_proj"
        )
        self.down_proj = RowParallelLinear(
            width, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.down_proj"
        )
        self.activation = SiluAndMul()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        up_gate, _ = self.up_gate_proj(x)
        output, _ = self.down_proj(self.activation(up_gate))
        return output


class YuanDecoderLayer(nn.Module):
    """Decoder layer; the residual stream is a separate tensor, `residual`, which the norms add to their input."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = YuanAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = (YuanExperts if config.use_moe else YuanMLP)(config, vllm_config, f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None, plan: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden, plan)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@support_torch_compile
class YuanModel(nn.Module):
    """Decoder: embedding, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: YuanConfig = vllm_config.model_config.hf_config
        pipeline = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if pipeline.is_first_rank or (config.tie_word_embeddings and pipeline.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: YuanDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.lfa_name = self.layers[self.start_layer].self_attn.lf_gate.layer_name
        self.norm: nn.Module = PPMissingLayer()
        if pipeline.is_last_rank:
            self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], config.hidden_size
        )

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual: torch.Tensor | None
        if get_pp_group().is_first_rank:
            hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
            residual = None
        else:
            assert intermediate_tensors is not None
            hidden, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        plan = new_plan(hidden)  # before all layers, because their kernels read it before they wait: see `pdl`
        torch.ops.vllm.yuan_plan(plan, self.lfa_name)
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual, plan)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        normed, _ = self.norm(hidden, residual)
        return normed


class YuanForCausalLM(nn.Module, SupportsLoRA, SupportsPP):
    """The model that vLLM loads and runs: decoder, head and checkpoint loading."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "input_proj": ["lf_gate.conv1", "v_proj"],
        "qk_proj": ["q_proj", "k_proj"],
        "up_gate_proj": ["up_proj", "gate_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        cpu_seeds.apply()
        if is_hopper():
            prompt_graphs.apply()
        if vllm_config.lora_config is not None:
            cpu_lora_slots.apply()
            lora_classes.apply()
        self.vllm_config = vllm_config
        self.config: YuanConfig = vllm_config.model_config.hf_config
        if self.config.use_moe:
            cpu_expert_map.apply()
        self.prefix = prefix
        self.model = YuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = self._new_head()
            self.lm_head = head.tie_weights(self.model.embed_tokens) if self.config.tie_word_embeddings else head
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        # The embedding has more rows than the tokenizer has tokens; the others are padding and must never be sampled.
        self.known_tokens = self.config.vocab_size if tokenizer is None else len(tokenizer)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors
        if current_platform.is_cuda() and vllm_config.kernel_config.linear_backend == "auto":
            from yuan_grpc.model import skinny_gemm  # here, because it needs Triton

            skinny_gemm.use_yuan_linear(self)

    def _new_head(self) -> ParallelLMHead:
        return ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=self.vllm_config.quant_config,
            prefix=maybe_prefix(self.prefix, "lm_head"),
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of [tokens] ids, [tokens, hidden]."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """Return the hidden states of [tokens] ids and positions: [tokens, hidden] on the last pipeline rank."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Return logits, [rows, vocab_size], with minus infinity for padding ids; None on ranks that do not sample."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden)
        if logits is not None:
            logits[:, self.known_tokens :] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load a published checkpoint, one weight at a time.

        Returns:
            Names of the loaded parameters.

        Raises:
            ValueError: a weight is missing, unknown or has the wrong shape; the message names it.
        """
        load = self._load_quantized if has_quantized_weights(self.vllm_config) else self._load_published
        # vLLM would read a `.bin` file completely into memory; Linux can reclaim the pages of a mapped file.
        with serialization.patch("load.mmap", True):  # type: ignore[attr-defined]
            loaded, stored_head = load(report_progress(weights, self.config))
        if stored_head is not None and get_pp_group().is_last_rank:
            self._load_head(stored_head)
        return loaded

    def _load_published(self, weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[set[str], torch.Tensor | None]:
        loaded: set[str] = set()

        def placement(name: str) -> Placement | None:
            target, parts, expert = parameter_of(name)
            if self._is_on_other_rank(target):
                return None
            loaded.add(target)
            return Placement(self.get_parameter(target), parts, expert)

        return loaded, load_checkpoint(weights, self.config, placement)

    def _load_quantized(self, weights: Iterable[tuple[str, torch.Tensor]]) -> tuple[set[str], torch.Tensor | None]:
        """Load a checkpoint with the parameters that vLLM's linear layers for its format take."""
        return load_quantized_checkpoint(weights, self.config, self, self._is_on_other_rank)

    def _is_on_other_rank(self, target: str) -> bool:
        """Return whether a parameter belongs to another pipeline rank."""
        return bool(is_pp_missing_parameter(target, self))

    def _load_head(self, stored: torch.Tensor) -> None:
        """Load the head that a checkpoint stores despite a tied embedding; keep a second copy only if they differ."""
        embed_tokens = cast(VocabParallelEmbedding, self.model.embed_tokens)
        embedding, indices = embed_tokens.weight, embed_tokens.shard_indices
        shard = stored[indices.org_vocab_start_index : indices.org_vocab_end_index]
        if torch.equal(shard.to(embedding), embedding[: len(shard)]):
            return
        logger.warning("config.json ties lm_head to the embedding, but the stored weights differ: using lm_head.weight")
        with embedding.device:
            head = self._new_head()
        head.to(embedding.dtype)
        head.weight.weight_loader(head.weight, stored)
        self.lm_head = head
