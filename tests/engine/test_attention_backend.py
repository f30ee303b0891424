"""Which steps go to FlashAttention and which to `decoding`. Neither computes here, so there need be no GPU."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of vLLM's own, while it is imported

SCALE = 0.125


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Who was called, and with what."""
    from vllm.v1.attention.backends import flash_attn

    import yuan_grpc.model

    made: list[tuple[str, Any]] = []

    def recorded(name: str) -> Any:
        return lambda *arguments: made.append((name, arguments))

    decoding = SimpleNamespace(MOST_KEPT=32, attend=recorded("attend"), keep=recorded("keep"))
    monkeypatch.setitem(sys.modules, "yuan_grpc.model.attention.decode_kernel", decoding)
    monkeypatch.setattr(yuan_grpc.model, "decoding", decoding, raising=False)
    impl, builder = flash_attn.FlashAttentionImpl, flash_attn.FlashAttentionMetadataBuilder
    monkeypatch.setattr(impl, "forward", lambda self, *arguments: made.append(("flash", arguments)))
    monkeypatch.setattr(impl, "do_kv_cache_update", lambda self, *arguments: made.append(("flash", arguments)))
    monkeypatch.setattr(builder, "build", lambda self, *arguments: made.append(("flash", arguments)))
    return made


@pytest.fixture
def layer(calls: list[tuple[str, Any]]) -> Any:
    """A layer's attention, without what it would be made with."""
    from yuan_grpc.model.attention.backend import YuanAttentionImpl

    made = object.__new__(YuanAttentionImpl)
    made.scale = SCALE
    return made


def test_a_step_of_one_token_of_each_sequence_is_decoded(layer: Any, calls: list[tuple[str, Any]]) -> None:
    q, key, value, cache, out = (torch.zeros(3, 2, 16) for _ in range(5))
    step = SimpleNamespace(max_query_len=1, block_table=torch.zeros(3, 4), seq_lens=torch.ones(3))
    assert layer.forward(None, q, key, value, cache, step, out) is out
    ((name, arguments),) = calls
    assert name == "attend"
    for given, wanted in zip(arguments, (q, cache, step.block_table, step.seq_lens, out, SCALE), strict=True):
        assert given is wanted


@pytest.mark.parametrize("step", [None, SimpleNamespace(max_query_len=2)], ids=["profiling", "a prompt"])
def test_all_other_steps_stay_with_flash_attention(layer: Any, calls: list[tuple[str, Any]], step: Any) -> None:
    tensors = [torch.zeros(3, 2, 16) for _ in range(4)]
    layer.forward(None, *tensors, step, tensors[0])
    ((name, arguments),) = calls
    assert name == "flash"
    assert len(arguments) == 9
    assert arguments[5] is step


@pytest.mark.parametrize(("tokens", "keeper"), [(1, "keep"), (32, "keep"), (33, "flash")])
def test_few_new_keys_and_values_are_kept_by_a_kernel_of_ours(
    layer: Any, calls: list[tuple[str, Any]], tokens: int, keeper: str
) -> None:
    tensors = [torch.zeros(tokens, 2, 16) for _ in range(3)]
    layer.do_kv_cache_update(None, *tensors, torch.zeros(tokens))
    assert [name for name, _ in calls] == [keeper]


@pytest.mark.parametrize(("longest", "fast"), [(1, True), (2, False)])
def test_no_schedule_is_made_for_a_step_that_does_not_use_it(
    calls: list[tuple[str, Any]], longest: int, fast: bool
) -> None:
    from yuan_grpc.model.attention.backend import YuanAttentionMetadataBuilder

    common = SimpleNamespace(max_query_len=longest)
    object.__new__(YuanAttentionMetadataBuilder).build(0, common)
    assert calls == [("flash", (0, common, fast))]


def test_vllm_is_told_of_all_three(calls: list[tuple[str, Any]]) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from yuan_grpc.model.attention import backend

    attention = backend.YuanAttentionBackend
    assert attention.get_impl_cls() is backend.YuanAttentionImpl
    builder = attention.get_builder_cls()
    assert builder is backend.YuanAttentionMetadataBuilder
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert attention.get_name() == "FLASH_ATTN"
