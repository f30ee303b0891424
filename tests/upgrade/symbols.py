"""The symbols of vLLM that this package imports, overrides and replaces, read from its source."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from upgrade.source import VllmSource

PACKAGE = "yuan_grpc"
TARGETS = "TARGETS"
"""Name of the constant with which a module checks what it replaces; see `yuan_grpc.vllm_check`."""


@dataclass(frozen=True, order=True)
class Use:
    """One use of a symbol.

    Attributes:
        symbol: `module:qualified.name`, or a module.
        kind: "import", "attribute", "override", "replace", or "add" for an attribute that vLLM does not have.
        file: the file of this package, relative to the repository.
    """

    symbol: str
    kind: str
    file: str

    @property
    def is_private(self) -> bool:
        """Whether a part of the name begins with one underscore."""
        parts = self.symbol.replace(":", ".").split(".")
        return any(part.startswith("_") and not part.endswith("__") for part in parts)


def find_uses(repository: Path, source: VllmSource) -> list[Use]:
    """Return all uses in the package, sorted.

    Args:
        repository: the folder of the repository.
        source: the vLLM that the package is used with. Modules and overridden methods are looked up there.
    """
    uses: set[Use] = set()
    for path in sorted((repository / PACKAGE).rglob("*.py")):
        tree = ast.parse(path.read_text())
        if "vllm" in path.read_text():
            uses.update(_File(tree, str(path.relative_to(repository)), source).uses())
    return sorted(uses)


class _File:
    def __init__(self, tree: ast.Module, name: str, source: VllmSource) -> None:
        self._tree = tree
        self._name = name
        self._source = source
        self._imported = dict(self._imports())

    def uses(self) -> Iterator[Use]:
        replaced = {*self._replaced(), *self._targets()}
        for symbol in replaced:
            yield Use(symbol, "replace" if self._source.find(symbol) else "add", self._name)
        for symbol in self._imported.values():
            yield Use(symbol, "import", self._name)
        for symbol in {*self._attributes()} - replaced:
            yield Use(symbol, "attribute", self._name)
        for symbol in self._overrides():
            yield Use(symbol, "override", self._name)

    def _imports(self) -> Iterator[tuple[str, str]]:
        """Yield local names and the symbols that they are bound to."""
        for node in ast.walk(self._tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "vllm":
                for alias in node.names:
                    module = f"{node.module}.{alias.name}"
                    is_module = self._source.find(module) is not None
                    yield alias.asname or alias.name, module if is_module else f"{node.module}:{alias.name}"
            elif isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.name.partition(".")[0] == "vllm":
                        yield alias.asname or alias.name, alias.name

    def _symbol(self, node: ast.expr) -> str | None:
        """Return the symbol of an attribute of an import, such as `registry._run_in_subprocess`."""
        if not isinstance(node, ast.Attribute):
            return None
        value = node.value
        owner = self._imported.get(value.id) if isinstance(value, ast.Name) else self._symbol(value)
        if owner is None or node.attr.startswith("__"):
            return None
        if ":" in owner:
            return f"{owner}.{node.attr}"
        return f"{owner}:{node.attr}"

    def _attributes(self) -> Iterator[str]:
        nested = {id(node.value) for node in ast.walk(self._tree) if isinstance(node, ast.Attribute)}
        for node in ast.walk(self._tree):
            symbol = self._symbol(node) if isinstance(node, ast.Attribute) and id(node) not in nested else None
            if symbol and (known := self._known(symbol)) not in self._imported.values():
                yield known

    def _known(self, symbol: str) -> str:
        """Return the symbol without attributes of values, such as of an instance, whose class is not in the source."""
        while symbol.count(".", symbol.index(":")) and self._source.find(symbol) is None:
            symbol = symbol.rpartition(".")[0]
        return symbol

    def _replaced(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            if isinstance(node, ast.Assign):
                yield from (symbol for target in node.targets if (symbol := self._symbol(target)))

    def _targets(self) -> Iterator[str]:
        for node in self._tree.body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == TARGETS:
                yield from ast.literal_eval(_without_names(node.value))

    def _overrides(self) -> Iterator[str]:
        for node in ast.walk(self._tree):
            if not isinstance(node, ast.ClassDef):
                continue
            for base in node.bases:
                symbol = self._imported.get(ast.unparse(base).partition("[")[0], "")
                for member in node.body if ":" in symbol else []:
                    if (name := _member_name(member)) and self._source.find(f"{symbol}.{name}"):
                        yield f"{symbol}.{name}"


def _member_name(node: ast.stmt) -> str:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return "" if node.name.startswith("__") else node.name
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return ""
    target = node.targets[0] if isinstance(node, ast.Assign) else node.target
    return target.id if isinstance(target, ast.Name) else ""


def _without_names(node: ast.expr) -> ast.expr:
    """Replace the names in a literal, such as `NO_FUNCTION`, by strings."""

    class Names(ast.NodeTransformer):
        def visit_Name(self, name: ast.Name) -> ast.Constant:
            return ast.Constant(name.id)

    replaced: ast.expr = Names().visit(node)
    return replaced
