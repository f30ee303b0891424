"""The choice between FlashAttention and `decode_kernel` for each sequence. Both are fakes, so no GPU is needed."""

import sys
from dataclasses import dataclass
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
        return lambda *arguments, **options: recorded.append((name, arguments + tuple(options.values())))

    fake = SimpleNamespace(MAX_WRITE_TOKENS=32, decode_attention=record("decode"), write_kv_cache=record("write"))
    monkeypatch.setitem(sys.modules, "yuan_grpc.model.attention.decode_kernel", fake)
    monkeypatch.setattr(attention, "decode_kernel", fake, raising=False)
    impl, builder = flash_attn.FlashAttentionImpl, flash_attn.FlashAttentionMetadataBuilder
    monkeypatch.setattr(impl, "forward", lambda self, *arguments: recorded.append(("flash", arguments)))
    monkeypatch.setattr(impl, "do_kv_cache_update", lambda self, *arguments: recorded.append(("flash", arguments)))
    monkeypatch.setattr(
        builder,
        "build",
        lambda self, *arguments, **options: recorded.append(("flash", (*arguments, *options.values()))),
    )
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
    for actual, expected in zip(arguments, (q, cache, step.block_table, step.seq_lens, out, SCALE, None), strict=True):
        assert actual is expected


def test_the_memory_profiling_run_uses_flash_attention_only(layer: Any, calls: list[tuple[str, Any]]) -> None:
    tensors = [torch.zeros(3, 2, 16) for _ in range(4)]
    assert layer.forward(None, *tensors, None, tensors[0]) is tensors[0]
    ((name, arguments),) = calls
    assert name == "flash"
    assert len(arguments) == 9
    assert arguments[5] is None


def test_a_step_with_prompts_uses_both(layer: Any, calls: list[tuple[str, Any]]) -> None:
    q, key, value, cache, out = (torch.zeros(3, 2, 16) for _ in range(5))
    starts = torch.tensor([2, 2, 2, 5], dtype=torch.int32)
    step = SimpleNamespace(max_query_len=3, query_start_loc=starts, block_table=torch.zeros(3, 4), seq_lens=None)
    assert layer.forward(None, q, key, value, cache, step, out) is out
    (prompts, flash_arguments), (decoding, arguments) = calls
    assert (prompts, decoding) == ("flash", "decode")
    assert flash_arguments[5] is step
    assert arguments[-1].tolist() == [2]
    assert arguments[-1].data_ptr() == starts.data_ptr()  # graphs read the number of decoding sequences there


@pytest.mark.parametrize(("tokens", "writer"), [(1, "write"), (32, "write"), (33, "flash")])
def test_keys_and_values_of_few_tokens_are_written_by_our_kernel(
    layer: Any, calls: list[tuple[str, Any]], tokens: int, writer: str
) -> None:
    tensors = [torch.zeros(tokens, 2, 16) for _ in range(3)]
    layer.do_kv_cache_update(None, *tensors, torch.zeros(tokens))
    assert [name for name, _ in calls] == [writer]


@dataclass
class Common:
    """The fields of `CommonAttentionMetadata` that the builder uses."""

    query_start_loc: torch.Tensor
    query_start_loc_cpu: torch.Tensor
    seq_lens_cpu_upper_bound: torch.Tensor
    max_query_len: int
    num_reqs: int

    @staticmethod
    def of(tokens: list[int], lengths: list[int] | None = None) -> "Common":
        """Return the metadata of a step with these numbers of tokens, and lengths of the sequences (100 each)."""
        starts = torch.tensor([0, *torch.tensor(tokens).cumsum(0)], dtype=torch.int32)
        bound = torch.tensor(lengths or [100] * len(tokens), dtype=torch.int32)
        return Common(starts.clone(), starts, bound, max(tokens), len(tokens))


@pytest.fixture
def builder(calls: list[tuple[str, Any]]) -> Any:
    """Metadata builder, created without its constructor."""
    from yuan_grpc.model.attention.backend import YuanAttentionMetadataBuilder

    builder = object.__new__(YuanAttentionMetadataBuilder)
    builder.prompt_starts = torch.full((65,), -1, dtype=torch.int32)
    builder.num_heads_q = 32
    return builder


def test_a_step_that_only_decodes_has_no_schedule(builder: Any, calls: list[tuple[str, Any]]) -> None:
    common = Common.of([1, 1, 1])
    builder.build(0, common)
    ((_, (prefix, given, fast_build)),) = calls
    assert (prefix, given, fast_build) == (0, common, True)


@pytest.mark.parametrize(
    ("lengths", "decoding"),
    [([100] * 8, 8), ([100] * 7 + [101], 0), ([1000] + [100] * 40, 0), ([400] + [100] * 40, 41)],
    ids=["equal", "one is longer", "one is much longer", "enough others"],
)
def test_flash_attention_computes_all_if_one_of_few_decoding_sequences_is_long(
    builder: Any, calls: list[tuple[str, Any]], lengths: list[int], decoding: int
) -> None:
    builder.build(0, Common.of([1] * len(lengths) + [3], [*lengths, 5000]))
    ((_, (_, given, _)),) = calls
    assert int(given.query_start_loc[0]) == decoding


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1] * 8 + [3, 7], [8] * 9 + [11, 18]),
        ([1] * 9 + [2] + [0] * 3, [9] * 10 + [11] * 4),
        ([1] * 7 + [3], [*range(8), 10]),
        ([4], [0, 4]),
        ([3] + [1] * 20, [0, *range(3, 24)]),
    ],
    ids=["decoding and prompts", "padding", "few decoding", "a prompt", "a prompt first"],
)
def test_flash_attention_gets_no_tokens_of_decoding_sequences(
    builder: Any, calls: list[tuple[str, Any]], tokens: list[int], expected: list[int]
) -> None:
    common = Common.of(tokens)
    builder.build(0, common)
    ((_, (_, given, fast_build)),) = calls
    assert given.query_start_loc.tolist() == expected
    assert given.query_start_loc.data_ptr() == builder.prompt_starts.data_ptr()
    assert not fast_build
    assert common.query_start_loc.tolist() == common.query_start_loc_cpu.tolist()


def test_the_backend_returns_its_classes(calls: list[tuple[str, Any]]) -> None:
    from vllm.v1.attention.backend import AttentionCGSupport

    from yuan_grpc.model.attention import backend

    backend_class = backend.YuanAttentionBackend
    assert backend_class.get_impl_cls() is backend.YuanAttentionImpl
    builder = backend_class.get_builder_cls()
    assert builder is backend.YuanAttentionMetadataBuilder
    assert builder.get_cudagraph_support(None, None) == AttentionCGSupport.ALWAYS
    assert backend_class.get_name() == "FLASH_ATTN"
