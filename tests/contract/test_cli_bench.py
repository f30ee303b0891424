"""`yuan-grpc bench` with arrivals at a rate, its files, and the comparison of two runs."""

import asyncio
import csv
import io
import json
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeEngine, last, more
from servers import serve_grpc

from yuan_grpc.__main__ import main
from yuan_grpc.cli.load_generator import METRICS
from yuan_grpc.server.engine.types import EngineRequest, StepOutput

Captured = pytest.CaptureFixture[str]
SIZES = ("--prompt-tokens", "4", "--max-tokens", "4")


class FourTokenEngine(FakeEngine):
    """Generates four tokens, one per step. Keeps the highest number of running requests."""

    def __init__(self) -> None:
        super().__init__(more("a"), more("b"), more("c"), last("d"))
        self.most = 0

    async def generate(
        self, request: EngineRequest, *, stream: bool, deadline: asyncio.Event | None = None
    ) -> AsyncGenerator[StepOutput, None]:
        async for output in super().generate(request, stream=stream, deadline=deadline):
            self.most = max(self.most, self.running)
            await asyncio.sleep(0)
            yield output


async def bench(*arguments: str, engine: FakeEngine | None = None) -> int:
    async with serve_grpc(engine or FourTokenEngine()) as address:
        return await asyncio.to_thread(main, ["bench", *SIZES, *arguments, "--address", address])


def compare(*paths: Path) -> int:
    return main(["bench", "compare", *map(str, paths)])


async def test_requests_arrive_at_each_rate(capsys: Captured) -> None:
    engine = FourTokenEngine()
    rates = ("--request-rate", "200,400.5", "--burstiness", "inf", "--requests", "8", "--max-concurrency", "1")
    assert await bench(*rates, "--json", engine=engine) == 0
    first, second = json.loads(capsys.readouterr().out)["levels"]
    assert (first["label"], first["request_rate"], first["concurrency"]) == ("200", 200, 1)
    assert (second["label"], second["request_rate"], second["requests"]) == ("400.5", 400.5, 8)
    assert first["seconds"] >= 7 / 200
    assert engine.most == 1


async def test_a_ramp_is_one_level(capsys: Captured) -> None:
    ramp = ("--ramp-up-strategy", "linear", "--ramp-up-start-rps", "100", "--ramp-up-end-rps", "400")
    assert await bench(*ramp, "--requests", "8") == 0
    titles, row = capsys.readouterr().out.splitlines()[-2:]
    assert titles.split()[0] == "rate"
    assert row.split()[:3] == ["100-400", "8", "0"]


async def test_the_table_has_the_metrics_and_the_goodput_that_were_asked_for(capsys: Captured) -> None:
    metrics = ("--percentile-metrics", "tpot,e2el,ttft", "--goodput", "ttft:100000", "e2el:0.000001")
    assert await bench(*metrics, "--concurrency", "2", "--requests", "4") == 0
    _, _, *lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:2]] == [["TPOT", "(ms)", "E2EL", "(ms)"], ["TTFT", "(ms)"]]
    assert [len(line.split()) for line in lines[3:5]] == [11, 3]
    assert lines[5] == "     goodput: 0.00 req/s, 0% of successful requests (ttft:100000 e2el:1e-06)"
    assert max(map(len, lines)) <= 80


async def test_files_have_the_results_in_the_format_of_their_suffix(tmp_path: Path, capsys: Captured) -> None:
    paths = {suffix: tmp_path / f"run.{suffix}" for suffix in ("json", "csv", "html")}
    outputs = [argument for path in paths.values() for argument in ("--output", str(path))]
    levels = ("--concurrency", "1,2", "--requests", "6", "--goodput", "ttft:100000")
    assert await bench(*levels, *outputs) == 0
    assert "TTFT" in capsys.readouterr().out
    document = json.loads(paths["json"].read_text())
    first = document["levels"][0]
    assert [level["good_requests"] for level in document["levels"]] == [6, 6]
    for metric in METRICS:
        times = first[f"{metric}_seconds"]
        assert 0 < times["p50"] <= times["p90"] <= times["p99"]
    assert first["ttft_seconds"]["p50"] + 3 * first["tpot_seconds"]["p50"] <= 3 * first["e2el_seconds"]["p99"]
    rows = list(csv.DictReader(io.StringIO(paths["csv"].read_text())))
    assert [(row["label"], row["requests"], row["errors"]) for row in rows] == [("1", "6", "0"), ("2", "6", "0")]
    assert float(rows[0]["e2el_p99_seconds"]) == first["e2el_seconds"]["p99"]
    page = ET.fromstring(paths["html"].read_text().partition("<body>")[2].partition("</body>")[0].join(("<b>", "</b>")))
    assert len(page.findall("figure/svg")) == 5
    assert len(page.findall("figure/svg/circle")) == 2 + 4 * 3 * 2
    assert [row.findtext("td") for row in page.iter("tr")][1:] == ["1", "2"]


async def test_a_page_has_no_markup_of_the_server(tmp_path: Path) -> None:
    engine = FourTokenEngine()
    engine.info = replace(engine.info, name="<script>alert(1)</script>")
    path = tmp_path / "run.html"
    assert await bench("--concurrency", "1", "--requests", "1", "-o", str(path), engine=engine) == 0
    assert "<script" not in path.read_text()
    assert "http" not in path.read_text()


def write_run(path: Path, **changes: Any) -> Path:
    """Write a run of one level that `changes` describe."""
    times = {f"{metric}_seconds": {"mean": 0.1, "p50": 0.1, "p90": 0.2, "p99": None} for metric in METRICS}
    level = {"label": "8", "concurrency": 8, "errors": {}, "requests_per_second": 2.0, "output_tokens_per_second": 10.0}
    run = {"model": "m", "max_tokens": 64, "levels": [{**level, **times, **changes}]}
    path.write_text(json.dumps(run))
    return path


def test_a_comparison_has_both_values_and_their_ratio(tmp_path: Path, capsys: Captured) -> None:
    first = write_run(tmp_path / "a.json")
    second = write_run(tmp_path / "b.json", requests_per_second=3.0, errors={"INTERNAL": 2})
    assert compare(first, second) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"A: {first} (m, no date)"
    rows = {line[:24].strip(): line[24:].split() for line in lines[3:]}
    assert rows["concurrency 8"] == []
    assert rows["requests/s"] == ["2.00", "3.00", "1.50x"]
    assert rows["errors"] == ["0", "2", "-"]
    assert rows["TTFT p90 (ms)"] == ["200.00", "200.00", "1.00x"]
    assert "TTFT p99 (ms)" not in rows
    assert max(map(len, lines[2:])) <= 80


@pytest.mark.parametrize(("no_color", "codes"), [("", ["31", "32"]), ("1", [])])
def test_a_notable_ratio_is_red_or_green(
    no_color: str, codes: list[str], tmp_path: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_COLOR", no_color)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    rates = {"requests_per_second": 1.0, "output_tokens_per_second": 20.0}
    assert compare(write_run(tmp_path / "a.json"), write_run(tmp_path / "b.json", **rates)) == 0
    assert re.findall(r"\x1b\[(3\d)m", capsys.readouterr().out) == codes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must be JSON of bench"),
        ("[]", "must be JSON of bench, which has `model` and `levels`"),
        ('{"model": "m", "levels": [1]}', "must be JSON of bench, which has `model` and `levels`"),
        ('{"model": "m", "levels": []}', "the runs must have a level in common"),
    ],
)
def test_a_file_that_cannot_be_compared_is_a_usage_error(
    text: str, message: str, tmp_path: Path, capsys: Captured
) -> None:
    (tmp_path / "b.json").write_text(text)
    assert compare(write_run(tmp_path / "a.json"), tmp_path / "b.json") == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--request-rate", "1", "--concurrency", "2"), "--concurrency, --request-rate and --ramp-up-strategy"),
        (("--ramp-up-start-rps", "1"), "--ramp-up-strategy, --ramp-up-start-rps and --ramp-up-end-rps must be set"),
        (("--output", "/nowhere/run.csv"), "the folder of /nowhere/run.csv must exist"),
    ],
)
async def test_an_invalid_load_is_a_usage_error(options: tuple[str, ...], message: str, capsys: Captured) -> None:
    assert await bench(*options) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--request-rate", "0"), "must be a number above 0, not '0'"),
        (("--request-rate", "inf"), "must be finite"),
        (("--goodput", "latency:5"), "must be one of ttft, tpot, itl, e2el, not 'latency'"),
        (("--output", "run.txt"), "must end with .json, .csv, .html, not 'run.txt'"),
    ],
)
def test_an_invalid_value_is_rejected_with_its_rule(options: tuple[str, ...], message: str, capsys: Captured) -> None:
    with pytest.raises(SystemExit):
        main(["bench", *options])
    assert message in capsys.readouterr().err
