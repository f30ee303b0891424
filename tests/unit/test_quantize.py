"""`yuan-grpc quantize`: the weights, the configuration, and its refusals."""

import json
from pathlib import Path

import pytest
import torch
from quantized import dequantize_compressed
from safetensors.torch import load_file

from yuan_grpc.__main__ import main
from yuan_grpc.model.checkpoint import quantize
from yuan_grpc.preflight import checkpoint

pytestmark = pytest.mark.timeout(60)

RELATIVE_ERROR = {"int4": 0.15, "int8": 0.01, "fp8": 0.04}


@pytest.mark.parametrize("scheme", ["int4", "int8", "fp8"])
def test_the_weights_are_near_the_original_ones(demo: Path, tmp_path: Path, scheme: str) -> None:
    target = tmp_path / "quantized"
    assert main(["quantize", str(demo), str(target), "--scheme", scheme, "--group-size", "32"]) == 0
    original, quantized = load_file(demo / "model.safetensors"), dequantize_compressed(target)
    assert quantized.keys() == original.keys()
    for name, weight in original.items():
        error = (quantized[name] - weight.float()).norm() / weight.float().norm()
        assert (0 < error < RELATIVE_ERROR[scheme]) if name.endswith("_proj.weight") else error == 0, name
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["format"] == quantize.SCHEMES[scheme].format
    assert (target / "tokenizer.model").read_bytes() == (demo / "tokenizer.model").read_bytes()


def test_a_start_with_a_quantized_checkpoint_is_not_refused_before_it_is_loaded(demo: Path, tmp_path: Path) -> None:
    quantize.quantize_checkpoint(demo, tmp_path / "quantized", "int8")
    assert 0 < checkpoint.check(tmp_path / "quantized", {}) < checkpoint.check(demo, {})


def test_large_checkpoints_are_split_into_files_with_an_index(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize, "MAX_SHARD_BYTES", 100_000)
    quantize.quantize_checkpoint(demo, tmp_path / "split", "int8")
    index = json.loads((tmp_path / "split" / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file.name: load_file(file) for file in (tmp_path / "split").glob("*.safetensors")}
    assert len(files) > 1
    assert index == {name: file for file, weights in files.items() for name in weights}


def test_a_row_of_zeros_stays_zero() -> None:
    for scheme in quantize.SCHEMES.values():
        stored = dict(quantize.quantize_weight("weight", torch.zeros(2, 32), scheme, 32 if scheme.is_grouped else None))
        assert torch.isfinite(stored["weight_scale"].float()).all()


@pytest.mark.parametrize("case", ["group", "exists", "quantized", "experts", "no weights"])
def test_what_cannot_be_quantized_is_refused_and_leaves_nothing(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    source, target = demo, tmp_path / "target"
    message = {
        "group": "the group size must divide 96, the columns of ",
        "exists": "must be a new folder",
        "quantized": "must not be quantized, but is with gptq",
        "experts": "must be a model without experts",
        "no weights": "must have *.safetensors files, not model.bin",
    }[case]
    if case == "exists":
        target.mkdir()
    elif case != "group":
        source = tmp_path / "source"
        source.mkdir()
        (source / ("model.bin" if case == "no weights" else "model.safetensors")).touch()
        fields = {
            "quantized": {"quantization_config": {"quant_method": "gptq"}},
            "experts": {"moe_config": {"moe_num_experts": 4}},
        }
        (source / "config.json").write_text(json.dumps(fields.get(case, {})))
    before = sorted(tmp_path.iterdir())
    assert main(["quantize", str(source), str(target), "--scheme", "int4"]) == 1
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before
