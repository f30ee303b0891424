"""Configuration of the documentation's site, which `make docs` builds with Sphinx."""

import os
import re
import sys
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "docs" / "tools"))

import outside_links
import search_words
import text_pages

project = "yuan-grpc"
version = re.search(r'^version = "(.+?)"', (ROOT / "pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]
release = version
html_title = f"yuan-grpc {version}"

extensions = ["myst_parser"]
source_suffix = {".md": "markdown"}
root_doc = "index"
exclude_patterns = ["tools"]
myst_heading_anchors = 4
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
html_theme_options = {"navigation_with_keys": True}
html_search_language = search_words.register()

_HOME = os.environ.get("YUAN_GRPC_HOME_URL", "").removesuffix("/").removesuffix(".git")


def _rewrite_source(app: Sphinx, name: str, source: list[str]) -> None:
    is_listed = not name.startswith(
        ("decisions/0", "upstream/")
    )  # tables and texts list them, and a sidebar would be full
    head = "" if is_listed else "---\norphan: true\n---\n\n"
    source[0] = head + outside_links.rewrite(source[0], Path(app.env.doc2path(name)), ROOT, _HOME)


def _set_head(app: Sphinx, name: str, template: str, context: dict[str, Any], doctree: Any) -> None:
    context["language"] = "zh-CN" if name.startswith("zh/") else "en"
    link = f'<link rel="alternate" type="text/markdown" href="{name.rpartition("/")[2]}.md">'
    context["metatags"] = context.get("metatags", "") + link


def _write_text_pages(app: Sphinx, error: Exception | None) -> None:
    if error is None:
        text_pages.write(Path(app.srcdir), Path(app.outdir))


def setup(app: Sphinx) -> None:
    """Connect the steps that Sphinx has no option for."""
    app.connect("source-read", _rewrite_source)
    app.connect("html-page-context", _set_head)
    app.connect("build-finished", _write_text_pages)
