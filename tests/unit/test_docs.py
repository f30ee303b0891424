"""The documentation: links, the index, generated pages and pictures, and what the two languages share."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import diagrams
import links
import option_tables
import outside_links
import plots
import pytest
import text_pages
import translations
import words

pytestmark = pytest.mark.timeout(60)  # runs git, and draws the pictures

REPOSITORY = Path(__file__).parents[2]
DOCS = REPOSITORY / "docs"


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings from the environment, which are defaults of the parsers."""
    for name in ("YUAN_GRPC_ADDRESS", "YUAN_GRPC_PORT"):
        monkeypatch.delenv(name, raising=False)


def test_no_link_is_broken() -> None:
    assert [line for file in links.markdown_files() for line in links.broken_links(file)] == []


def test_a_broken_link_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(links, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# A heading: `code`\n\n## 中文，标题\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](other.md#a-heading-code) [b](other.md#中文标题) [c](gone.md) [d](other.md#gone) `[e](code.md)`\n"
    )
    assert list(links.broken_links(page)) == [
        "page.md: gone.md does not exist",
        "page.md: other.md has no heading #gone",
    ]


def test_the_index_has_each_page() -> None:
    listed = [name for _, names in text_pages.toctrees(DOCS) for name in names]
    pages = {str(page.relative_to(DOCS).with_suffix("")) for page in text_pages.pages(DOCS)}
    assert len(listed) == len(set(listed))
    assert {name for name in pages if not name.startswith(("decisions/0", "upstream/"))} == {*listed, "index"}
    table = (DOCS / "decisions/README.md").read_text("utf-8")
    assert not [name for name in pages if name.startswith("decisions/0") and f"({name[10:]}.md)" not in table]


def test_each_page_has_a_title_and_a_summary_in_the_list_for_language_models() -> None:
    text = text_pages.llms_txt(DOCS)
    entries = re.findall(r"^- \[(.+)\]\((.+)\): (.+)$", text, re.MULTILINE)
    assert len(entries) == text.count("\n- ")
    assert {"Quickstart", "从原版迁移"} <= {title for title, _, _ in entries}
    assert all((DOCS / page).is_file() for _, page, _ in entries)


@pytest.mark.parametrize("file", [file.name for file in option_tables.pages()])
def test_the_reference_of_options_is_that_of_the_parsers(file: str) -> None:
    text = {page.name: text for page, text in option_tables.pages().items()}[file]
    assert (DOCS / "reference" / file).read_text("utf-8") == text, "run 'make docs-reference'"


@pytest.mark.parametrize("name", [*diagrams.all_diagrams(), *plots.all_plots()])
def test_each_picture_is_what_its_script_draws(name: str) -> None:
    drawn = diagrams.all_diagrams() | plots.all_plots()
    assert (DOCS / "pictures" / name).read_text("utf-8") == drawn[name], "run 'make pictures'"


def test_a_plot_has_the_figures_of_the_report() -> None:
    assert all(f">{figure}<" in plots.all_plots()["decode.svg"] for figure in ("476", "16,960", "32,499"))


def test_links_to_files_outside_lead_to_the_repository_or_name_the_path() -> None:
    page, home = DOCS / "call/go.md", "https://example.com/a"
    text = "[programs](../../clients/README.md#go) [API](../reference/api.md) ![x](../pictures/lfa.svg)"
    assert outside_links.rewrite(text, page, REPOSITORY, home).startswith(
        "[programs](https://example.com/a/blob/main/clients/README.md#go) [API](../reference/api.md) ![x]"
    )
    assert outside_links.rewrite(text, page, REPOSITORY, "").startswith("programs (`clients/README.md`) [API](")


@pytest.mark.parametrize(
    "file",
    [
        *("docs/call/go.md", "docs/call/java.md", "docs/call/node.md"),
        *("clients/examples/go/main.go", "clients/examples/node/grpc.js"),
    ],
)
def test_the_service_config_of_a_page_or_an_example_is_that_of_the_client(file: str) -> None:
    text = (REPOSITORY / file).read_text("utf-8")
    start = re.search(r'\{\s*"loadBalancingConfig"', text)
    assert start
    config, _ = json.JSONDecoder().raw_decode(text, start.start())
    assert config == json.loads((REPOSITORY / "clients/service_config.json").read_text("utf-8"))


def code_of(page: Path) -> list[str]:
    """Return the fenced and indented code of a page, without comments and the frame of its first diagram."""
    text = re.sub(r" +# .*", "", page.read_text("utf-8"))
    fenced = re.findall(r"^```(?:sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return fenced + re.findall(r"(?:(?<=\n\n)(?:    [^\n]*\n)+)", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


@pytest.mark.parametrize("translation", translations.translations(), ids=lambda one: one.page.name)
def test_a_translation_has_no_code_that_its_original_lacks(translation: translations.Translation) -> None:
    original = code_of(translation.original)
    assert not [code for code in code_of(translation.page) if code not in original]
    link = re.compile(rf"\]\([^)]*{re.escape(translation.page.name)}\)")
    assert link.search(translation.original.read_text("utf-8")), "the original must link to its translation"


def test_a_translation_is_outdated_when_the_words_of_its_original_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(translations, "ROOT", tmp_path)
    (tmp_path / "docs/zh").mkdir(parents=True)
    original, page = tmp_path / "docs/a.md", tmp_path / "docs/zh/a.md"
    original.write_text("# A\n\none two\n")
    page.write_text("<!-- docs/a.md 000000000000 -->\n\n# 甲\n")
    (tmp_path / "README.zh.md").write_text("# 无\n")
    assert translations.main([]) == 1
    assert "docs/zh/a.md is older than docs/a.md" in capsys.readouterr().out
    assert translations.main(["--accept", "docs/zh/a.md"]) == 0
    original.write_text("# A\n\none\ntwo\n")
    assert translations.main([]) == 0
    original.write_text("# A\n\none three\n")
    assert translations.main([]) == 1


def test_each_translation_names_an_original() -> None:
    pages = {one.page.name for one in translations.translations()}
    assert pages >= {
        "README.zh.md",
        "quickstart.md",
        "real-model.md",
        "humaneval.md",
        "migrate.md",
        "troubleshooting.md",
    }
    assert all(one.original.is_file() for one in translations.translations())


TEXT = "调小 KV 缓存, `--kv-cache-memory-bytes 4G`（默认九成）; the engine's 2B, 源2.0 啊"


def test_chinese_is_searched_by_pairs_of_characters() -> None:
    assert words.split("显存不足 KV_cache 啊") == ["显存", "存不", "不足", "KV_cache", "啊"]


def test_a_query_is_split_like_the_pages() -> None:
    if (node := shutil.which("node")) is None:
        pytest.skip("Node is not installed")
    script = f"{words.JAVASCRIPT}; console.log(JSON.stringify(splitQuery({json.dumps(TEXT)})))"
    done = subprocess.run([node, "-e", script], check=True, capture_output=True, text=True)
    assert json.loads(done.stdout) == words.split(TEXT)
