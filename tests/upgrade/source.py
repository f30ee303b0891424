"""Look-ups in the source of vLLM, which is read and not imported.

So another version, and the modules that need a GPU, can be read on any machine.
"""

import ast
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Definition:
    """A symbol in the source.

    Attributes:
        module: the module that defines it, which may be another one than that it is imported from.
        signature: the parameters of a function or a constructor; the fields of a class without one; else "".
        digest: a hash of its code, without comments, docstrings and formatting.
    """

    module: str
    signature: str
    digest: str


class VllmSource:
    """The source of one version of vLLM.

    Args:
        folder: the folder of the package.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trees: dict[str, ast.Module | None] = {}

    @cached_property
    def version(self) -> str:
        """The version, from the package's generated module."""
        tree = self._tree("vllm._version")
        assert tree is not None
        return next(
            str(node.value.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and node.value.value
        )

    def find(self, symbol: str) -> Definition | None:
        """Return the definition of `module:qualified.name`, through re-exports and base classes; None without one."""
        module, _, path = symbol.partition(":")
        if not path:
            return Definition(module, "", "") if self._tree(module) else None
        first, *members = path.split(".")
        found = self._in_module(module, first)
        for member in members:
            found = found and self._in_class(*found, member)
        if found is None:
            return None
        module, node = found
        return Definition(module, self._signature(module, node), _digest(node))

    def _tree(self, module: str) -> ast.Module | None:
        if module not in self._trees:
            path = self.folder.parent.joinpath(*module.split("."))
            file = next((one for one in (path / "__init__.py", path.with_suffix(".py")) if one.is_file()), None)
            self._trees[module] = ast.parse(file.read_text()) if file else None
        return self._trees[module]

    def _is_package(self, module: str) -> bool:
        return self.folder.parent.joinpath(*module.split("."), "__init__.py").is_file()

    def _in_module(self, module: str, name: str, depth: int = 0) -> tuple[str, ast.AST] | None:
        if (tree := self._tree(module)) is None or depth > 8:
            return None
        for node in _statements(tree):
            if _defines(node, name):
                return module, node
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        return self._in_module(source, alias.name, depth + 1) or self._submodule(source, alias.name)
                    if alias.name == "*" and (found := self._in_module(source, name, depth + 1)):
                        return found
        return self._submodule(module, name) or self._in_lazy_table(module, tree, name, depth)

    def _submodule(self, module: str, name: str) -> tuple[str, ast.AST] | None:
        tree = self._tree(f"{module}.{name}") if self._is_package(module) else None
        return (f"{module}.{name}", tree) if tree else None

    def _in_lazy_table(self, module: str, tree: ast.Module, name: str, depth: int) -> tuple[str, ast.AST] | None:
        """Find a name that a module's `__getattr__` provides, from a literal dictionary of the module."""
        if not any(_defines(node, "__getattr__") for node in _statements(tree)):
            return None
        for node in ast.walk(tree):
            if not isinstance(node, ast.Dict):
                continue
            for key, value in zip(node.keys, node.values, strict=True):
                if isinstance(key, ast.Constant) and key.value == name:
                    place = str(value.value) if isinstance(value, ast.Constant) else ""
                    target, _, path = place.partition(":")
                    if path:
                        target = f"{module}{target}" if target.startswith(".") else target
                        return self._in_module(target, path, depth + 1)
                    return module, value
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        parts = parts[: len(parts) - node.level + self._is_package(module)]
        return ".".join((*parts, node.module) if node.module else parts)

    def _in_class(self, module: str, node: ast.AST, name: str) -> tuple[str, ast.AST] | None:
        if isinstance(node, ast.Module):
            return self._in_module(module, name)
        if not isinstance(node, ast.ClassDef):
            return None
        for one in ast.walk(node):
            if isinstance(one, ast.stmt) and (_defines(one, name) or _sets_attribute(one, name)):
                return module, one
        for base in node.bases:
            parent = self._in_module(module, ast.unparse(base).partition("[")[0])
            if parent and parent[1] is not node and (found := self._in_class(*parent, name)):
                return found
        return None

    def _signature(self, module: str, node: ast.AST) -> str:
        if isinstance(node, Function):
            return ast.unparse(_without_annotations(node.args))
        if not isinstance(node, ast.ClassDef):
            return ""
        fields = [ast.unparse(one.target) for one in node.body if isinstance(one, ast.AnnAssign)]
        constructor = self._in_class(module, node, "__init__")
        if constructor and isinstance(constructor[1], Function):
            return ast.unparse(_without_annotations(constructor[1].args))
        return ", ".join(fields)


def _statements(tree: ast.Module) -> list[ast.stmt]:
    """Return the statements of a module, with those in `if`, `try` and `with`."""
    found: list[ast.stmt] = []
    waiting = list(tree.body)
    while waiting:
        node = waiting.pop(0)
        found.append(node)
        if isinstance(node, ast.If | ast.Try | ast.With):
            handlers = [one for handler in getattr(node, "handlers", []) for one in handler.body]
            waiting += [*node.body, *getattr(node, "orelse", []), *handlers]
    return found


def _defines(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    if isinstance(node, ast.Import):
        return any((alias.asname or alias.name) == name for alias in node.names)
    return any(isinstance(one, ast.Name) and one.id == name for target in targets for one in ast.walk(target))


def _sets_attribute(node: ast.stmt, name: str) -> bool:
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return any(ast.unparse(target) == f"self.{name}" for target in targets)


def _without_annotations(arguments: ast.arguments) -> ast.arguments:
    arguments = ast.parse(f"def f({ast.unparse(arguments)}): ...").body[0].args  # type: ignore[attr-defined]
    every = (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg)
    for one in every:
        if one is not None:
            one.annotation = None
    return arguments


def _digest(node: ast.AST) -> str:
    """Return a hash of the code, without docstrings; `ast` has no comments and no formatting."""
    copy = ast.parse(ast.unparse(node))
    for one in ast.walk(copy):
        if isinstance(one, ast.Module | ast.ClassDef | Function) and ast.get_docstring(one, clean=False) is not None:
            del one.body[0]
    return sha256(ast.dump(copy).encode()).hexdigest()[:16]
