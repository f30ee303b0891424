"""Defaults for options that the operator does not set, on GPUs. No engine starts, so no GPU is needed."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns when it is imported

DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}


@pytest.fixture
def configure(demo: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that builds a configuration and applies the architecture's hook as on a GPU."""
    from vllm.config import CUDAGraphMode
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    from yuan_grpc.model import hopper, vllm_config
    from yuan_grpc.model.attention import backend as attention_backend

    def configure(
        capture_sizes: list[int] | None = None,
        max_capture_size: int | None = None,
        family: int = 90,
        batch_invariant: bool = False,
        backend: str | None = None,
        flash_attention: int = 3,
        cudagraph_mode: str = "FULL_AND_PIECEWISE",
        dtype: str = "bfloat16",
        **options: Any,
    ) -> Any:
        config = EngineArgs(str(demo), dtype=dtype, **options).create_engine_config()
        config.compilation_config.cudagraph_capture_sizes = capture_sizes
        config.compilation_config.max_cudagraph_capture_size = max_capture_size
        config.compilation_config.cudagraph_mode = CUDAGraphMode[cudagraph_mode]
        config.attention_config.backend = AttentionBackendEnum[backend] if backend else None
        gpu = SimpleNamespace(
            is_cuda=lambda: True, is_cpu=lambda: False, is_device_capability_family=lambda other: other == family
        )
        for module in (vllm_config, hopper):
            monkeypatch.setattr(module, "current_platform", gpu)
        monkeypatch.setattr(attention_backend, "get_flash_attn_version", lambda head_size: flash_attention)
        monkeypatch.setenv("VLLM_BATCH_INVARIANT", str(int(batch_invariant)))
        vllm_config.YuanModelConfig.verify_and_update_config(config)
        return config

    return configure


def test_graphs_are_captured_for_steps_with_prompts(configure: Any) -> None:
    sizes = configure(max_num_seqs=100, max_num_batched_tokens=8192).compilation_config.cudagraph_capture_sizes
    decoding = [1, 2, 4, *sorted({*range(8, 201, 8), 100})]
    assert sizes == [*decoding, *range(256, 2048, 128), *range(2048, 4097, 256)]


@pytest.mark.parametrize(("ranks", "largest"), [(1, 256), (2, 512), (4, 1024)])
def test_the_largest_captured_step_shrinks_with_the_layer_width(configure: Any, ranks: int, largest: int) -> None:
    wide = {"hidden_size": 8192, "num_attention_heads": 64}
    options = {"max_num_seqs": 8, "max_num_batched_tokens": 8192, "tensor_parallel_size": ranks}
    config = configure(hf_overrides=wide, distributed_executor_backend="mp", **options)
    assert config.compilation_config.cudagraph_capture_sizes[-1] == largest


def test_no_step_larger_than_the_scheduler_allows_is_captured(configure: Any) -> None:
    sizes = configure(max_num_seqs=4, max_num_batched_tokens=500).compilation_config.cudagraph_capture_sizes
    assert sizes == [1, 2, 4, 8, 64, 128, 256, 384, 500]


@pytest.mark.parametrize(("heads", "configured", "splits"), [(4, 32, 32), (32, 32, 5), (32, 2, 2)])
def test_attention_splits_are_limited_to_the_number_that_fills_a_gpu(
    configure: Any, heads: int, configured: int, splits: int
) -> None:
    config = configure(
        hf_overrides={"hidden_size": 8192, "num_attention_heads": heads},
        attention_config={"flash_attn_max_num_splits_for_cuda_graph": configured},
    )
    assert config.attention_config.flash_attn_max_num_splits_for_cuda_graph == splits


@pytest.mark.parametrize(
    "options",
    [
        {"capture_sizes": [1, 2]},
        {"max_capture_size": 64},
        {"speculative_config": DRAFTS},
        {"performance_mode": "interactivity"},
        {"family": 80},
    ],
    ids=["capture sizes", "max capture size", "drafts", "performance mode", "another GPU"],
)
def test_capture_sizes_of_the_operator_or_vllm_are_kept(configure: Any, options: dict[str, Any]) -> None:
    compilation = configure(**options).compilation_config
    assert compilation.cudagraph_capture_sizes == options.get("capture_sizes")
    assert compilation.max_cudagraph_capture_size == options.get("max_capture_size")


@pytest.mark.parametrize(
    ("batch_invariant", "configured", "expected"),
    [(False, None, None), (True, None, "TRITON_ATTN"), (True, "FLASH_ATTN", "FLASH_ATTN")],
)
def test_batch_invariance_selects_triton_attention(
    configure: Any, batch_invariant: bool, configured: str | None, expected: str | None
) -> None:
    backend = configure(batch_invariant=batch_invariant, backend=configured).attention_config.backend
    assert getattr(backend, "name", None) == expected


@pytest.mark.parametrize(("family", "ranks", "enabled"), [(90, 1, True), (80, 1, None), (90, 2, None)])
def test_pdl_is_enabled_for_compiled_kernels_on_a_single_hopper_gpu(
    configure: Any, family: int, ranks: int, enabled: bool | None
) -> None:
    split = {"tensor_parallel_size": ranks, "distributed_executor_backend": "mp"}
    config = configure(family=family, hf_overrides={"num_attention_heads": 4}, **split)
    assert config.compilation_config.inductor_compile_config.get("triton.enable_pdl") is enabled


def test_the_operators_pdl_setting_is_kept(configure: Any) -> None:
    config = configure(compilation_config={"inductor_compile_config": {"triton.enable_pdl": False}})
    assert config.compilation_config.inductor_compile_config["triton.enable_pdl"] is False


@pytest.mark.parametrize(("dtype", "head_dim"), [("bfloat16", 64), ("float16", 128)])
def test_the_yuan_backend_is_used_where_it_is_supported(configure: Any, dtype: str, head_dim: int) -> None:
    from yuan_grpc.model.attention.backend import YuanAttentionBackend, attention_backend

    assert attention_backend(configure(dtype=dtype), head_dim) is YuanAttentionBackend


@pytest.mark.parametrize(
    ("head_dim", "options"),
    [
        (64, {"backend": "FLASH_ATTN"}),
        (64, {"attention_config": {"backend_per_kind": {"full_attention": "TRITON_ATTN"}}}),
        (64, {"hf_overrides": {"sliding_window": 64}}),
        (64, {"block_size": 8}),
        (64, {"cudagraph_mode": "FULL"}),
        (64, {"batch_invariant": True}),
        (64, {"speculative_config": DRAFTS}),
        (64, {"kv_cache_dtype": "fp8"}),
        (64, {"dtype": "float32"}),
        (64, {"family": 80}),
        (64, {"flash_attention": 2}),
        (96, {}),
        (256, {}),  # Yuan2.0-M32
    ],
    ids=str,
)
def test_vllm_chooses_the_backend_elsewhere(configure: Any, head_dim: int, options: dict[str, Any]) -> None:
    from yuan_grpc.model.attention.backend import attention_backend

    assert attention_backend(configure(**options), head_dim) is None


@pytest.fixture
def scheduler_on_an_h100(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that returns the scheduler's configuration for flags, with vLLM's defaults for an H100."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext

    from yuan_grpc.server.engine.vllm import args

    server = UsageContext.OPENAI_API_SERVER
    monkeypatch.setattr(EngineArgs, "get_batch_defaults", lambda *_: ({server: 8192}, {server: 1024}))
    monkeypatch.setattr(args, "current_platform", SimpleNamespace(is_cuda=lambda: True))
    model = tmp_path / "model"
    shutil.copytree(demo, model)
    config = json.loads((model / "config.json").read_text("utf-8"))
    (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}), "utf-8")

    def scheduler(*flags: str) -> Any:
        return args.parse_engine_flags(["--model", str(model), *flags]).config.scheduler_config

    return scheduler


@pytest.mark.parametrize(
    ("flags", "tokens", "sequences", "threshold"),
    [
        ((), 8192, 256, 1024),
        (("--max-num-batched-tokens", "1024"), 1024, 256, 0),
        (("--max-num-seqs", "64"), 8192, 64, 1024),
        (("--max-model-len", "1024"), 8192, 256, 0),
        (("--long-prefill-token-threshold", "0"), 8192, 256, 0),
        (("--long-prefill-token-threshold", "512"), 8192, 256, 512),
        (("--performance-mode", "throughput"), 16384, 2048, 1024),
    ],
    ids=str,
)
def test_a_step_has_the_size_of_vllm_serve_unless_the_operator_chooses(
    scheduler_on_an_h100: Any, flags: tuple[str, ...], tokens: int, sequences: int, threshold: int
) -> None:
    scheduler = scheduler_on_an_h100(*flags)
    sizes = (scheduler.max_num_batched_tokens, scheduler.max_num_seqs, scheduler.long_prefill_token_threshold)
    assert sizes == (tokens, sequences, threshold)
