"""The import graph of a source tree, its circles, and its arrows against an order of rooms."""

from __future__ import annotations

import ast
import graphlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Graph = Mapping[str, set[str]]
Order = Sequence[Sequence[str]]


def modules(root: Path, packages: Sequence[str]) -> dict[str, Path]:
    """Return the modules of `packages` below `root`: dotted name to file; a package is its `__init__`."""
    found = {}
    for package in packages:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def import_graph(root: Path, packages: Sequence[str]) -> dict[str, set[str]]:
    """Return which module imports which, inside functions and for type checkers too.

    A text that is a module's name counts as well: that is how a table of modules for `importlib` looks. A package that
    is only passed through (`a.b` in `from a.b.c import d`) does not.
    """
    files = modules(root, packages)
    return {name: set(_imports(name, path, files)) - {name} for name, path in files.items()}


def _imports(name: str, path: Path, files: Mapping[str, Path]) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in files)
        elif isinstance(node, ast.Constant) and node.value in files and "." in node.value:
            yield node.value
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = name if path.name == "__init__.py" else name.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            for alias in node.names:
                target = f"{base}.{alias.name}"
                if target in files or base in files:
                    yield target if target in files else base


def circle(graph: Graph) -> list[str]:
    """Return the modules of one circle, the first one again at the end; empty if there is none."""
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return list(error.args[1])
    return []


def room(module: str, order: Order) -> tuple[int, str]:
    """Return the level (0 is the ground) and the longest name in `order` that `module` is, or is inside.

    Raises:
        ValueError: the module is in no room.
    """
    names = [(len(name), level, name) for level, row in enumerate(reversed(order)) for name in row]
    inside = [entry for entry in names if module == entry[2] or module.startswith(entry[2] + ".")]
    if not inside:
        raise ValueError(f"{module} is in no room of {[name for row in order for name in row]}: say where it belongs")
    _, level, name = max(inside)
    return level, name


def arrows_against(graph: Graph, order: Order) -> list[str]:
    """Return the imports, as text, that go up or sideways in `order`, whose first row is the top."""
    found = []
    for module, targets in sorted(graph.items()):
        level, name = room(module, order)
        for target in sorted(targets):
            below, other = room(target, order)
            if other != name and below >= level:
                found.append(f"{module} -> {target}")
    return found
