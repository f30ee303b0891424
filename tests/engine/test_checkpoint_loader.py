"""Tests of loading q_proj and k_proj into a rank's share of the joined weight."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM's warnings while it is imported

HEADS, HEAD_DIM, HIDDEN = 6, 2, 12


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_rank_gets_the_queries_and_keys_of_its_heads(ranks: int) -> None:
    from yuan_grpc.model.linear import QueryKeyLinear

    q_proj, k_proj = torch.randn(2, HIDDEN, HIDDEN).unbind()
    by_head = torch.cat([q_proj, k_proj]).view(HEADS, 2, HEAD_DIM, HIDDEN)  # the published view: head, (query | key)
    for rank in range(ranks):
        layer: Any = SimpleNamespace(total_heads=HEADS, head_dim=HEAD_DIM, tp_size=ranks, tp_rank=rank)
        param = torch.nn.Parameter(torch.full((2 * HIDDEN // ranks, HIDDEN), torch.nan))
        for projection, loaded in enumerate((q_proj, k_proj)):
            QueryKeyLinear.weight_loader(layer, param, loaded, projection)
        expected = by_head[rank * HEADS // ranks : (rank + 1) * HEADS // ranks]
        queries, keys = param.data.view(2, -1, HEAD_DIM, HIDDEN)
        assert torch.equal(queries, expected[:, 0])
        assert torch.equal(keys, expected[:, 1])


@pytest.mark.parametrize("rank", [0, 1])
def test_a_projection_without_a_head_of_the_rank_leaves_a_quantized_layer_as_it_is(rank: int) -> None:
    """Fp8 stores the weights in another order once a rank has all of its rows, which one projection can hold."""
    from yuan_grpc.model.linear import QueryKeyLinear

    layer: Any = SimpleNamespace(total_heads=4, head_dim=2, tp_size=2, tp_rank=rank)
    quantized = torch.zeros(8, 3).t()  # columns, rows
    param: Any = SimpleNamespace(data=quantized)
    QueryKeyLinear.weight_loader(layer, param, torch.ones(8, 3), projection=1 - rank)
    assert not quantized.any()


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_every_rank_gets_the_quantized_rows_and_scales_of_its_heads(ranks: int) -> None:
    from yuan_grpc.model.linear import PublishedQueryKeyLinear

    published = torch.arange(2 * HIDDEN).view(2, HIDDEN)  # a scale for each row
    scales: dict[int, int] = {}
    for rank in range(ranks):
        layer: Any = SimpleNamespace(total_rows=HIDDEN, tp_size=ranks, tp_rank=rank)
        param = torch.nn.Parameter(torch.full((1, 2 * HIDDEN // ranks), -1), requires_grad=False)
        vars(param)["output_dim"] = 1
        scale = torch.nn.Parameter(torch.zeros(2), requires_grad=False)
        for projection in (0, 1):
            load = PublishedQueryKeyLinear._load
            load(layer, param, published[projection][None], projection, lambda *_: None)
            load(
                layer,
                scale,
                torch.tensor(0),
                projection,
                lambda _, __, half, own=projection: scales.update({half: own}),
            )
        rows = 2 * HIDDEN // ranks
        assert param.flatten().tolist() == published.flatten()[rank * rows : (rank + 1) * rows].tolist()
        assert [scales[half] for half in (0, 1)] == [(2 * rank + half) // ranks for half in (0, 1)]


@pytest.mark.parametrize(("seconds", "lines"), [(0, 17), (3600, 0)])
def test_progress_is_logged_every_few_seconds(monkeypatch: pytest.MonkeyPatch, seconds: int, lines: int) -> None:
    from yuan_grpc.model.checkpoint import progress
    from yuan_grpc.model.checkpoint.layout import published_shapes
    from yuan_grpc.model.config import YuanConfig

    sizes = YuanConfig(vocab_size=8, hidden_size=4, intermediate_size=4, num_hidden_layers=1, num_attention_heads=2)
    weights = [(name, torch.zeros(shape)) for name, shape in published_shapes(sizes).items()]
    shares: list[int] = []
    monkeypatch.setattr(progress.logger, "info", lambda message, share: shares.append(share))
    monkeypatch.setattr(progress, "INTERVAL_SECONDS", seconds)
    assert list(progress.report_progress(weights, sizes)) == weights
    assert len(shares) == lines
    assert shares == sorted(shares)
    assert shares[-1:] in ([], [100])
