"""The checks before vLLM is imported, where `newcomer` cannot play the fault."""

import json
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from yuan_grpc import preflight
from yuan_grpc.model.checkpoint.random import write_checkpoint
from yuan_grpc.preflight import checkpoint, flags, hub, machine
from yuan_grpc.server.settings import DEMO, Settings
from yuan_grpc.server.settings.demo import LOAD_TEST, LOAD_TEST_FLAGS, M32_LOAD_TEST
from yuan_grpc.server.start_error import StartError

GIB = 1 << 30


def memory(monkeypatch: pytest.MonkeyPatch, **files: str) -> machine.Memory | None:
    """Return the memory of a machine with these contents of files."""
    contents = {
        "/proc/meminfo": "MemTotal: 8388608 kB\nMemFree: 1048576 kB\nActive(file): 1048576 kB\n"
        "Inactive(file): 1048576 kB\nSReclaimable: 0 kB\n"
    } | {f"/sys/fs/cgroup/{name.replace('__', '/').replace('_', '.', 1)}": text for name, text in files.items()}

    def read_text(path: Path) -> str:
        if str(path) not in contents:
            raise FileNotFoundError(path)
        return contents[str(path)]

    monkeypatch.setattr(Path, "read_text", read_text)
    return machine.read_memory()


def test_the_memory_of_a_machine_includes_cached_files(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory(monkeypatch) == machine.Memory(8 * GIB, 3 * GIB, 3 * GIB)


def test_the_memory_of_a_container_is_its_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"memory_max": f"{4 * GIB}", "memory_current": f"{2 * GIB}", "memory_stat": f"active_file {GIB // 2}\nx 1"}
    assert memory(monkeypatch, **files) == machine.Memory(4 * GIB, 2 * GIB, 2 * GIB + GIB // 2)


def test_a_container_without_a_limit_has_the_memory_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    assert memory(monkeypatch, memory_max="max", memory_current="1") == machine.Memory(8 * GIB, 3 * GIB, 3 * GIB)


def test_unknown_memory_is_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "read_memory", lambda: None)
    machine._check_memory({"--kv-cache-memory-bytes": "999999G"}, 0)


@pytest.mark.parametrize(("size", "weights", "fits"), [("1G", 0, True), ("1G", 2 * GIB, False), ("3G", 0, False)])
def test_cache_and_weights_must_fit_together(
    monkeypatch: pytest.MonkeyPatch, size: str, weights: int, fits: bool
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(machine, "read_memory", lambda: machine.Memory(8 * GIB, 2 * GIB, 2 * GIB))
    if fits:
        machine._check_memory({"--kv-cache-memory-bytes": size}, weights)
    else:
        with pytest.raises(StartError, match="need more than the free memory"):
            machine._check_memory({"--kv-cache-memory-bytes": size}, weights)


def test_the_headers_of_python_are_needed_to_compile(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(StartError, match=r"Python\.h is missing, .* apt-get install python3-dev"):
        machine._check_headers("")
    (tmp_path / "Python.h").touch()
    machine._check_headers("")


@pytest.mark.parametrize(("variable", "default"), [("CC", "gcc"), ("CXX", "g++")])
def test_a_compiler_that_a_variable_names_must_exist(
    monkeypatch: pytest.MonkeyPatch, variable: str, default: str
) -> None:
    monkeypatch.setenv(variable, "/opt/no-such-compiler -O2")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(StartError, match=rf"/opt/no-such-compiler is missing, .* install {re.escape(default)}"):
        machine._check_compiler(default, variable, "it is needed")


@pytest.mark.parametrize(
    ("options", "compiles"),
    [
        ({}, True),
        ({"--enforce-eager": ""}, False),
        ({"--enforce-eager": "false"}, True),
        ({"--enable-lora": ""}, False),
        ({"--compilation-config": "{}"}, False),
    ],
)
def test_only_a_compiled_model_needs_a_compiler(options: dict[str, str], compiles: bool) -> None:
    assert machine._compiles(options) is compiles


def test_flags_are_read_as_vllm_reads_them() -> None:
    arguments = ["--max_model_len=9", "--dtype", "float32", "--enforce-eager", "--hf-overrides.a.b", "1"]
    assert flags.parse([*arguments, "--dtype=auto"]) == {
        "--max-model-len": "9",
        "--dtype": "auto",
        "--enforce-eager": "",
        "--hf-overrides": "1",
    }


@pytest.mark.parametrize(
    ("text", "size"), [("128M", 128 << 20), ("1k", 1000), ("1.5g", 1_500_000_000), ("7", 7), ("", None), ("4X", None)]
)
def test_sizes_are_in_vllms_notation(text: str, size: int | None) -> None:
    assert flags.parse_size(text) == size


@pytest.mark.parametrize(
    "flag", ["--max-model-len", "--max_model_len", "--no-enable-prefix-caching", "--tensor-parallel", "-tp", "--config"]
)
def test_a_flag_of_vllm_is_known(flag: str) -> None:
    assert flags.unknown_flags([flag]) == []


def test_an_unknown_flag_is_found() -> None:
    assert flags.unknown_flags(["--max-model-len=9", "--mdel=x", "--no-such"]) == ["--mdel", "--no-such"]


def test_the_models_of_the_package_pass_the_checks_of_a_checkpoint() -> None:
    assert 8e6 < checkpoint.check(Path(DEMO), {}) < 12e6
    for folder in (LOAD_TEST, M32_LOAD_TEST):
        assert checkpoint.check(Path(folder), flags.parse([*LOAD_TEST_FLAGS])) == 0


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 4}, "sets `num_kv_heads`, which is not supported: Yuan 3.0"),
        (
            {"use_moe": True, "moe_config": {"per_layer_experts_blocks": [8, 7]}},
            "sets `per_layer_experts_blocks`, which",
        ),
        ({"use_moe": True}, "`use_moe` must be false where `moe_config` is absent"),
    ],
)
def test_other_models_of_the_same_name_are_named(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    """Their weights would have the wrong shapes, which is not what an operator needs to know."""
    model = shutil.copytree(DEMO, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(StartError, match=message):
        checkpoint.check(model, {})


def test_the_weights_of_experts_are_checked(tmp_path: Path) -> None:
    fields = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"attention_projection_size": 32, "moe_config": {"moe_num_experts": 2}}
    write_checkpoint(tmp_path, Path(DEMO), fields | experts)
    assert checkpoint.check(tmp_path, {}) > 0
    config = json.loads((tmp_path / "config.json").read_text())
    config["moe_config"]["moe_num_experts"] = 3
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        StartError, match=r"mlp\.gate\.key\.weight must be of shape \[3, 16\] by config\.json, not \[2, 16\]"
    ):
        checkpoint.check(tmp_path, {})


def test_weights_are_not_checked_if_they_are_not_loaded(tmp_path: Path) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "model.safetensors").unlink()
    assert checkpoint.check(model, {"--load-format": "dummy"}) == 0


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 cut off"])
def test_a_truncated_torch_file_is_named(tmp_path: Path, content: bytes) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "model.safetensors").unlink()
    (model / "pytorch_model.bin").write_bytes(content)
    with pytest.raises(StartError, match=r"pytorch_model\.bin is incomplete"):
        checkpoint.check(model, {})


@pytest.mark.parametrize("header", [b"\xff" * 8, b"\x02\0\0\0\0\0\0\0{]", b'\x08\0\0\0\0\0\0\0{"a": 1}', b"\0" * 8])
def test_a_damaged_header_is_named(tmp_path: Path, header: bytes) -> None:
    model = shutil.copytree(DEMO, tmp_path / "model")
    (model / "model.safetensors").write_bytes(header + b" " * 20)
    with pytest.raises(StartError, match=r"model\.safetensors is incomplete or damaged"):
        checkpoint.check(model, {})


def test_a_subfolder_with_the_checkpoint_is_suggested(tmp_path: Path) -> None:
    shutil.copytree(DEMO, tmp_path / "hf")
    with pytest.raises(StartError, match=r"has no config\.json: did you mean its subfolder hf\?"):
        checkpoint.check(tmp_path, {})


@pytest.mark.parametrize("model", ["Yuan2-2B", "a/b/c", "tests/none"])
def test_what_is_no_id_of_the_hub_must_be_a_folder(model: str) -> None:
    with pytest.raises(StartError, match="must be an existing folder or a hub id"):
        hub.local_folder(model, {})


def test_the_hub_is_not_asked_if_it_is_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(StartError, match="neither a folder nor in the hub's cache"):
        hub.local_folder("nobody/nothing", {})


def test_a_missing_vllm_is_reported_before_anything_else(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(preflight, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError) as raised:
        preflight.check_engine(Settings(str(tmp_path), "127.0.0.1", 0, 0, ()))
    assert raised.value.name == "vllm"


def test_the_command_needs_only_the_client_until_it_serves() -> None:
    blocked = ("google.rpc", "vllm", "torch", "huggingface_hub", "sentencepiece", "numpy", "starlette", "grpc_health")
    code = f"import sys\nfor name in {blocked}: sys.modules[name] = None\nimport yuan_grpc.__main__"
    subprocess.run([sys.executable, "-c", code], check=True)
