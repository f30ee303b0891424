"""A vLLM worker that spreads the tokens of a Yuan2.0-M32 with dummy weights over all experts.

    yuan-grpc serve --load-format dummy --worker-cls benchmarks.spread_experts.SpreadingWorker ...

Dummy weights are so small that the router gives all experts the same score, and each token goes to the same two. A step
then reads two experts of a layer instead of nearly all of them, and looks faster than it is.
"""

from vllm.v1.worker.gpu_worker import Worker

from yuan_grpc.model.moe.router import AttentionRouter

SCALE = 1e5
"""Factor of the router's dummy weights, of up to 0.001: queries, keys and values are then of the order of 1."""


class SpreadingWorker(Worker):  # type: ignore[misc]
    """A worker that scales the weights of the routers once they are loaded."""

    def load_model(self, *, load_dummy_weights: bool = False) -> None:
        """Load the model and scale its routers."""
        super().load_model(load_dummy_weights=load_dummy_weights)
        for module in self.get_model().modules():
            if isinstance(module, AttentionRouter):
                module.weight.mul_(SCALE)
