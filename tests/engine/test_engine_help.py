"""The help of the engine's options. It imports vLLM, but starts no engine."""

import re

import pytest

from yuan_grpc.__main__ import main

pytestmark = pytest.mark.engine


@pytest.mark.filterwarnings("ignore")  # vLLM and torch warn while they are imported
def test_the_help_lists_the_options_of_the_engine_by_group(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["serve", "--help=all"])
    assert end.value.code == 0
    groups = dict(re.findall(r"^(\w+):\n(.*?)(?=^\w|\Z)", capsys.readouterr().out, re.MULTILINE | re.DOTALL))
    assert "--max-model-len MAX_MODEL_LEN" in groups["ModelConfig"]
    assert "--kv-cache-memory-bytes" in groups["CacheConfig"]
    assert "Model context length" in groups["ModelConfig"]


@pytest.mark.filterwarnings("ignore")  # vLLM and torch warn while they are imported
def test_a_word_selects_the_options_that_match() -> None:
    from yuan_grpc.server.engine.vllm.args import format_help

    assert "\n  --max-num-queued-reqs" in format_help("queued")
    assert "--max-num-seqs" not in format_help("queued")
    assert "\n  --max-loras" in format_help("LoRAConfig")
    assert "--dtype" not in format_help("LoRAConfig")
    with pytest.raises(LookupError, match=r"no engine option matches 'x-y'; .*CacheConfig"):
        format_help("x_y")
