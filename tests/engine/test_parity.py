"""The model on the real engine compared with the reference: equal tokens and log-probabilities in every schedule."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch
from engine_process import run_program
from gpus import FLOAT32_ON_GPUS, VLLM_DEFAULTS, largest_difference, requires_gpu
from ports import free_port
from reference import Continuation, ReferenceYuan
from safetensors.torch import load_file, save_file

from yuan_grpc.model.checkpoint.random import write_checkpoint

pytestmark = pytest.mark.engine

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
LENGTHS = (1, 2, 3, 17, 100, 333)
TOKENS = 24
TOLERANCE = 1e-4
BFLOAT16_TOLERANCE = 0.15  # with these random weights; 0.075 was measured on an H200
FP8_TOLERANCE = 1.0  # 0.53 was measured on an H100
TF32_TOLERANCE = 0.01
"""For float32 on GPUs: Triton's attention multiplies tf32. 0.0057 was measured on H100s."""
ENGINE = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_num_batched_tokens": 48,
    "max_num_seqs": 16,
    "max_model_len": 512,
    "block_size": 32,
    "kv_cache_memory_bytes": 128 * 2**20,
}
DRAFTS = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_min": 1, "prompt_lookup_max": 3}
PARALLEL: dict[str, dict[str, Any]] = {
    "two ranks, drafts": {"tensor_parallel_size": 2, "speculative_config": DRAFTS},
    "four ranks": {"tensor_parallel_size": 4},
    "two stages, compiled": {"pipeline_parallel_size": 2, "enforce_eager": False},
}
OFFLOADING: dict[str, Any] = {"kv_offloading_size": 2**-4}
HAND_OVER: dict[str, Any] = {
    "kv_transfer_config": {"kv_connector": "NixlConnector", "kv_role": "kv_both"},
    "install": ["hand_over"],
}

NIXL_ENGINE = Path(__file__).parents[1] / "support" / "nixl_engine.py"

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def checkpoint(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with random weights in float32, so that loading does not round them."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write_checkpoint(folder, demo, SIZES, seed=7, dtype=torch.float32)
    return folder


@pytest.fixture(scope="session")
def prompts(tokens: int) -> list[list[int]]:
    """One random prompt of each length."""
    generator = random.Random(0)
    return [[generator.randrange(tokens) for _ in range(length)] for length in LENGTHS]


@pytest.fixture(scope="session")
def expected(checkpoint: Path, tokens: int, prompts: list[list[int]]) -> list[Continuation]:
    """The reference's continuation of each prompt."""
    reference = ReferenceYuan(checkpoint, tokens)
    return [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]


@pytest.fixture
def run(tmp_path: Path, checkpoint: Path) -> Run:
    """A function that runs an engine in a separate process."""

    def run(
        rounds: list[list[list[int]]],
        model: Path = checkpoint,
        n: int = 1,
        sleep: Sequence[int] = (),
        install: Sequence[str] = (),
        reset: bool = False,
        **engine: object,
    ) -> dict[str, Any]:
        job = {"model": model, "engine": ENGINE | engine, "rounds": rounds, "tokens": TOKENS, "n": n, "sleep": sleep}
        job |= {"install": install, "reset": reset}
        result: dict[str, Any] = run_program("run_engine.py", job, tmp_path / "out.json")
        return result

    return run


@pytest.fixture(scope="session")
def whole_blocks(prompts: list[list[int]]) -> list[list[int]]:
    """Prompts that fill their blocks of 32 tokens, and one with a token more."""
    return [prompts[-1][start : start + length] for start, length in ((0, 32), (32, 96), (128, 33))]


@pytest.fixture(scope="session")
def expected_of_whole_blocks(checkpoint: Path, tokens: int, whole_blocks: list[list[int]]) -> list[Continuation]:
    """The reference's continuation of these prompts."""
    reference = ReferenceYuan(checkpoint, tokens)
    return [reference.continue_greedily(prompt, TOKENS) for prompt in whole_blocks]


@pytest.fixture(scope="session")
def requested(prompts: list[list[int]], whole_blocks: list[list[int]]) -> list[list[int]]:
    """The prompts of the tests that load blocks; from the fifth on they have a block or more."""
    return prompts + whole_blocks


@pytest.fixture(scope="session")
def continuations(expected: list[Continuation], expected_of_whole_blocks: list[Continuation]) -> list[Continuation]:
    """The reference's continuation of these prompts."""
    return expected + expected_of_whole_blocks


@contextmanager
def started_engine(engine: dict[str, Any]) -> Iterator[subprocess.Popen[str]]:
    """Start a process with an engine for NIXL; it does not outlive the block."""
    variables = {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())}
    program = [sys.executable, str(NIXL_ENGINE)]
    with subprocess.Popen(program, env=os.environ | variables, text=True, stdin=PIPE, stdout=PIPE) as process:
        try:
            assert process.stdin is not None
            print(json.dumps(engine), file=process.stdin, flush=True)
            yield process
        finally:
            process.kill()


def ask(engine: subprocess.Popen[str], **request: Any) -> dict[str, Any]:
    """Return the answer of such a process."""
    assert engine.stdin is not None
    assert engine.stdout is not None
    print(json.dumps(request), file=engine.stdin, flush=True)
    answer: dict[str, Any] = json.loads(engine.stdout.readline())
    return answer


def logprob_difference(answers: list[dict[str, Any]], expected: list[Continuation]) -> float:
    """Check that the tokens are equal and return the largest difference of log-probabilities; `pytest -s` shows it."""
    assert [answer["token_ids"] for answer in answers] == [continuation.token_ids for continuation in expected]
    largest = [
        max(float(abs(a - b)) for a, b in zip(answer["logprobs"], continuation.logprobs, strict=True))
        for answer, continuation in zip(answers, expected, strict=True)
    ]
    print("largest differences:", *(f"{value:.1e}" for value in largest))
    return max(largest)


def alone(prompts: list[list[int]]) -> list[list[list[int]]]:
    """Return one round per prompt."""
    return [[prompt] for prompt in prompts]


@requires_gpu
@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
def test_vllms_default_configuration_on_a_gpu(
    run: Run, checkpoint: Path, tokens: int, prompts: list[list[int]], speculation: dict[str, Any] | None
) -> None:
    """With bfloat16, compilation and CUDA graphs, compare only the log-probabilities of the tokens that were chosen."""
    repeated = [prompt[:10] * 8 for prompt in prompts]
    generator = random.Random(1)
    large_batch = [[generator.randrange(tokens) for _ in range(333)] for _ in range(12)]  # about 4,000 tokens in a step
    rounds = [prompts, prompts, repeated, large_batch]
    result = run(rounds, **VLLM_DEFAULTS, speculative_config=speculation)
    assert result["rounds"][1][-1]["cached"] > 0
    assert (0 < result["accepted"] < result["drafted"]) == bool(speculation)
    reference = ReferenceYuan(checkpoint, tokens)
    for requested, answers in zip(rounds, result["rounds"], strict=True):
        assert largest_difference(reference, requested, answers) < BFLOAT16_TOLERANCE


@requires_gpu
def test_prompts_are_computed_while_others_decode_on_a_gpu(run: Run, demo: Path, tokens: int, tmp_path: Path) -> None:
    """Parts of prompts, and prompts of one token, share steps with enough decoding sequences to use both kernels."""
    write_checkpoint(tmp_path, demo, SIZES | {"hidden_size": 256, "num_attention_heads": 16}, seed=7)
    generator = random.Random(2)
    lengths = [20, 1, 24, 17, 22, 2, 30, 19] * 8  # similar, or FlashAttention would compute all
    prompts = [[generator.randrange(tokens) for _ in range(length)] for length in lengths]
    one_token_each = [[generator.randrange(tokens)] for _ in range(20)]
    rounds = [prompts, one_token_each, prompts[:1], prompts]
    results = run(rounds, tmp_path, **VLLM_DEFAULTS | {"max_num_batched_tokens": 64, "max_num_seqs": 48})["rounds"]
    reference = ReferenceYuan(tmp_path, tokens)
    for requested, answers in zip(rounds, results, strict=True):
        assert largest_difference(reference, requested, answers) < BFLOAT16_TOLERANCE


@requires_gpu
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(VLLM_DEFAULTS, BFLOAT16_TOLERANCE), (FLOAT32_ON_GPUS, TF32_TOLERANCE)],
    ids=["bfloat16, compiled", "float32, eager"],
)
def test_ranks_on_gpus(
    run: Run,
    checkpoint: Path,
    tokens: int,
    prompts: list[list[int]],
    ranks: int,
    options: dict[str, Any],
    tolerance: float,
) -> None:
    """Send all prompts, prefixes that are cached, equal prompts in one step, and two prompts at a time."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"fewer than {ranks} GPUs here")
    rounds = [prompts, prompts, [prompts[4]] * 4, prompts[2:4], prompts[4:6]]
    results = run(rounds, tensor_parallel_size=ranks, **options)["rounds"]
    assert results[1][-1]["cached"] > 0
    reference = ReferenceYuan(checkpoint, tokens)
    for requested, answers in zip(rounds, results, strict=True):
        assert largest_difference(reference, requested, answers) < tolerance


@requires_gpu
@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
@pytest.mark.parametrize(
    ("options", "tolerance"),
    [(VLLM_DEFAULTS, BFLOAT16_TOLERANCE), (FLOAT32_ON_GPUS, TF32_TOLERANCE)],
    ids=["bfloat16, compiled", "float32, eager"],
)
@pytest.mark.parametrize("connector", [OFFLOADING, HAND_OVER], ids=["offloaded", "handed over"])
def test_loaded_blocks_on_a_gpu(
    run: Run,
    checkpoint: Path,
    tokens: int,
    requested: list[list[int]],
    options: dict[str, Any],
    tolerance: float,
    connector: dict[str, Any],
    speculation: dict[str, Any] | None,
) -> None:
    rounds = [requested, requested, *(requested[start : start + 2] for start in range(0, len(requested), 2))]
    result = run(rounds, reset=True, speculative_config=speculation, **options | {"block_size": 32} | connector)
    assert result["loaded_tokens"] > 1000
    reference = ReferenceYuan(checkpoint, tokens)
    for asked, answers in zip(rounds, result["rounds"], strict=True):
        assert largest_difference(reference, asked, answers) < tolerance


@requires_gpu
def test_fp8_weights(run: Run, checkpoint: Path, tokens: int, prompts: list[list[int]]) -> None:
    (answers,) = run([prompts], quantization="fp8", **VLLM_DEFAULTS)["rounds"]
    difference = largest_difference(ReferenceYuan(checkpoint, tokens), prompts, answers)
    assert BFLOAT16_TOLERANCE < difference < FP8_TOLERANCE


@requires_gpu
def test_tokens_are_the_same_after_either_sleep_level(run: Run, prompts: list[list[int]]) -> None:
    first, *later = run([prompts] * 3, sleep=[1, 2], enable_sleep_mode=True, **VLLM_DEFAULTS)["rounds"]
    for answers in later:
        assert [answer["token_ids"] for answer in answers] == [answer["token_ids"] for answer in first]
        assert [answer["cached"] for answer in answers] == [0] * len(prompts)


@requires_gpu
def test_batch_invariance_gives_identical_results_in_any_batch(
    monkeypatch: pytest.MonkeyPatch, run: Run, prompts: list[list[int]]
) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    rounds = [prompts, *alone(prompts)]
    together, *one_by_one = run(rounds, enable_prefix_caching=False, **VLLM_DEFAULTS)["rounds"]
    assert [answers[0] for answers in one_by_one] == together


def test_no_prefix_caching(run: Run, prompts: list[list[int]], expected: list[Continuation]) -> None:
    result = run([prompts, *alone(prompts)], enable_prefix_caching=False)
    together, *one_by_one = result["rounds"]
    assert logprob_difference(together, expected) < TOLERANCE
    assert logprob_difference([answers[0] for answers in one_by_one], expected) < TOLERANCE


def test_prefix_caching(run: Run, prompts: list[list[int]], expected: list[Continuation]) -> None:
    result = run([prompts, prompts, *alone(prompts)], enable_prefix_caching=True)
    first, repeated, *one_by_one = result["rounds"]
    assert logprob_difference(first, expected) < TOLERANCE
    assert logprob_difference(repeated, expected) < TOLERANCE
    assert logprob_difference([answers[0] for answers in one_by_one], expected) < TOLERANCE
    assert [answer["cached"] for answer in first] == [0] * len(LENGTHS)
    assert [answer["cached"] for answer in repeated][-2:] == [96, 320]


def test_prompts_continue_any_cached_block_of_another_prompt(run: Run, checkpoint: Path, tokens: int) -> None:
    generator = random.Random(1)
    prefix = [generator.randrange(tokens) for _ in range(400)]
    prompts = [prefix, [*prefix[:257], 5], [*prefix[:96], 6, 7, 8], prefix[:33], prefix[:320]]
    reference = ReferenceYuan(checkpoint, tokens)
    result = run(alone(prompts), enable_prefix_caching=True)
    answers = [answers[0] for answers in result["rounds"]]
    assert logprob_difference(answers, [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]) < TOLERANCE
    assert [answer["cached"] for answer in answers] == [0, 256, 96, 32, 288]  # the last token is always recomputed


@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
def test_prompts_continue_blocks_that_the_same_step_computes(
    run: Run,
    checkpoint: Path,
    tokens: int,
    prompts: list[list[int]],
    expected: list[Continuation],
    speculation: dict[str, Any] | None,
) -> None:
    """The engine shares a block as soon as its computation is scheduled."""
    longer = [*prompts[4], *prompts[5][:50]]  # three blocks shared with its prefix, a fourth with its copy
    requested = [prompts[4], prompts[4], longer, longer]
    result = run([requested], n=3, max_num_batched_tokens=2048, speculative_config=speculation)
    (answers,) = result["rounds"]
    assert answers[-1]["cached"] == 128
    longer_continuation = ReferenceYuan(checkpoint, tokens).continue_greedily(longer, TOKENS)
    assert logprob_difference(answers, [expected[4]] * 6 + [longer_continuation] * 6) < TOLERANCE


@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
@pytest.mark.parametrize("caching", [False, True])
def test_preempted_requests(
    run: Run, prompts: list[list[int]], expected: list[Continuation], caching: bool, speculation: dict[str, Any] | None
) -> None:
    few_blocks = {"num_gpu_blocks_override": 20, "speculative_config": speculation}
    result = run([prompts * 2], enable_prefix_caching=caching, **few_blocks)
    assert result["preemptions"] > 0
    assert logprob_difference(result["rounds"][0], expected * 2) < TOLERANCE


def test_offloaded_blocks(run: Run, requested: list[list[int]], continuations: list[Continuation]) -> None:
    """Evict all blocks from the cache before each round, also while few blocks make requests wait for each other."""
    rounds = [requested, requested, requested[4:6], requested[6:8], requested[8:]]
    result = run(rounds, install=["memory_offload"], reset=True, num_gpu_blocks_override=20, **OFFLOADING)
    assert result["preemptions"] > 0
    first, again, *pairs = result["rounds"]
    assert logprob_difference(first, continuations) < TOLERANCE
    assert logprob_difference(again, continuations) < TOLERANCE
    for start, answers in zip((4, 6, 8), pairs, strict=True):
        assert logprob_difference(answers, continuations[start : start + 2]) < TOLERANCE
    cached = [answer["cached"] for answers in pairs for answer in answers]
    assert cached == [96, 320, 0, 96, 32]  # a prompt of one block is computed, and of three blocks the last one


def test_offloaded_blocks_with_drafts(
    run: Run, whole_blocks: list[list[int]], expected_of_whole_blocks: list[Continuation]
) -> None:
    result = run(
        [whole_blocks] * 2,
        install=["memory_offload"],
        reset=True,
        speculative_config=DRAFTS,
        max_num_seqs=3,
        **OFFLOADING,
    )
    for answers in result["rounds"]:
        assert logprob_difference(answers, expected_of_whole_blocks) < TOLERANCE
    assert result["loaded_tokens"] == 32 + 96 + 32
    assert 0 < result["accepted"] < result["drafted"]


def test_prompts_that_were_handed_over(run: Run, requested: list[list[int]], continuations: list[Continuation]) -> None:
    result = run([requested, requested, *alone(requested[4:])], reset=True, **HAND_OVER)
    first, again, *one_by_one = result["rounds"]
    assert logprob_difference(first, continuations) < TOLERANCE
    assert logprob_difference(again, continuations) < TOLERANCE
    assert logprob_difference([answers[0] for answers in one_by_one], continuations[4:]) < TOLERANCE
    assert result["loaded_tokens"] == sum(map(len, requested)) + sum(map(len, requested[4:]))


@pytest.mark.parametrize("speculation", [None, DRAFTS], ids=["plain", "drafts"])
def test_prompts_that_nixl_hands_over_to_another_engine(
    checkpoint: Path,
    tokens: int,
    requested: list[list[int]],
    speculation: dict[str, Any] | None,
) -> None:
    """Prefill in one engine and decode in another; `pip install nixl` to run this, on a CPU or a GPU."""
    pytest.importorskip("nixl", reason="NIXL is not installed")
    on_gpu = torch.cuda.is_available()
    engine = (
        ENGINE | {"model": str(checkpoint), "speculative_config": speculation} | (FLOAT32_ON_GPUS if on_gpu else {})
    )
    engine["kv_transfer_config"] = HAND_OVER["kv_transfer_config"]
    with started_engine(engine) as prefill, started_engine(engine) as decode:
        prefilled = ask(prefill, prompts=requested, transfers=[None] * len(requested), tokens=1)
        decoded = ask(decode, prompts=requested, transfers=prefilled["transfers"], tokens=TOKENS)
    tolerance = TF32_TOLERANCE if on_gpu else TOLERANCE
    assert largest_difference(ReferenceYuan(checkpoint, tokens), requested, decoded["answers"]) < tolerance
    assert decoded["loaded_tokens"] == sum(map(len, requested))


def test_accepted_and_rejected_drafts(run: Run, checkpoint: Path, tokens: int) -> None:
    generator = random.Random(2)
    prompts = [[generator.randrange(tokens) for _ in range(length)] * 5 for length in (1, 3, 7, 12)]
    result = run([prompts, prompts, *alone(prompts)], speculative_config=DRAFTS)
    reference = ReferenceYuan(checkpoint, tokens)
    expected = [reference.continue_greedily(prompt, TOKENS) for prompt in prompts]
    first, repeated, *one_by_one = result["rounds"]
    for answers in (first, repeated, [answers[0] for answers in one_by_one]):
        assert logprob_difference(answers, expected) < TOLERANCE
    assert 0 < result["accepted"] < result["drafted"]


@pytest.mark.parametrize(
    ("types", "tolerance"),
    [({"dtype": "bfloat16"}, BFLOAT16_TOLERANCE), ({"kv_cache_dtype": "fp8"}, 1.0)],  # 0.45 was measured for fp8
    ids=["bfloat16", "fp8 cache"],
)
def test_rounded_types(
    run: Run, checkpoint: Path, tokens: int, prompts: list[list[int]], types: dict[str, Any], tolerance: float
) -> None:
    (answers,) = run([prompts], **types)["rounds"]
    assert largest_difference(ReferenceYuan(checkpoint, tokens), prompts, answers) < tolerance


@pytest.mark.parametrize("parallel", PARALLEL.values(), ids=PARALLEL)
def test_parallel_ranks(
    monkeypatch: pytest.MonkeyPatch,
    run: Run,
    checkpoint: Path,
    tokens: int,
    prompts: list[list[int]],
    expected: list[Continuation],
    parallel: dict[str, Any],
) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # otherwise vLLM requires a NUMA node per process
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    repeated = prompts[3][:7] * 5
    requested = [*prompts, prompts[4], repeated]
    result = run([requested, requested], max_num_batched_tokens=600, **parallel)
    continuations = [*expected, expected[4], ReferenceYuan(checkpoint, tokens).continue_greedily(repeated, TOKENS)]
    for answers, cached in zip(result["rounds"], ([0, 0, 96, 0], [96, 320, 96, 32]), strict=True):
        assert logprob_difference(answers, continuations) < TOLERANCE
        assert [answer["cached"] for answer in answers[4:]] == cached
    assert (0 < result["accepted"] < result["drafted"]) == ("speculative_config" in parallel)


@pytest.mark.parametrize("layout", ["safetensors", "sharded safetensors", "bin", "sharded bin"])
def test_every_published_file_layout_loads(
    run: Run, demo: Path, prompts: list[list[int]], expected: list[Continuation], tmp_path: Path, layout: str
) -> None:
    shard, file_format = ("1MB" if "sharded" in layout else "1GB"), layout.split()[-1]
    write_checkpoint(
        tmp_path / "model", demo, SIZES, seed=7, dtype=torch.float32, file_format=file_format, max_shard_size=shard
    )
    assert (len(list((tmp_path / "model").glob(f"*.{file_format}"))) > 1) == ("sharded" in layout)
    result = run([prompts[:4]], model=tmp_path / "model")
    assert logprob_difference(result["rounds"][0], expected[:4]) < TOLERANCE


def test_a_stored_head_overrides_a_tied_embedding(
    run: Run, checkpoint: Path, tokens: int, prompts: list[list[int]], tmp_path: Path
) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["lm_head.weight"].flip(1).contiguous()
    save_file(stored, tmp_path / "model.safetensors")
    reference = ReferenceYuan(tmp_path, tokens)
    result = run([prompts[:4]], model=tmp_path)
    answers = [reference.continue_greedily(prompt, TOKENS) for prompt in prompts[:4]]
    assert logprob_difference(result["rounds"][0], answers) < TOLERANCE


def test_an_untied_head(run: Run, demo: Path, tokens: int, prompts: list[list[int]], tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model", demo, SIZES | {"tie_word_embeddings": False}, seed=7, dtype=torch.float32)
    result = run([prompts[:4]], model=tmp_path / "model")
    reference = ReferenceYuan(tmp_path / "model", tokens)
    answers = [reference.continue_greedily(prompt, TOKENS) for prompt in prompts[:4]]
    assert logprob_difference(result["rounds"][0], answers) < TOLERANCE


def test_a_checkpoint_with_a_missing_weight_is_rejected(run: Run, checkpoint: Path, tmp_path: Path) -> None:
    for file in checkpoint.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    stored = load_file(tmp_path / "model.safetensors")
    del stored["model.layers.1.self_attn.lf_gate.conv2.bias"]
    save_file(stored, tmp_path / "model.safetensors")
    assert "the checkpoint lacks model.layers.1.self_attn.lf_gate.conv2.bias" in run([], model=tmp_path)["error"]
