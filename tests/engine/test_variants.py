"""The YaRN variant: frequencies, length, and the engine compared with the reference."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from engine.test_parity import ENGINE, SIZES, TOKENS, TOLERANCE, logprob_difference
from engine_process import run_program
from reference import ReferenceYuan

from yuan_grpc.model.checkpoint.random import write_checkpoint
from yuan_grpc.model.config import YuanConfig

pytestmark = [pytest.mark.engine, pytest.mark.filterwarnings("ignore")]  # vLLM warns when it is imported

LENGTHS = (1, 3, 17, 100, 333)
PUBLISHED = {"use_yarn": True}
SHORT = {  # extends a length that is shorter than the longest prompts
    "use_yarn": True,
    "rope_theta": 500.0,
    "max_position_embeddings": 512,
    "rope_scaling": {"type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64},
}


def checkpoint_with(fields: dict[str, Any], folder: Path, demo: Path) -> Path:
    """Write a checkpoint with a head dimension of 64 and these additional fields in `config.json`."""
    write_checkpoint(folder, demo, SIZES | {"num_attention_heads": 2}, seed=7, dtype=torch.float32)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))
    return folder


@pytest.mark.parametrize(
    ("fields", "engine"),
    [(PUBLISHED, {"max_model_len": LENGTHS[-1] + TOKENS}), (SHORT, {})],
    ids=["published", "short"],
)
def test_the_engine_matches_the_reference(
    demo: Path, tokens: int, tmp_path: Path, fields: dict[str, Any], engine: dict[str, Any]
) -> None:
    checkpoint = checkpoint_with(fields, tmp_path / "model", demo)
    generator = random.Random(0)
    prompts = [[generator.randrange(tokens) for _ in range(length)] for length in LENGTHS]
    job = {"model": checkpoint, "engine": ENGINE | engine, "rounds": [prompts, prompts], "tokens": TOKENS}
    result = run_program("run_engine.py", job, tmp_path / "out.json")
    reference = ReferenceYuan(checkpoint, tokens)
    expected = [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]
    for answers in result["rounds"]:
        assert logprob_difference(answers, expected) < TOLERANCE


def test_the_engine_serves_the_extended_length_unless_a_smaller_one_is_configured(demo: Path, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def max_model_len(**flags: Any) -> int:
        length: int = EngineArgs(str(tmp_path), **flags).create_model_config().max_model_len
        return length

    checkpoint_with(PUBLISHED, tmp_path, demo)
    assert max_model_len() == 1_048_576
    assert max_model_len(max_model_len=4096) == 4096
    with pytest.raises(ValueError, match=r"max_model_len \(1048577\) is greater than the derived max_model_len"):
        max_model_len(max_model_len=1_048_577)
    checkpoint_with(SHORT, tmp_path, demo)
    assert max_model_len() == 512


@pytest.mark.parametrize(
    ("pair", "frequency"),
    [
        (0, 1.0),
        (8, 0.0316227766),  # the last pair that keeps its frequency: 10 ** (-12 / 8)
        (9, 0.0205352503 / (1 / 9 * 128 + 8 / 9)),
        (12, 0.00562341325 / (4 / 9 * 128 + 5 / 9)),
        (16, 0.001 / (8 / 9 * 128 + 1 / 9)),
        (17, 0.000649381632 / 128),  # the first pair whose frequency is divided by the full factor
        (31, 1.53992653e-06 / 128),
    ],
)
def test_fast_pairs_keep_their_frequency_and_that_of_slow_pairs_is_divided(pair: int, frequency: float) -> None:
    from yuan_grpc.model.rotary import yarn_frequencies

    frequencies = yarn_frequencies(64, base=1e6, factor=128, original=8192)
    assert frequencies.shape == (32,)
    assert float(frequencies[pair]) == pytest.approx(frequency, rel=1e-6)


def test_layers_share_a_table_of_the_served_length() -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from yuan_grpc.model.rotary import rotary_embedding

    config = YuanConfig(use_yarn=True)
    with set_current_vllm_config(VllmConfig()):
        rotary = rotary_embedding(config, 100)
        assert rotary_embedding(config, 100) is rotary
    table = rotary.get_buffer("cos_sin_cache")
    assert table.shape == (100, 64)
    magnitude = 1.48520303  # 0.1 ln 128 + 1
    first, second = table[0], table[1]
    assert first.tolist() == pytest.approx([magnitude] * 32 + [0.0] * 32)
    assert (float(second[0]), float(second[32])) == pytest.approx((magnitude * 0.540302306, magnitude * 0.841470985))
