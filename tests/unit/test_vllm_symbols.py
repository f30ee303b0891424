"""The table of symbols, and the look-ups in the source from which it is written."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from upgrade import table
from upgrade.__main__ import REPOSITORY, installed_source, print_changes
from upgrade.source import VllmSource
from upgrade.symbols import Use, find_uses

pytestmark = pytest.mark.timeout(60)  # reads some hundred files

PACKAGE = {
    "__init__.py": "from .parts import *\nfrom .parts import _private as renamed\nTABLE = {'Late': '.lazy:Late'}\n"
    "def __getattr__(name): ...\n",
    "_version.py": "version: str\nversion = '1.0'\n",
    "parts.py": "class Base:\n    def run(self, x: int, *, flag=False): ...\n"
    "class Part(Base):\n    size: int\n    def __init__(self):\n        self.late = 1\ndef _private(): ...\n",
    "lazy.py": "class Late:\n    field: int\n    other: str = ''\n",
}
USER = """
from vllm import Part, parts
from vllm.parts import Base

TARGETS = {"vllm.parts:Base.run": "self, x, ..."}

class Own(Base):
    def run(self, x): ...
    def new(self): ...

def apply():
    parts._private = None
    Part.added = Part.size
"""


@pytest.fixture
def source(tmp_path: Path) -> VllmSource:
    """A package with the ways in which vLLM defines and exports names."""
    return write_package(tmp_path / "vllm")


def write_package(folder: Path, **replaced: str) -> VllmSource:
    """Write the package; `replaced` has other contents of modules."""
    folder.mkdir(parents=True)
    for name, text in PACKAGE.items():
        (folder / name).write_text(replaced.get(name.removesuffix(".py"), text))
    return VllmSource(folder)


@pytest.mark.skipif(find_spec("vllm") is None, reason="needs the source of vLLM")
def test_the_table_is_that_of_the_code() -> None:
    written = (REPOSITORY / table.PATH).read_text()
    assert written == table.render(find_uses(REPOSITORY, installed_source())), "run `make vllm-symbols`"


@pytest.mark.parametrize(
    ("symbol", "module", "signature"),
    [
        ("vllm:Part", "vllm.parts", "self"),
        ("vllm:Part.run", "vllm.parts", "self, x, *, flag=False"),
        ("vllm:Part.late", "vllm.parts", ""),
        ("vllm:renamed", "vllm.parts", ""),
        ("vllm:Late", "vllm.lazy", "field, other"),
        ("vllm:parts.Base", "vllm.parts", ""),
        ("vllm.parts", "vllm.parts", ""),
    ],
)
def test_a_symbol_is_found_where_it_is_defined(source: VllmSource, symbol: str, module: str, signature: str) -> None:
    found = source.find(symbol)
    assert found is not None
    assert (found.module, found.signature) == (module, signature)


@pytest.mark.parametrize("symbol", ["vllm:gone", "vllm:Part.gone", "vllm.gone:Part", "vllm.gone", "vllm:renamed.gone"])
def test_a_symbol_that_is_gone_is_not_found(source: VllmSource, symbol: str) -> None:
    assert source.find(symbol) is None


def test_imports_overrides_and_replacements_are_found(source: VllmSource, tmp_path: Path) -> None:
    (tmp_path / "yuan_grpc").mkdir()
    (tmp_path / "yuan_grpc" / "user.py").write_text(USER)
    found = {(use.symbol, use.kind, use.is_private) for use in find_uses(tmp_path, source)}
    assert found == {
        ("vllm:Part", "import", False),
        ("vllm.parts", "import", False),
        ("vllm.parts:Base", "import", False),
        ("vllm.parts:Base.run", "override", False),
        ("vllm.parts:Base.run", "replace", False),
        ("vllm.parts:_private", "replace", True),
        ("vllm:Part.added", "add", False),
        ("vllm:Part.size", "attribute", False),
    }


def test_changes_between_versions_are_printed(
    source: VllmSource, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = PACKAGE["parts" + ".py"].replace("x: int", "x: int, y").replace("def _private(): ...", "")
    newer = write_package(tmp_path / "new" / "vllm", parts=changed, _version="version = '2.0'\n")
    uses = [Use(symbol, "import", "") for symbol in ("vllm.parts:Base.run", "vllm:renamed", "vllm:Late")]
    assert print_changes(uses, source, newer) == 1
    assert capsys.readouterr().out == (
        "\ngone, 1.0 -> 2.0:\n  vllm:renamed\n"
        "\nother parameters or fields, 1.0 -> 2.0:\n"
        "  vllm.parts:Base.run: + y\n"
        "\nother code, 1.0 -> 2.0:\n  none\n"
    )


def test_other_comments_and_docstrings_are_no_change(source: VllmSource, tmp_path: Path) -> None:
    commented = PACKAGE["lazy.py"].replace("class Late:", "class Late:  # late\n    'Text'")
    newer = write_package(tmp_path / "new" / "vllm", lazy=commented)
    assert source.find("vllm:Late") == newer.find("vllm:Late")
