"""What is chosen for an operator who leaves it open, on GPUs. No engine starts, so there need not be one."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # of vLLM's own, while it is imported

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.fixture
def chosen(demo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Puts a configuration together, and lets the architecture's hook choose as it would on a GPU."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from yuan_grpc.model import vllm_config

    def choose(
        sizes: list[int] | None = None,
        largest: int | None = None,
        family: int = 90,
        invariant: bool = False,
        backend: str | None = None,
        flash_attention: int = 3,
        graphs: str = "FULL_AND_PIECEWISE",
        dtype: str = "bfloat16",
        **options: Any,
    ) -> Any:
        config = EngineArgs(str(demo), dtype=dtype, **options).create_engine_config()
        config.compilation_config.cudagraph_capture_sizes = sizes
        config.compilation_config.max_cudagraph_capture_size = largest
        config.compilation_config.cudagraph_mode = CUDAGraphMode[graphs]
        config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
        gpu = SimpleNamespace(
            is_cuda=lambda: True, is_cpu=lambda: False, is_device_capability_family=lambda other: other == family
        )
        for module in (vllm_config, backend):
            monkeypatch.setattr(module, "current_platform", gpu)
        monkeypatch.setattr(backend, "get_flash_attn_version", lambda head_size: flash_attention)
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(invariant)))
        vllm_config.YuanModelConfig.verify_and_update_config(config)
        return config

    return choose


def test_steps_of_whole_prompts_are_captured(chosen: Any) -> None:
    sizes = chosen(max_num_seqs=100, max_num_batched_tokens=8192).compilation_config.cudagraph_capture_sizes
    decoding = [1, 2, 4, *sorted({*range(8, 201, 8), 100})]
    assert sizes == [*decoding, *range(256, 2048, 128), *range(2048, 4097, 256)]


@pytest.mark.parametrize(("ranks", "largest"), [(1, 256), (2, 512), (4, 1024)])
def test_wide_layers_keep_a_gpu_busy_for_longer(chosen: Any, ranks: int, largest: int) -> None:
    wide = {"hidden_size": 8192, "num_attention_heads": 64}
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 8192, "tensor_parallel_size": ranks}
    config = chosen(hf_overrides=wide, distributed_executor_backend="mp", **options)
    assert config.compilation_config.cudagraph_capture_sizes[-1] == largest


def test_no_step_is_captured_that_cannot_be(chosen: Any) -> None:
    sizes = chosen(max_num_seqs=4, max_num_batched_tokens=500).compilation_config.cudagraph_capture_sizes
    assert sizes == [1, 2, 4, 8, 64, 128, 256, 384, 500]


@pytest.mark.parametrize(("heads", "given", "splits"), [(4, 32, 32), (32, 32, 5), (32, 2, 2)])
def test_room_for_no_more_parts_of_a_sequence_than_fill_a_gpu(chosen: Any, heads: int, given: int, splits: int) -> None:
    config = chosen(
        hf_overrides={"hidden_size": 8192, "num_attention_heads": heads},
        attention_config={"flash_attn_max_num_splits_for_cuda_graph": given},
    )
    assert config.attention_config.flash_attn_max_num_splits_for_cuda_graph == splits


@pytest.mark.parametrize(
    "options",
    [
        {"sizes": [1, 2]},
        {"largest": 64},
        {"speculative_config": DRAFTS},
        {"performance_mode": "interactivity"},
        {"family": 80},
    ],
    ids=["sizes", "largest", "drafts", "performance mode", "another GPU"],
)
def test_what_an_operator_or_vllm_chose_stays(chosen: Any, options: dict[str, Any]) -> None:
    compilation = chosen(**options).compilation_config
    assert compilation.cudagraph_capture_sizes == options.get("sizes")
    assert compilation.max_cudagraph_capture_size == options.get("largest")


@pytest.mark.parametrize(
    ("invariant", "given", "backend"),
    [(False, None, None), (True, None, "TRITON_ATTN"), (True, "FLASH_ATTN", "FLASH_ATTN")],
)
def test_an_attention_that_is_batch_invariant(
    chosen: Any, invariant: bool, given: str | None, backend: str | None
) -> None:
    taken = chosen(invariant=invariant, backend=given).attention_config.backend
    assert getattr(taken, "name", None) == backend


@pytest.mark.parametrize(("family", "ranks", "early"), [(90, 1, True), (80, 1, None), (90, 2, None)])
def test_compiled_kernels_begin_early_on_one_hopper(chosen: Any, family: int, ranks: int, early: bool | None) -> None:
    split = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    config = chosen(family=family, hf_overrides={"num_attention_heads": 4}, **split)
    assert config.compilation_config.inductor_compile_config.get("triton.enable_pdl") is early


def test_compiled_kernels_begin_as_an_operator_says(chosen: Any) -> None:
    config = chosen(compilation_config={"inductor_compile_config": {"triton.enable_pdl": False}})
    assert config.compilation_config.inductor_compile_config["triton.enable_pdl"] is False


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128)])
def test_decoding_has_an_attention_of_its_own(chosen: Any, dtype: str, head_dim: int) -> None:
    from yuan_grpc.model.attention.backend import YuanAttentionBackend, attention_backend

    assert attention_backend(chosen(dtype=dtype), head_dim) is YuanAttentionBackend


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [
        (64, {"backend": "FLASH_ATTN"}),
        (64, {"attention_config": {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}}),
        (64, {"hf_overrides": {"sliding_window": 64}}),
        (64, {"block_size": 8}),
        (64, {"graphs": "FULL"}),
        (64, {"invariant": True}),
        (64, {"speculative_config": DRAFTS}),
        (64, {"kv_cache_dtype": "fp8"}),
        (64, {"dtype": "float32"}),
        (64, {"family": 80}),
        (64, {"flash_attention": 2}),
        (96, {}),
    ],
    ids=str,
)
def test_other_attention_is_left_to_vllm(chosen: Any, head_dim: int, options: dict[str, Any]) -> None:
    from yuan_grpc.model.attention.backend import attention_backend

    assert attention_backend(chosen(**options), head_dim) is None
