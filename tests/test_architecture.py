"""The folders of the package: imports point one way, lazy ones too, and files stay short."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import convgen

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "convgen"

FLOORS = (
    ("spec",),
    ("engines",),
    ("codegen", "building"),
    ("specialize", "exporting"),
    ("checking",),
    ("measuring",),
    ("tuning",),
    ("models",),
    ("commands",),
    ("cli",),
)
"""From the lowest to the highest: a part may import itself and what lies below its floor."""

MOST_LINES = 500


@cache
def modules() -> dict[str, Path]:
    """Every module of the package, by its dotted name."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(name: str) -> Iterator[str]:
    """The package's modules that one of them imports, wherever in the file the import stands."""
    for node in ast.walk(ast.parse(modules()[name].read_text())):
        wanted = []
        if isinstance(node, ast.Import):
            wanted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{name}: write the whole name"
            members = [f"{node.module}.{alias.name}" for alias in node.names]
            wanted = [member if member in modules() else node.module for member in members]
        yield from (module for module in wanted if module in modules() and module != "convgen")


def part_of(name: str) -> str:
    return name.split(".")[1]


def test_imports_point_one_way() -> None:
    floor = {part: number for number, parts in enumerate(FLOORS) for part in parts}
    # Beside the floors: the public names, `python -m convgen`, and the homes of what is imported
    # by the name of its specification.
    names = {name for name in modules() if name != "convgen"}
    outside = {"convgen.__main__", "convgen.cached", "convgen.swapped"}
    assert {part_of(name) for name in names - outside} == set(floor)
    upward = {
        (name, other)
        for name in names - outside
        for other in imports(name)
        if part_of(name) != part_of(other) and floor[part_of(other)] >= floor[part_of(name)]
    }
    assert not upward


def test_public_names_are_there() -> None:
    assert all(getattr(convgen, name) is not None for name in convgen.__all__)


def test_no_modules_import_each_other() -> None:
    """Not even where an import waits inside a function: nothing hides a circle."""
    graph = {name: set(imports(name)) - {name} for name in modules() if name != "convgen"}
    TopologicalSorter(graph).prepare()


def test_no_file_of_ours_is_long() -> None:
    folders = ("convgen", "tests", "examples")
    lines = {
        path.relative_to(ROOT): len(path.read_text().splitlines())
        for folder in folders
        for path in (ROOT / folder).rglob("*.py")
    }
    assert not {path: count for path, count in lines.items() if count > MOST_LINES}
