"""LoRA adapters in the published layout: how they are checked at load, and how one meets the joined q_proj and k_proj.

An adapter adds B·A to a weight. vLLM wraps every linear layer by itself, and PEFT's convolutions are products here too;
what it cannot know is Yuan's order of query and key rows, nor which modules and shapes a Yuan model has.
"""

import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora import utils
from vllm.lora.layers import ColumnParallelLinearWithLoRA, RowParallelLinearWithLoRA
from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from yuan_grpc.model.checkpoint.layout import published_shapes
from yuan_grpc.model.checkpoint.loader import taps
from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.linear import InputLinear, QueryKeyLinear, SecondConvolution, place_heads

logger = init_logger("vllm.yuan_grpc.model")

Weights = torch.Tensor | list[torch.Tensor | None]
"""Of one published module, or of each of a joined layer's."""


def prepare() -> None:
    """Has vLLM use what is below, in this process, whose one model is a Yuan. Safe to call twice."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = YuanAdapters
    ours = (QueryKeyLinearWithLoRA, InputLinearWithLoRA, SecondConvolutionWithLoRA)
    if ours[0] not in utils._all_lora_classes:  # first match wins, and vLLM's own would match
        utils._all_lora_classes = (*ours, *utils._all_lora_classes)


class JoinedLinearWithLoRA(BaseLinearLayerWithLoRA):
    """A product that several published ones are parts of, with their adapters as one of all their ranks.

    A holds the parts' rows, one part above the other. B has the joined weight's rows, in its order and on the same
    rank, and in each row zeros for the parts that the row does not come from.
    """

    joins: type[torch.nn.Module]
    """The layer it wraps."""
    parts: int
    """How many the layer is joined of; a convolution is two."""

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: object = None) -> None:
        """Makes room for `max_loras` adapters of the largest rank."""
        self.lora_config = lora_config
        self.max_rank = lora_config.max_lora_rank
        options = {"dtype": lora_config.lora_dtype, "device": self.device}
        rank = self.parts * self.max_rank
        self.lora_a_stacked = (torch.zeros(max_loras, 1, rank, self.input_size, **options),)
        self.lora_b_stacked = (torch.zeros(max_loras, 1, self.output_size, rank, **options),)
        self.output_slices = (self.output_size,)

    def set_lora(self, index: int, lora_a: Weights, lora_b: Weights) -> None:
        """Places one adapter: A [rank, in] and B [out, rank] of each published module, None where it has none.

        A convolution's A is [2 * rank, in]: what it adds for the token after, then for the token itself.
        """
        self.reset_lora(index)
        each_a, each_b = (list(given) if isinstance(given, list) else [given] for given in (lora_a, lora_b))
        sources = self.sources()
        if len(each_a) <= sources[-1][0]:  # of vLLM's warm-up: all zeros, and shaped as if for one module
            return
        for part, (module, tap) in enumerate(sources):
            a, b = each_a[module], each_b[module]
            if a is not None and b is not None and a.any():  # the warm-up's are zeros, of no part's shape
                rank = b.shape[1]
                ranks = slice(part * self.max_rank, part * self.max_rank + rank)
                self.lora_a_stacked[0][index, 0, ranks].copy_(self.slice_lora_a(a[tap * rank : (tap + 1) * rank]))
                self.place(self.lora_b_stacked[0][index, 0, :, ranks], b, part)

    def sources(self) -> list[tuple[int, int]]:
        """For each part, which of the published modules it is of, and which of a convolution's two (or 0)."""
        raise NotImplementedError

    def place(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        """Copies a part's rows of [out, rank] to where this rank's share of them belongs."""
        raise NotImplementedError

    @classmethod
    def can_replace_layer(cls, source_layer: torch.nn.Module, **_: object) -> bool:
        """Of all layers, its own."""
        return isinstance(source_layer, cls.joins)


class QueryKeyLinearWithLoRA(JoinedLinearWithLoRA, ColumnParallelLinearWithLoRA):
    """q_proj and k_proj, whose rows are each head's query or key."""

    joins, parts = QueryKeyLinear, 2

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (1, 0)]

    def slice_lora_a(self, lora_a: torch.Tensor) -> torch.Tensor:
        return lora_a

    def place(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        place_heads(self.base_layer, joined, published, part)


class InputLinearWithLoRA(JoinedLinearWithLoRA, ColumnParallelLinearWithLoRA):
    """conv1 for the token after and for the token, and v_proj."""

    joins, parts = InputLinear, 3

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 1), (1, 0)]

    def slice_lora_a(self, lora_a: torch.Tensor) -> torch.Tensor:
        return lora_a

    def place(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        sizes = [size // self.tp_size for size in self.base_layer.output_sizes]
        share = slice(self.tp_rank * sizes[part], (self.tp_rank + 1) * sizes[part])
        torch.split(joined, sizes)[part].copy_(published[share])


class SecondConvolutionWithLoRA(JoinedLinearWithLoRA, RowParallelLinearWithLoRA):
    """conv2 for the token after and for the token: all outputs on every rank, of some of the inputs."""

    joins, parts = SecondConvolution, 2

    def sources(self) -> list[tuple[int, int]]:
        return [(0, 0), (0, 1)]

    def place(self, joined: torch.Tensor, published: torch.Tensor, part: int) -> None:
        joined.chunk(self.parts)[part].copy_(published)


class YuanAdapters(LRUCacheWorkerLoRAManager):
    """A worker's adapters, each checked before it takes a place.

    vLLM ignores what names a layer that is not there and copies what is too small into a corner; and what fails later
    than here stays behind, half loaded, under its id.
    """

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Wraps the model's layers."""
        self.alone = vllm_config.parallel_config.world_size == 1
        wrapped = super().create_lora_manager(model, vllm_config)
        # vLLM looks at the last part of a name only, and takes `lf_gate.conv1` for one.
        self._adapter_manager.supported_lora_modules.append("conv1")
        if current_platform.is_cpu():
            # vLLM's CPU kernels take a token's "no adapter", -1, for the last place: so that one stays empty.
            for layer in self._adapter_manager.modules.values():
                layer.lora_b_stacked = tuple(torch.cat([b, torch.zeros_like(b[:1])]) for b in layer.lora_b_stacked)
        return wrapped

    def add_adapter(self, lora_request: LoRARequest) -> bool:
        """Loads an adapter, unless it is there already.

        Raises:
            Exception: it cannot be loaded. One worker of several logs that and returns False: when one raises, vLLM
                leaves the others' answers unread and takes each for the answer to the next call.
        """
        try:
            return super().add_adapter(lora_request)
        except Exception:
            if self.alone:
                raise
            logger.exception("The adapter %s cannot be loaded", lora_request.lora_name)
            return False

    def _load_adapter(self, lora_request: LoRARequest) -> LoRAModel:
        adapter = super()._load_adapter(lora_request)
        fit(adapter.loras, self._adapter_manager.model.config)
        return adapter


def fit(adapters: dict[str, LoRALayerWeights], config: YuanConfig) -> None:
    """Checks an adapter's weights by their modules' names, and makes matrices of convolutions.

    Raises:
        ValueError: there is none, or one is missing, unknown or of another shape; the message names it.
    """
    if not adapters:
        raise ValueError("the adapter has no weights")
    shapes = published_shapes(config)
    for module, adapter in adapters.items():
        if (shape := shapes.get(f"{module}.weight")) is None:
            raise ValueError(f"the adapter has a module that this model does not: {module}")
        outputs, *inputs = shape
        kernel = [1] * len(inputs[1:])  # of a convolution's B, which mixes no tokens
        a = _checked(adapter.lora_a, f"{module}.lora_A.weight", (adapter.rank, *inputs))
        b = _checked(adapter.lora_b, f"{module}.lora_B.weight", (outputs, adapter.rank, *kernel))
        adapter.lora_a = torch.cat(taps(a)) if kernel else a
        adapter.lora_b = b.flatten(1)


def _checked(weight: torch.Tensor | None, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if weight is None:
        raise ValueError(f"the adapter lacks {name}")
    if weight.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, not {list(weight.shape)}")
    return weight
