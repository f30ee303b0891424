"""LoRA adapters in the published layout: validation at load, and layers for the joined projections.

An adapter adds B·A to a weight. vLLM wraps ordinary linear layers itself. The layers below add Yuan's order of query
and key rows, and PEFT's adapters of convolutions, which are matrix products here. `patches/lora_classes.py` makes vLLM
use them.
"""

import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora.layers import ColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager

from yuan_grpc.model.checkpoint.layout import published_shapes
from yuan_grpc.model.checkpoint.loader import split_taps
from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.linear import InputLinear, QueryKeyLinear, SecondConvolution, place_heads

logger = init_logger("vllm.yuan_grpc.model")

Weights = torch.Tensor | list[torch.Tensor | None]
"""Weights of one published module, or of each module that a joined layer contains."""


class JoinedLinearWithLoRA(BaseLinearLayerWithLoRA):
    """A linear layer that joins several published modules.

    Their adapters are combined into one, whose rank is the sum of their ranks.

    A holds the rows of all parts, one part after the other. B has the rows of the joined weight, in the same order and
    on the same rank. Each row of B is zero in the columns of the parts that it does not belong to.
    """

    layer_class: type[torch.nn.Module]
    """Class of the layers to wrap."""
    num_parts: int
    """Number of parts that the layer joins; a convolution is two."""

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: object = None) -> None:
        """Allocate memory for `max_loras` adapters of the maximum rank."""
        self.lora_config = lora_config
        self.max_rank = lora_config.max_lora_rank
        options = {"dtype": lora_config.lora_dtype, "device": self.device}
        rank = self.num_parts * self.max_rank
        self.lora_a_stacked = (torch.zeros(max_loras, 1, rank, self.input_size, **options),)
        self.lora_b_stacked = (torch.zeros(max_loras, 1, self.output_size, rank, **options),)
        self.output_slices = (self.output_size,)

    def set_lora(self, index: int, lora_a: Weights, lora_b: Weights) -> None:
        """Copy an adapter into slot `index`.

        Args:
            index: The slot.
            lora_a: [rank, in] for each published module, or None where the adapter does not adapt it. [2 * rank, in]
                for a convolution: its contribution to the next token, then to the token itself.
            lora_b: [out, rank] for each published module, or None.
        """
        self.reset_lora(index)
        modules_a, modules_b = (list(given) if isinstance(given, list) else [given] for given in (lora_a, lora_b))
        sources = self.sources()
        if len(modules_a) <= sources[-1][0]:  # vLLM's warm-up: zeros in the shape of a single module
            return
        for part, (module, tap) in enumerate(sources):
            a, b = modules_a[module], modules_b[module]
            if a is not None and b is not None and a.any():  # the warm-up passes zeros that have no part's shape
                rank = b.shape[1]
                columns = slice(part * self.max_rank, part * self.max_rank + rank)
                self.lora_a_stacked[0][index, 0, columns].copy_(self.slice_lora_a(a[tap * rank : (tap + 1) * rank]))
                self.copy_rows(self.lora_b_stacked[0][index, 0, :, columns], b, part)

    def sources(self) -> list[tuple[int, int]]:
        """Return for each part the index of its published module and its tap, which is 0 or 1 for convolutions."""
        raise NotImplementedError

    def copy_rows(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        """Copy this rank's share of a part's rows, [out, rank], to their position in the joined B."""
        raise NotImplementedError

    @classmethod
    def can_replace_layer(cls, source_layer: torch.nn.Module, **_: object) -> bool:
        """Return whether this class wraps the layer."""
        return isinstance(source_layer, cls.layer_class)


class QueryKeyLinearWithLoRA(JoinedLinearWithLoRA, ColumnParallelLinearWithLoRA):
    """q_proj and k_proj, whose rows are interleaved by head."""

    layer_class, num_parts = QueryKeyLinear, 2

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (1, 0)]

    def slice_lora_a(self, lora_a: torch.Tensor) -> torch.Tensor:
        return lora_a

    def copy_rows(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        place_heads(self.base_layer, joined, published, part)


class InputLinearWithLoRA(JoinedLinearWithLoRA, ColumnParallelLinearWithLoRA):
    """conv1 for the next token, conv1 for the token itself, and v_proj."""

    layer_class, num_parts = InputLinear, 3

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 1), (1, 0)]

    def slice_lora_a(self, lora_a: torch.Tensor) -> torch.Tensor:
        return lora_a

    def copy_rows(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        sizes = [size // self.tp_size for size in self.base_layer.output_sizes]
        share = slice(self.tp_rank * sizes[part], (self.tp_rank + 1) * sizes[part])
        torch.split(joined, sizes)[part].copy_(published[share])


class SecondConvolutionWithLoRA(JoinedLinearWithLoRA, RowParallelLinearWithLoRA):
    """conv2 for the next token and for the token itself: all outputs on every rank, from a share of the inputs."""

    layer_class, num_parts = SecondConvolution, 2

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 1)]

    def copy_rows(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        joined.chunk(self.num_parts)[part].copy_(published)


LORA_LAYERS = (QueryKeyLinearWithLoRA, InputLinearWithLoRA, SecondConvolutionWithLoRA)


class YuanAdapterManager(LRUCacheWorkerLoRAManager):
    """A worker's adapters, each validated before it is added.

    vLLM ignores weights of unknown layers and copies a weight that is too small into a corner of its slot. An adapter
    that fails after it was added stays registered, half loaded, under its id.
    """

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Wrap the model's layers."""
        self.is_single_worker = vllm_config.parallel_config.world_size == 1
        wrapped = super().create_lora_manager(model, vllm_config)
        # vLLM compares the last component of a module's name only, which is `conv1` for `lf_gate.conv1`.
        self._adapter_manager.supported_lora_modules.append("conv1")
        return wrapped

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Load an adapter unless it is loaded already.

        Raises:
            Exception: The adapter cannot be loaded. One of several workers logs the error and returns False instead:
                when a worker raises, vLLM leaves the responses of the others unread and takes each for the response to
                its next call.
        """
        try:
            return super().add_adapter(lora_request)
        except Exception:
            if self.is_single_worker:
                raise
            logger.exception("Cannot load the adapter %s", lora_request.lora_name)
            return False

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        adapter = super()._load_adapter(lora_request)
        normalize_adapter(adapter.loras, self._adapter_manager.model.config)
        return adapter


def normalize_adapter(adapters: dict[str, LoRALayerWeights], config: YuanConfig) -> None:
    """Validate an adapter's weights, by module name, and reshape those of convolutions to matrices.

    Raises:
        ValueError: There are no weights, or one is missing, unknown, of another shape or not finite; the message
            names it.
    """
    if not adapters:
        raise ValueError("the adapter has no weights")
    shapes = published_shapes(config)
    for module, adapter in adapters.items():
        if (shape := shapes.get(f"{module}.weight")) is None:
            raise ValueError(f"the adapter has a module that the model does not have: {module}")
        outputs, *inputs = shape
        kernel = [1] * len(inputs[1:])  # of a convolution's B, which does not mix tokens
        a = _checked(adapter.lora_a, f"{module}.lora_A.weight", (adapter.rank, *inputs))
        b = _checked(adapter.lora_b, f"{module}.lora_B.weight", (outputs, adapter.rank, *kernel))
        if not torch.isfinite(b * adapter.scaling).all():  # vLLM multiplies them later
            raise ValueError(f"`lora_alpha` must keep {module}.lora_B.weight finite, not scale it by {adapter.scaling}")
        adapter.lora_a = torch.cat(split_taps(a)) if kernel else a
        adapter.lora_b = b.flatten(1)


def _checked(weight: torch.Tensor | None, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if weight is None:
        raise ValueError(f"the adapter lacks {name}")
    if weight.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, not {list(weight.shape)}")
    if not torch.isfinite(weight).all():
        raise ValueError(f"{name} must have finite values only")
    return weight
