"""The report in a real browser: what a reader sees, and what the text of a hostile model cannot do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Page, open_page

from yuan_grpc.humaneval.records import Record, Run
from yuan_grpc.humaneval.report.page import render_page
from yuan_grpc.humaneval.report.scored_run import ScoredRun, ScoredSample

pytestmark = [pytest.mark.slow, pytest.mark.timeout(60)]  # a browser takes seconds to start

HOSTILE = (
    "</pre></code></summary></details></style></title><script>document.title = 'hacked'</script>"
    '<img src="http://127.0.0.1:9/x" onerror="document.title = 1"><style>body{display:none}</style>'
    "\"'><svg onload=document.title=2></svg> ]]> <!-- <a href=javascript:document.title=3>x</a> &lt;b&gt; "
    "\u202e \0 \ud800"
)
VISIBLE = HOSTILE.replace("\u202e", "\\u202e").replace("\0", "\\x00").replace("\ud800", "\\ud800")
CODE = f"def f(x):\n\treturn x  # {HOSTILE}\n"
TASKS = {f"HumanEval/{i}": f"def f(x):  # {HOSTILE}" for i in range(163)} | {HOSTILE: HOSTILE}


def make_run(prompts: dict[str, str] = TASKS) -> ScoredRun:
    """Return a run whose every text is hostile, and in which a third of the tasks failed."""
    request = {"max_tokens": 512, "stop": [HOSTILE]}
    run = Run({"name": HOSTILE, "dtype": HOSTILE}, request, 1, None, prompts, HOSTILE, HOSTILE)
    passed = {task_id: i % 3 > 0 and task_id != HOSTILE for i, task_id in enumerate(prompts)}
    rate = sum(passed.values()) / len(prompts)
    scores = {
        "pass@": {"1": rate},
        "tasks": {task_id: (1, int(success)) for task_id, success in passed.items()},
        "kinds": {HOSTILE: 1, "passed": sum(passed.values())},
    }
    records = [
        Record(task_id, 0, CODE, "stop", HOSTILE, prompt_tokens=50 + 3 * i, completion_tokens=i, seconds=1.0)
        for i, task_id in enumerate(prompts)
    ]
    samples = [
        ScoredSample(
            record, name, CODE, "passed" if passed[record.task_id] else f"failed: {HOSTILE}", f"E{HOSTILE}", (5, 4, 2)
        )
        for name in ("rules", "plain")
        for record in records
    ]
    tests = dict.fromkeys(prompts, f"assert f(1) == 2  # {HOSTILE}")
    extractions = {"extractions": {"rules": scores, "plain": scores}}
    return ScoredRun(run, records, extractions | {"isolated": True, "seconds": 3.0, "python": HOSTILE}, samples, tests)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    folder = tmp_path_factory.mktemp("report")
    (folder / "report.html").write_text(render_page(make_run()), "utf-8")
    with open_page(folder / "report.html", folder / "profile") as page:
        yield page


def test_the_headline_and_the_published_scores_are_shown(tmp_path: Path) -> None:
    scored = make_run(dict.fromkeys([f"HumanEval/{i}" for i in range(164)], "def f():"))
    (tmp_path / "report.html").write_text(render_page(scored), "utf-8")
    with open_page(tmp_path / "report.html", tmp_path / "profile") as page:
        assert page.evaluate("document.querySelector('.headline').innerText").startswith("66.5 %")
        assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('.headline')).fontSize)") > 40
        rows = page.evaluate("[...document.querySelectorAll('.chart')[0].children].map(row => row.innerText)")
    assert [row.split("\n")[0] for row in rows[:2]] == ["this run, rules", "this run, plain"]
    assert rows[4:8] == [
        "Yuan2.0-2B Februa\n62.8 % (+3.7)",
        "Yuan2.0-51B\n66.5 % (0.0)",
        "Yuan2.0-102B\n67.1 % (−0.6)",
        "Yuan2.0-102B, self-consistency\n77.4 % (−10.9)",
    ]


def test_a_failed_task_opens_on_click(page: Page) -> None:
    page.resize(1000)
    task = "document.querySelector('.body').parentElement"
    assert page.evaluate(f"{task}.open") is False
    assert "Expectation" not in page.evaluate(f"{task}.innerText")
    page.click("details > summary")
    assert page.evaluate(f"{task}.open") is True
    text = page.evaluate(f"{task}.innerText")
    for part in ("Expectation", "assert f(1) == 2", "Error", "Code", "return x"):
        assert part in text
    page.click("details > summary")
    assert page.evaluate(f"{task}.open") is False


def test_hostile_text_is_shown_as_text(page: Page) -> None:
    assert page.evaluate("document.title") == f"HumanEval: {VISIBLE}"
    assert page.evaluate("document.querySelectorAll('script, img, a, iframe, object, link, body style').length") == 0
    assert (
        page.evaluate(
            "[...document.querySelectorAll('*')].filter(e => [...e.attributes].some(a => "
            "/^on|^style$/.test(a.name))).length"
        )
        == 0
    )
    codes = page.evaluate("[...document.querySelectorAll('pre')].map(e => e.textContent)")
    assert codes.count(f"def f(x):\n\treturn x  # {VISIBLE}\n") == 2 * 56  # the program and the text as generated
    assert VISIBLE in page.evaluate("document.body.textContent")


def test_the_policy_forbids_scripts_and_requests(page: Page) -> None:
    page.evaluate(
        "{const s = document.createElement('script'); s.textContent = 'window.hacked = 1'; document.body.append(s)}"
    )
    page.evaluate(
        "{const s = document.createElement('style'); s.textContent = 'body{color:red}'; document.body.append(s)}"
    )
    page.evaluate("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x'}))")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"
    page.evaluate("document.querySelectorAll('script, img, body style').forEach(e => e.remove())")
    requests = [e["params"]["request"]["url"] for e in page.events if e["method"] == "Network.requestWillBeSent"]
    blocked = [e["params"]["blockedReason"] for e in page.events if e["method"] == "Network.loadingFailed"]
    assert [url for url in requests if not url.startswith("file:")] == ["http://127.0.0.1:9/x"] * len(blocked)
    assert set(blocked) <= {"csp"}


@pytest.mark.parametrize("width", [375, 1000])
def test_every_width_shows_the_whole_page_and_bars_to_scale(page: Page, width: int) -> None:
    page.resize(width)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    bars = page.evaluate(
        "[...document.querySelectorAll('.chart')].map(c => [...c.querySelectorAll('svg')].map(s => ["
        "s.getBoundingClientRect().x, s.getBoundingClientRect().width, s.querySelector('.fill').getBoundingClientRect()"
        ".width, parseFloat(s.getAttribute('aria-label').match(/: ([\\d.]+) %/)[1])]))"
    )
    assert [len(chart) for chart in bars] == [2, 8, 8]
    for chart in bars:
        (scale,) = {(x, full) for x, full, _, _ in chart}  # the same axis in each row
        for _, full, filled, percent in chart:
            assert filled == pytest.approx(full * percent / 100, abs=full / 1000 + 0.1)
        ticks = page.evaluate(
            "[...document.querySelector('.chart .axis').children].map(t => [t.getBoundingClientRect().x, t.innerText])"
        )
        assert [text for _, text in ticks] == ["0", "25", "50", "75", "100 %"]
        assert scale[1] > 200


def test_colors_follow_the_preferred_scheme(page: Page) -> None:
    def contrast(selector: str, background: str = "document.body") -> float:
        colors = page.evaluate(
            f"[document.querySelector({selector!r}), {background}].map((e, i) => "
            "getComputedStyle(e)[i ? 'backgroundColor' : 'color'].match(/\\d+/g).map(Number))"
        )
        values = [
            [c / 3294.6 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color[:3]] for color in colors
        ]
        light, dark = sorted((0.2126 * r + 0.7152 * g + 0.0722 * b for r, g, b in values), reverse=True)
        return float((light + 0.05) / (dark + 0.05))

    backgrounds = set()
    for is_dark in (False, True):
        page.resize(1000, dark=is_dark)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for selector in (".headline", ".soft", ".kind", ".message", ".value", ".label"):
            assert contrast(selector) > 4.5, (selector, is_dark)  # the minimum of WCAG AA
    assert len(backgrounds) == 2
