"""What CONTRIBUTING says of the code is true: its files exist, its wings are all there, its letters are the code's."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import bettertogether

PACKAGE = Path(bettertogether.__file__).parent
TEXT = (Path(__file__).parents[1] / ".github" / "CONTRIBUTING.md").read_text()


def names_of(node: ast.AST) -> set[str]:
    found = (getattr(node, field, None) for field in ("id", "arg", "attr"))
    return {name for name in found if isinstance(name, str)}


def rows_of(heading: str) -> dict[str, str]:
    """First and second cell of the table under a heading."""
    lines = TEXT.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][2:]
    return {row[0]: row[1] for row in cells}


def test_every_folder_of_the_package_is_on_the_map() -> None:
    words = set(re.findall(r"\w+", " ".join(itertools.chain(*rows_of("The map").items()))))
    assert {path.parent.name for path in PACKAGE.glob("*/__init__.py")} - words == set()


def test_every_file_that_is_named_exists() -> None:
    named = set(re.findall(r"`((?:[\w.]+/)*[\w]+\.(?:py|toml|md|yaml))`", TEXT))
    root = PACKAGE.parent
    missing = {name for name in named if not any((place / name).exists() for place in (root, PACKAGE))}
    assert missing == set()


def test_the_letters_of_shapes_are_those_of_the_code() -> None:
    letters: set[str] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            for name in names_of(node):
                suffix = re.fullmatch(r"[a-z0-9_]*[a-z0-9]((?:_(?:[A-Z]+|1))+)", name)
                letters |= set("".join((suffix[1] if suffix else "").split("_"))) - {"1"}
    legend = {letter for row in rows_of("Shape suffixes") for letter in row.split(", ")}
    assert letters == legend
