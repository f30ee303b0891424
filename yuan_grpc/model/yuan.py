"""Yuan 2.0, top to bottom, on vLLM's layers."""

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar, cast

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, MergedColumnParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsLoRA, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.platforms import current_platform
from vllm.sequence import IntermediateTensors
from vllm.tokenizers.registry import cached_tokenizer_from_config

from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.filtering import LocalizedFiltering, state_copy, state_dtype, state_shape
from yuan_grpc.model.weights import Placement, load_checkpoint

logger = init_logger("vllm.yuan_grpc.model")


class QueryKeyLinear(MergedColumnParallelLinear):
    """q_proj and k_proj as one product whose result is all queries, then all keys.

    The published model concatenates the two results, cuts that into heads of twice the head dimension, and only then
    calls a head's first half query and its second half key. So a head's query and key both come out of the same
    projection. Sorting the rows once, at load, spares the model two strided copies a layer and lets heads be split
    over ranks.
    """

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__(
            config.hidden_size,
            [config.hidden_size] * 2,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=prefix,
        )
        self.head_dim = config.head_dim
        self.total_heads = config.num_attention_heads

    def weight_loader(self, param: nn.Parameter, loaded: torch.Tensor, half: int) -> None:
        """Places one published projection, [heads * head_dim, hidden]; half 0 is q_proj, 1 is k_proj."""
        place_heads(self, param.data, loaded, half)

    weight_loader_v2 = weight_loader  # the one vLLM takes for most parameters


def place_heads(layer: QueryKeyLinear, joined: torch.Tensor, published: torch.Tensor, half: int) -> None:
    """Copies rows of one published projection, or of its adapter's B, to where they belong on this rank.

    Args:
        layer: whose heads they are.
        joined: [2 * hidden / tp, columns]; the other projection's rows are left alone.
        published: [hidden, columns].
        half: 0 is q_proj, 1 is k_proj.
    """
    local_heads = layer.total_heads // layer.tp_size
    first_head = layer.tp_rank * local_heads
    target = joined.view(2, local_heads, layer.head_dim, -1)  # (query | key), head, row, column
    source = published.view(layer.total_heads, layer.head_dim, -1)
    for block in range(layer.total_heads):
        head, part = divmod(half * layer.total_heads + block, 2)
        if first_head <= head < first_head + local_heads:
            target[part, head - first_head].copy_(source[block])


class YuanAttention(nn.Module):
    """Attention whose queries and keys come from the filtered input, and whose values from the input itself."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        hidden, self.head_dim = config.hidden_size, config.head_dim
        heads = config.num_attention_heads // get_tensor_model_parallel_world_size()
        self.lf_gate = LocalizedFiltering(config, vllm_config, f"{prefix}.lf_gate")
        self.qk_proj = QueryKeyLinear(config, vllm_config, f"{prefix}.qk_proj")
        self.v_proj = ColumnParallelLinear(
            hidden, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.v_proj"
        )
        self.o_proj = RowParallelLinear(
            hidden, hidden, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = get_rope(
            self.head_dim, config.max_position_embeddings, is_neox_style=True, rope_parameters=config.rope_parameters
        )
        self.attn = Attention(
            heads,
            self.head_dim,
            self.head_dim**-0.5,
            cache_config=vllm_config.cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        v, _ = self.v_proj(y)  # [tokens, hidden / tp]
        qk, _ = self.qk_proj(self.lf_gate(y))
        q, k = qk.chunk(2, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.o_proj(self.attn(q, k, v))
        return output


class YuanMLP(nn.Module):
    """The gated MLP, with the activation on `up`: down(silu(up(x)) * gate(x))."""

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
    """One layer; the sum of what came before travels beside it as `residual`, which the norms add in."""

    def __init__(self, config: YuanConfig, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = YuanAttention(config, vllm_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = YuanMLP(config, vllm_config, f"{prefix}.mlp")

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = hidden
            hidden = self.input_layernorm(hidden)
        else:
            hidden, residual = self.input_layernorm(hidden, residual)
        hidden = self.self_attn(positions, hidden)
        hidden, residual = self.post_attention_layernorm(hidden, residual)
        return self.mlp(hidden), residual


@support_torch_compile
class YuanModel(nn.Module):
    """The decoder: embedding, layers, final norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: YuanConfig = vllm_config.model_config.hf_config
        ranks = get_pp_group()
        self.embed_tokens: nn.Module = PPMissingLayer()
        if ranks.is_first_rank or (config.tie_word_embeddings and ranks.is_last_rank):
            self.embed_tokens = VocabParallelEmbedding(
                config.vocab_size, config.hidden_size, prefix=f"{prefix}.embed_tokens"
            )
        self.start_layer, self.end_layer, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: YuanDecoderLayer(config, vllm_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.norm: nn.Module = PPMissingLayer()
        if ranks.is_last_rank:
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
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden, residual = layer(positions, hidden, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden, "residual": residual})
        normed, _ = self.norm(hidden, residual)
        return normed


class YuanForCausalLM(nn.Module, HasInnerState, IsHybrid, SupportsLoRA, SupportsPP):
    """What vLLM loads and runs: the decoder, its head, and the way their weights are found in a checkpoint."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qk_proj": ["q_proj", "k_proj"],
        "up_gate_proj": ["up_proj", "gate_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        if vllm_config.lora_config is not None:
            from yuan_grpc.model import lora  # which knows the layers above, and is needed by few

            lora.prepare()
        if current_platform.is_cpu():
            from yuan_grpc.model import seeds  # which only a CPU has what it imports for

            seeds.prepare()
        self.vllm_config = vllm_config
        self.config: YuanConfig = vllm_config.model_config.hf_config
        self.prefix = prefix
        self.model = YuanModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head: nn.Module = PPMissingLayer()
        if get_pp_group().is_last_rank:
            head = self._new_head()
            self.lm_head = head.tie_weights(self.model.embed_tokens) if self.config.tie_word_embeddings else head
        self.logits_processor = LogitsProcessor(self.config.vocab_size)
        tokenizer = cached_tokenizer_from_config(vllm_config.model_config)
        # The embedding has more rows than there are tokens; the rest is padding and must never be sampled.
        self.known_tokens = self.config.vocab_size if tokenizer is None else len(tokenizer)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def _new_head(self) -> ParallelLMHead:
        return ParallelLMHead(
            self.config.vocab_size,
            self.config.hidden_size,
            quant_config=self.vllm_config.quant_config,
            prefix=maybe_prefix(self.prefix, "lm_head"),
        )

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """[tokens] -> [tokens, hidden]."""
        embedded: torch.Tensor = self.model.embed_tokens(input_ids)
        return embedded

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        """[tokens] ids and positions -> [tokens, hidden] on the last pipeline rank."""
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """[rows, hidden] -> [rows, vocab_size], minus infinity on padding ids; None on ranks that do not sample."""
        logits: torch.Tensor | None = self.logits_processor(self.lm_head, hidden)
        if logits is not None:
            logits[:, self.known_tokens :] = float("-inf")
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Streams a published checkpoint into place.

        Returns:
            Names of all parameters, for every one is accounted for.

        Raises:
            ValueError: a weight is missing, unknown or of another shape; the message names it.
        """
        stored_head = load_checkpoint(weights, self.config, self._placement)
        if stored_head is not None and get_pp_group().is_last_rank:
            self._load_head(stored_head)
        return {name for name, _ in self.named_parameters()}

    def _placement(self, name: str) -> Placement | None:
        """Where a published weight goes on this rank; None for one that another pipeline rank holds."""
        path, _, kind = name.rpartition(".")
        owner, _, module = path.rpartition(".")
        part = None
        for merged, parts in self.packed_modules_mapping.items():
            if module in parts:
                module, part = merged, parts.index(module)
        try:
            target = self.get_submodule(f"{owner}.{module}" if owner else module)
        except AttributeError:  # of a layer that is a placeholder here
            return None
        if isinstance(target, PPMissingLayer):
            return None
        return Placement(getattr(target, kind), part)

    def _load_head(self, stored: torch.Tensor) -> None:
        """Loads a head stored beside a tied embedding; a second copy is kept only where the two really differ."""
        embedding = cast(nn.Parameter, self.model.embed_tokens.weight)
        with embedding.device:
            head = self._new_head()
        head.to(embedding.dtype)
        head.weight.weight_loader(head.weight, stored)
        if not torch.equal(head.weight, embedding):
            logger.warning(
                "config.json ties lm_head to the embedding, but the stored ones differ: using lm_head.weight"
            )
            self.lm_head = head

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shapes of LFA's states, for the engine to size its cache before any layer exists."""
        return state_shape(vllm_config, vllm_config.parallel_config.tensor_parallel_size)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        """Dtypes of LFA's states."""
        return state_dtype(vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        """How each of LFA's states is snapshot for prefix caching."""
        return state_copy()
