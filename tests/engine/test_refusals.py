"""vLLM options that Yuan does not support: rejected by name before the model is loaded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns while it is imported
cpu_only = pytest.mark.skipif(torch.cuda.is_available(), reason="tests limits of the CPU backend")

NGRAM = {"method": "ngram", "prompt_lookup_max": 3}
FOUR_HEADS = {"num_attention_heads": 4}
"""A number of heads that can be split over two ranks."""


def configure(model: Path, **options: Any) -> None:
    """Create vLLM's engine configuration, which rejects unsupported options."""
    from vllm.engine.arg_utils import EngineArgs

    EngineArgs(str(model), **options).create_engine_config()


def with_fields(demo: Path, folder: Path, **fields: Any) -> Path:
    """Copy the demo checkpoint without its weights, with additional fields in `config.json`; return the folder."""
    config = json.loads((demo / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    (folder / "tokenizer.model").write_bytes((demo / "tokenizer.model").read_bytes())
    return folder


UNSUPPORTED: dict[str, tuple[dict[str, Any], str]] = {
    "another tokenizer": ({"tokenizer_mode": "hf"}, "`tokenizer_mode` must be 'yuan' for a Yuan model, not 'hf'"),
    "more stages than layers": ({"pipeline_parallel_size": 3}, "`pipeline_parallel_size` must be at most .*, 2, not 3"),
    "indivisible heads": ({"tensor_parallel_size": 2}, r"heads \(3\) must be divisible by .* size \(2\)"),
    "an indivisible MLP": ({"tensor_parallel_size": 3}, "`intermediate_size` must be .*, 3, not 256"),
    "an indivisible embedding": (
        {"tensor_parallel_size": 3, "hf_overrides": {"intermediate_size": 96}},
        "`vocab_size`, rounded up to a multiple of 64, must be divisible by the tensor-parallel size, 3, not 1216",
    ),
    "a tokenizer with more tokens than the embedding has rows": (
        {"hf_overrides": {"vocab_size": 1100}},
        "`vocab_size` must be at least 1169, the number of tokens in the tokenizer, not 1100",
    ),
    "overridden experts": ({"hf_overrides": {"use_moe": True}}, "`use_moe` must be false where `moe_config` is absent"),
    "an overridden activation": ({"hf_overrides": {"hidden_act": "gelu"}}, "`hidden_act` must be 'silu', not 'gelu'"),
    "an overridden rotation": ({"hf_overrides": {"rope_theta": 0.5}}, r"`rope_theta` must be .* above 1, not 0\.5"),
    "a rotation overridden by an object": (
        {"hf_overrides": {"rope_parameters": {"rope_type": "linear", "factor": 2.0}}},
        "`rope_parameters` must have the `rope_type` 'default' or 'yarn', not 'linear'",
    ),
    "dual batch overlap": ({"enable_dbo": True}, "`enable_dbo` must be false for Yuan, not true"),
    "too many draft tokens for a block": (
        {"speculative_config": NGRAM | {"num_speculative_tokens": 31}, "block_size": 32},
        "`block_size` must be at least 33 for 31 speculative tokens, not 32",
    ),
    "another quantization": ({"quantization": "mxfp8"}, "`quantization` must be one of fp8, .* for Yuan, not 'mxfp8'"),
    "another grammar backend": (
        {"structured_outputs_config": {"backend": "guidance"}},
        "must be 'xgrammar', not 'guidance'",
    ),
}
"""Options with their error messages, as regular expressions."""


@pytest.mark.parametrize(("options", "message"), UNSUPPORTED.values(), ids=UNSUPPORTED)
def test_unsupported_options_are_rejected(demo: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(demo, **options)


OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_role": "kv_both"}
NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
TRANSFERS: dict[str, tuple[dict[str, Any], str]] = {
    "a connector of layers": (
        {"kv_transfer_config": OFFLOADING | {"kv_connector": "ExampleConnector"}},
        "`kv_connector` must be one of OffloadingConnector, NixlConnector for Yuan, not 'ExampleConnector': "
        "it saves attention layers only",
    ),
    "a connector that was not tried": (
        {"kv_transfer_config": OFFLOADING | {"kv_connector": "MooncakeConnector"}},
        "not 'MooncakeConnector': it is not known to transfer the LFA state",
    ),
    "a connector of one's own": (
        {"kv_transfer_config": NIXL | {"kv_connector_module_path": "mine"}},
        "`kv_connector_module_path` must be unset for Yuan, not 'mine'",
    ),
    "offloading to another program": (
        {"kv_offloading_size": 4.0, "kv_offloading_backend": "lmcache"},
        "`kv_offloading_backend` must be 'native' for Yuan, not 'lmcache'",
    ),
    "offloading to files": (
        {"kv_transfer_config": OFFLOADING | {"kv_connector_extra_config": {"spec_name": "TieringOffloadingSpec"}}},
        "`spec_name` must be 'CPUOffloadingSpec' for Yuan, not 'TieringOffloadingSpec': .* LoRA adapters",
    ),
    "conversion of blocks": (
        {"kv_transfer_config": NIXL | {"enable_permute_local_kv": True}},
        "`enable_permute_local_kv` must be false for Yuan, not true",
    ),
    "engines that differ": (
        {"kv_transfer_config": NIXL | {"kv_connector_extra_config": {"enforce_handshake_compat": False}}},
        "`enforce_handshake_compat` must be true for Yuan, not false",
    ),
    "stages": (
        {"kv_transfer_config": NIXL, "pipeline_parallel_size": 2},
        "`pipeline_parallel_size` must be 1 with a KV connector, not 2",
    ),
}


@pytest.mark.parametrize(("options", "message"), TRANSFERS.values(), ids=TRANSFERS)
def test_unsupported_transfers_of_the_cache_are_rejected(
    demo: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    from yuan_grpc.model import kv_transfer

    monkeypatch.setattr(kv_transfer, "can_offload", lambda: True)
    with pytest.raises(ValueError, match=message):
        configure(demo, **options)


def test_vllms_other_offloading_is_rejected(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from yuan_grpc.model import kv_transfer

    monkeypatch.setattr(kv_transfer, "can_offload", lambda: True)
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", "1")
    with pytest.raises(ValueError, match="`VLLM_USE_SIMPLE_KV_OFFLOAD` must be unset for Yuan, not 1"):
        configure(demo, kv_offloading_size=4.0)


@cpu_only
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_offloading_size": 4.0}, r"`kv_offloading_size` must be unset on CPUs, not 4\.0"),
        ({"kv_transfer_config": OFFLOADING}, "`kv_connector` must be NixlConnector on CPUs, not 'OffloadingConnector'"),
    ],
    ids=["size", "connector"],
)
def test_offloading_is_rejected_on_cpus(demo: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configure(demo, **options)


def test_nixl_is_accepted(demo: Path) -> None:
    configure(demo, kv_transfer_config=NIXL)


EXPERTS = {"moe_config": {"moe_num_experts": 4, "moe_top_k": 2}, "num_attention_heads": 4}
WITH_EXPERTS: dict[str, tuple[dict[str, Any], str]] = {
    "data parallelism": ({"data_parallel_size": 2}, "`data_parallel_size` must be 1 for a Yuan model with experts"),
    "adapters": ({"enable_lora": True}, "`enable_lora` must be false for a Yuan model with experts, not true"),
    "an indivisible width": (
        {"tensor_parallel_size": 2, "hf_overrides": {"moe_config": {"moe_num_experts": 4, "ffn_hidden_size": 33}}},
        "`ffn_hidden_size` must be divisible by the tensor-parallel size, 2, not 33",
    ),
}


@pytest.mark.parametrize(("options", "message"), WITH_EXPERTS.values(), ids=WITH_EXPERTS)
def test_options_that_experts_do_not_support_are_rejected(
    demo: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure(with_fields(demo, tmp_path, **EXPERTS), **options)


@pytest.mark.parametrize("model_type", ["yuan", "yuan2"])
def test_a_checkpoint_of_yuan_3_is_rejected_as_that(demo: Path, tmp_path: Path, model_type: str) -> None:
    with pytest.raises(ValueError, match=r"sets `num_kv_heads`, which is not supported: Yuan 3\.0 has other layers"):
        configure(with_fields(demo, tmp_path, model_type=model_type, num_kv_heads=2, **EXPERTS))


def test_an_overridden_base_is_used(demo: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    overrides: dict[str, Any]
    for overrides in ({"rope_theta": 5e5}, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}):
        config = EngineArgs(str(demo), hf_overrides=overrides).create_engine_config().model_config.hf_config
        assert config.rope_parameters == {"rope_type": "default", "rope_theta": 5e5}


def test_an_incomplete_override_is_rejected(demo: Path) -> None:
    from yuan_grpc.server.engine.vllm.args import parse_engine_flags

    override = '--hf-overrides={"rope_parameters": {"rope_theta": 500000}}'
    with pytest.raises(ValueError, match=r"an object in `--hf-overrides` must be complete, and 'rope_type' is missing"):
        parse_engine_flags(["--model", str(demo), override])


def test_a_draft_model_is_rejected(demo: Path) -> None:
    drafts = {"method": "draft_model", "model": str(demo), "num_speculative_tokens": 2}
    with pytest.raises(ValueError, match=r"`speculative_config` must name one of .* for Yuan, not 'draft_model'"):
        configure(demo, speculative_config=drafts)


@pytest.mark.parametrize("option", ["decode_context_parallel_size", "prefill_context_parallel_size"])
def test_context_parallelism_is_rejected(demo: Path, tmp_path: Path, option: str) -> None:
    with pytest.raises(ValueError, match=f"`{option}` must be 1 for Yuan, not 2"):
        configure(with_fields(demo, tmp_path, **FOUR_HEADS), tensor_parallel_size=2, **{option: 2})


def test_a_checkpoint_in_another_quantized_format_is_rejected(demo: Path, tmp_path: Path) -> None:
    config = {"quant_method": "experts_int8"}
    with pytest.raises(ValueError, match=r"must have one of the methods awq, .*, gptq for Yuan, not"):
        configure(with_fields(demo, tmp_path, quantization_config=config))


def test_a_quantized_checkpoint_with_experts_is_rejected(demo: Path, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    experts = {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 64}
    folder = with_fields(demo, tmp_path, quantization_config=config, moe_config=experts)
    with pytest.raises(ValueError, match=r"must be absent for Yuan2\.0-M32, not one with gptq"):
        configure(folder, dtype="bfloat16")


def test_adapters_for_a_quantized_checkpoint_are_rejected(demo: Path, tmp_path: Path) -> None:
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False}
    folder = with_fields(demo, tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="`enable_lora` must be false for a checkpoint that is quantized with gptq"):
        configure(folder, enable_lora=True, dtype="bfloat16")


@cpu_only
def test_batch_invariance_is_rejected_on_cpus(demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="`VLLM_BATCH_INVARIANT` must be unset on CPUs, not 1"):
        configure(demo)


@cpu_only
def test_an_eager_pipeline_is_rejected_on_cpus(demo: Path) -> None:
    configure(demo, pipeline_parallel_size=2)
    with pytest.raises(ValueError, match="`enforce_eager` must be false for a pipeline on CPUs, not true"):
        configure(demo, pipeline_parallel_size=2, enforce_eager=True)


@cpu_only
def test_sleep_mode_is_rejected_on_cpus(demo: Path) -> None:
    with pytest.raises(ValueError, match="Sleep mode is not supported on current platform"):
        configure(demo, enable_sleep_mode=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"speculative_config": NGRAM | {"num_speculative_tokens": 30}, "block_size": 32}],
    ids=["defaults", "as many draft tokens as a block can hold"],
)
def test_supported_options_are_accepted(demo: Path, options: dict[str, Any]) -> None:
    configure(demo, **options)


def test_lfa_state_slots_are_not_split_for_an_attention_backend_with_small_blocks() -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.utils import select_common_block_size

    from yuan_grpc.model.lfa.cache_layout import StateBackend

    def sizes(kv_cache_spec: Any = None) -> list[int]:
        return [16, 32, 64]

    small: Any = SimpleNamespace(get_name=lambda: "SMALL", get_supported_kernel_block_sizes=sizes)
    spec = FullAttentionSpec(block_size=128, num_kv_heads=1, head_size=8, dtype=torch.float32)
    assert select_common_block_size(128, [small], [spec]) == 64
    with pytest.raises(ValueError, match=r"No common block size for 128 .*YUAN_LFA_STATE: \[128\]"):
        select_common_block_size(128, [small, StateBackend], [spec, spec])
    assert select_common_block_size(64, [small, StateBackend], [spec.copy_with_new_block_size(64)] * 2) == 64
