"""LoRA adapters in the published layout: how they are checked at load, and how one meets the joined q_proj and k_proj.

An adapter adds B·A to a weight. vLLM wraps every linear layer by itself, and PEFT's convolutions are products here too;
what it cannot know is Yuan's order of query and key rows, nor which modules and shapes a Yuan model has.
"""

import torch
from vllm.config import VllmConfig
from vllm.config.lora import LoRAConfig
from vllm.logger import init_logger
from vllm.lora import utils
from vllm.lora.layers import ColumnParallelLinearWithLoRA
from vllm.lora.lora_model import LoRAModel
from vllm.lora.lora_weights import LoRALayerWeights
from vllm.lora.request import LoRARequest
from vllm.lora.worker_manager import LRUCacheWorkerLoRAManager
from vllm.platforms import current_platform
from vllm.v1.worker import lora_model_runner_mixin

from yuan_grpc.model.config import YuanConfig
from yuan_grpc.model.layout import published_shapes
from yuan_grpc.model.yuan import QueryKeyLinear, place_heads

logger = init_logger("vllm.yuan_grpc.model")


def prepare() -> None:
    """Has vLLM use what is below, in this process, whose one model is a Yuan. Safe to call twice."""
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = YuanAdapters
    if QueryKeyLinearWithLoRA not in utils._all_lora_classes:  # first match wins, and vLLM's own would match
        utils._all_lora_classes = (QueryKeyLinearWithLoRA, *utils._all_lora_classes)


class QueryKeyLinearWithLoRA(ColumnParallelLinearWithLoRA):
    """The joined projection with q_proj's and k_proj's adapters as one of twice the rank.

    A holds q_proj's rows above k_proj's. B has the joined weight's rows, in its order and on the same rank, and in
    each row zeros for the projection that the row does not come from. That holds for any split of heads over ranks,
    where two adapters side by side would have to know which of a rank's rows are whose.
    """

    def create_lora_weights(self, max_loras: int, lora_config: LoRAConfig, model_config: object = None) -> None:
        """Makes room for `max_loras` adapters of the largest rank."""
        self.lora_config = lora_config
        self.max_rank = lora_config.max_lora_rank
        options = {"dtype": lora_config.lora_dtype, "device": self.device}
        self.lora_a_stacked = (torch.zeros(max_loras, 1, 2 * self.max_rank, self.input_size, **options),)
        self.lora_b_stacked = (torch.zeros(max_loras, 1, self.output_size, 2 * self.max_rank, **options),)
        self.output_slices = (self.output_size,)

    def set_lora(self, index: int, lora_a: list[torch.Tensor | None], lora_b: list[torch.Tensor | None]) -> None:
        """Places one adapter: A [rank, hidden] and B [hidden, rank] of q_proj and of k_proj, None where it has none."""
        self.reset_lora(index)
        if len(lora_a) != 2:  # of vLLM's warm-up: all zeros, and shaped as if for a single projection
            return
        for half, (a, b) in enumerate(zip(lora_a, lora_b, strict=True)):
            if a is not None and b is not None:
                ranks = slice(half * self.max_rank, half * self.max_rank + len(a))
                self.lora_a_stacked[0][index, 0, ranks].copy_(a)
                place_heads(self.base_layer, self.lora_b_stacked[0][index, 0, :, ranks], b, half)

    @classmethod
    def can_replace_layer(cls, source_layer: torch.nn.Module, **_: object) -> bool:
        """Of all layers, the joined projection."""
        return isinstance(source_layer, QueryKeyLinear)


class YuanAdapters(LRUCacheWorkerLoRAManager):
    """A worker's adapters, each checked before it takes a place.

    vLLM ignores what names a layer that is not there and copies what is too small into a corner; and what fails later
    than here stays behind, half loaded, under its id.
    """

    def create_lora_manager(self, model: torch.nn.Module, vllm_config: VllmConfig) -> torch.nn.Module:
        """Wraps the model's layers."""
        self.alone = vllm_config.parallel_config.world_size == 1
        wrapped = super().create_lora_manager(model, vllm_config)
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
    """Checks an adapter's weights by their modules' names, and flattens convolutions as `Placement` does.

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
        adapter.lora_a = _fit(adapter.lora_a, f"{module}.lora_A.weight", (adapter.rank, *inputs))
        adapter.lora_b = _fit(adapter.lora_b, f"{module}.lora_B.weight", (outputs, adapter.rank, *kernel))


def _fit(weight: torch.Tensor | None, name: str, shape: tuple[int, ...]) -> torch.Tensor:
    if weight is None:
        raise ValueError(f"the adapter lacks {name}")
    if weight.shape != shape:
        raise ValueError(f"{name} must be of shape {list(shape)}, not {list(weight.shape)}")
    return weight.flatten(1)
