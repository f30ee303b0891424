"""The choice between FlashAttention and `decode_kernel` for each step. Both are fakes, so no GPU is needed."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns when it is imported

SCALE = 0.125


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Names and arguments of the calls to both implementations."""
    from vllm.v1.attention.backends import flash_attn

    from yuan_grpc.model import attention

    recorded: list[tuple[str, Any]] = []

    def record(name: str) -> Any:
        return lambda *arguments: recorded.append((name, arguments))

    fake = SimpleNamespace(MAX_WRITE_TOKENS=32, decode_attention=record("decode"), write_kv_cache=record("write"))
    monkeypatch.setitem(sys.modules, "yuan_grpc.model.attention.decode_kernel", fake)
    monkeypatch.setattr(attention, "decode_kernel", fake, raising=False)
    impl, builder = flash_attn.FlashAttentionImpl, flash_attn.FlashAttentionMetadataBuilder
    monkeypatch.setattr(impl, "forward", lambda self, *arguments: recorded.append(("flash", arguments)))
    monkeypatch.setattr(impl, "do_kv_cache_update", lambda self, *arguments: recorded.append(("flash", arguments)))
    monkeypatch.setattr(builder, "build", lambda self, *arguments: recorded.append(("flash", arguments)))
    return recorded


@pytest.fixture
def layer(calls: list[tuple[str, Any]]) -> Any:
    """Attention for one layer, created without its constructor."""
    from yuan_grpc.model.attention.backend import YuanAttentionImpl

    layer = object.__new__(YuanAttentionImpl)
    layer.scale = SCALE
    return layer


def test_a_step_with_one_token_per_sequence_uses_the_decode_kernel(layer: Any, calls: list[tuple[str, Any]]) -> None:
    q, key, value, cache, out = (torch.zeros(3, 2, 16) for _ in range(5))
    step = SimpleNamespace(max_query_len=1, block_table=torch.zeros(3, 4), seq_lens=torch.ones(3))
    assert layer.forward(None, q, key, value, cache, step, out) is out
    ((name, arguments),) = calls
    assert name == "decode"
    for actual, expected in zip(arguments, (q, cache, step.block_table, step.seq_lens, out, SCALE), strict=True):
        assert actual is expected


@pytest.mark.parametrize("step", [None, SimpleNamespace(max_query_len=2)], ids=["profiling", "a prompt"])
def test_all_other_steps_use_flash_attention(layer: Any, calls: list[tuple[str, Any]], step: Any) -> None:
    tensors = [torch.zeros(3, 2, 16) for _ in range(4)]
    layer.forward(None, *tensors, step, tensors[0])
    ((name, arguments),) = calls
    assert name == "flash"
    assert len(arguments) == 9
    assert arguments[5] is step


@pytest.mark.parametrize(("tokens", "writer"), [(1, "write"), (32, "write"), (33, "flash")])
def test_keys_and_values_of_few_tokens_are_written_by_our_kernel(
    layer: Any, calls: list[tuple[str, Any]], tokens: int, writer: str
) -> None:
    tensors = [torch.zeros(tokens, 2, 16) for _ in range(3)]
    layer.do_kv_cache_update(None, *tensors, torch.zeros(tokens))
    assert [name for name, _ in calls] == [writer]


@pytest.mark.parametrize(("max_query_len", "fast_build"), [(1, True), (2, False)])
def test_the_schedule_is_built_only_for_steps_that_use_it(
    calls: list[tuple[str, Any]], max_query_len: int, fast_build: bool
) -> None:
    from yuan_grpc.model.attention.backend import YuanAttentionMetadataBuilder

    common = SimpleNamespace(max_query_len=max_query_len)
    object.__new__(YuanAttentionMetadataBuilder).build(0, common)
    assert calls == [("flash", (0, common, fast_build))]


def test_the_backend_returns_its_classes(calls: list[tuple[str, Any]]) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from yuan_grpc.model.attention import backend

    backend_class = backend.YuanAttentionBackend
    assert backend_class.get_impl_cls() is backend.YuanAttentionImpl
    builder = backend_class.get_builder_cls()
    assert builder is backend.YuanAttentionMetadataBuilder
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.UNIFORM_BATCH
    assert backend_class.get_name() == "FLASH_ATTN"
