"""The map of the package: which wing may import which, where torch and optional packages may be, and no circles."""

from __future__ import annotations

import ast
import functools
import itertools
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import bettertogether

PACKAGE = Path(bettertogether.__file__).parent
ROOT = Path(__file__).parents[1]

WINGS = {
    "ground": "checks errors extras files other_names printable processes programs records redaction versions "
    "working_folders",
    "training": "training",
    "engines": "engines",
    "lm": "lm downloads",
    "callbacks": "callbacks",
    "rollouts": "rollouts",
    "steps": "steps rows",
    "report": "report",
    "run": "run run_directory",
    "artifact": "artifact",
    "optimizer": "optimizer",
    "testing": "testing",
}
"""Wing: the folders and files of `bettertogether/` that belong to it."""

MAY_IMPORT = {
    "ground": "",
    "training": "ground",
    "engines": "ground training",
    "lm": "ground training engines",
    "callbacks": "ground",
    "rollouts": "ground callbacks report",
    "steps": "ground training engines lm callbacks rollouts",
    "report": "ground",
    "run": "ground engines lm callbacks rollouts steps report",
    "artifact": "ground training engines lm report",
    "optimizer": "ground callbacks rollouts steps run",
    "testing": "ground training engines lm",
}
"""Wing: the other wings that it imports. What is imported for type checkers alone doesn't count: it never runs."""

INSIDE_ENGINES = {
    "engines.local": "engines",
    "engines.vllm": "engines",
}
"""The same between the two kinds of engine and what they share."""

LATE: dict[tuple[str, str], str] = {}
"""Imports inside a function that would close a circle at the top of the module, with the reason that they are there."""

MODEL_LIBRARIES = {"torch", "transformers", "peft", "accelerate", "safetensors", "gguf", "tokenizers"}
WITH_MODEL_LIBRARIES = ("engines", "training")
FOR_TRACKERS = ("callbacks.tracker", "accelerate.PartialState")
"""Besides, as accelerate's trackers need it."""
LIGHT = ("engines", "engines.protocol", "training", "training.config")
"""Modules of those wings that others import: nothing heavy is loaded with them."""

OPTIONAL = {
    "llguidance": "engines.structured",
    "mlflow": "callbacks.mlflow",
    "pandas": "programs.demo_values",
    "wandb": "callbacks.wandb",
}
"""Packages that may be missing: the one module that names each."""

LATE_LIBRARIES = {"datasets"}
"""Packages that are loaded where something needs them: they take a second."""

NEVER = {"vllm", "bitsandbytes", "matplotlib", "sklearn", "optuna", "bm25s"}
"""A server, a package that torch's optimizer classes load, and packages of tests and examples alone."""

HEAVY = MODEL_LIBRARIES | OPTIONAL.keys() | LATE_LIBRARIES | NEVER

THROUGH_OTHERS = {"IPython", "tokenizers", "tqdm", "typing_extensions", "yaml"}
"""Installed by a notebook's kernel, transformers, pydantic and accelerate, which pin the versions they work with."""


@dataclass(frozen=True)
class Import:
    source: str
    target: str
    late: bool
    """Inside a function."""


def module_name(path: Path) -> str:
    """Dotted, below the package; the package itself is ""."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def import_nodes(tree: ast.AST) -> Iterator[tuple[ast.Import | ast.ImportFrom, bool]]:
    """Each import that may run, and whether it is inside a function. Blocks for type checkers are passed over."""
    todo: list[tuple[ast.AST, bool]] = [(tree, False)]
    while todo:
        node, late = todo.pop()
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield node, late
        late = late or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        children = node.orelse if isinstance(node, ast.If) and typing_only else ast.iter_child_nodes(node)
        todo += [(child, late) for child in children]


def absolute(node: ast.ImportFrom, source: str, is_package: bool) -> str:
    """The module that is imported from, with its package's name."""
    if not node.level:
        return node.module or ""
    package = ["bettertogether", *filter(None, source.split("."))]
    package = package[: len(package) + is_package - node.level]
    return ".".join([*package, *filter(None, [node.module])])


def imported_names(tree: ast.AST, source: str = "", is_package: bool = True) -> Iterator[tuple[str, bool]]:
    """Full dotted names, imported members included."""
    for node, late in import_nodes(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        else:
            base = absolute(node, source, is_package)
            yield from ((f"{base}.{alias.name}", late) for alias in node.names)


@functools.cache
def names_in(module: str) -> list[tuple[str, bool]]:
    path = MODULES[module]
    return list(imported_names(ast.parse(path.read_text()), module, path.name == "__init__.py"))


def own_module(name: str) -> str | None:
    """The module of ours that holds this name."""
    head, _, rest = name.partition(".")
    if head != "bettertogether":
        return None
    while rest and rest not in MODULES:
        rest = rest.rpartition(".")[0]
    return rest


def own_imports() -> list[Import]:
    found = {
        Import(module, target, late)
        for module in MODULES
        for name, late in names_in(module)
        if (target := own_module(name)) is not None and target != module
    }
    return sorted(found, key=lambda one: (one.source, one.target, one.late))


IMPORTS = own_imports()


def wing_of(module: str) -> str | None:
    return next((wing for wing, members in WINGS.items() if module.split(".")[0] in members.split()), None)


def room_of_engines(module: str) -> str:
    return next((room for room in ("engines.local", "engines.vllm") if module.startswith(room)), "engines")


def table(rows: dict[str, str]) -> set[tuple[str, str]]:
    return {(row, cell) for row, cells in rows.items() for cell in cells.split()}


def circles(edges: Iterable[tuple[str, str]]) -> list[list[str]]:
    """Groups of modules that reach one another."""
    reached = reachable(edges)
    groups = {tuple(sorted(b for b in reached[a] if a in reached.get(b, ()))) for a in reached if a in reached[a]}
    return sorted(map(list, groups))


def reachable(edges: Iterable[tuple[str, str]]) -> dict[str, set[str]]:
    next_of: dict[str, set[str]] = {}
    for source, target in edges:
        next_of.setdefault(source, set()).add(target)
    reached = {}
    for start in next_of:
        seen: set[str] = set()
        todo = [start]
        while todo:
            new = next_of.get(todo.pop(), set()) - seen
            seen |= new
            todo += new
        reached[start] = seen
    return reached


def loaded_by(statement: str, before: str = "pass") -> set[str]:
    """Top-level names that a statement adds to `sys.modules` of a new process, after the one `before` it."""
    names = "{name.split('.')[0] for name in sys.modules}"
    code = f"import sys; {before}; known = {names}; {statement}; print(*({names} - known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_every_module_belongs_to_a_wing() -> None:
    assert [module for module in MODULES if module and wing_of(module) is None] == []
    assert set(" ".join(WINGS.values()).split()) == {module.split(".")[0] for module in MODULES if module}


def test_a_wing_imports_the_wings_that_it_may_and_the_table_allows_no_more() -> None:
    between = {(wing_of(one.source), wing_of(one.target)): one for one in IMPORTS if one.source and one.target}
    edges = {pair: f"{one.source} > {one.target}" for pair, one in between.items() if pair[0] != pair[1]}
    assert {pair: edge for pair, edge in edges.items() if pair not in table(MAY_IMPORT)} == {}, "not allowed"
    assert table(MAY_IMPORT) - edges.keys() == set(), "allowed, but nothing uses it any more"


def test_the_wings_stand_above_one_another() -> None:
    assert circles(table(MAY_IMPORT)) == []


def test_the_kinds_of_engine_know_nothing_of_each_other() -> None:
    inside = [one for one in IMPORTS if wing_of(one.source) == wing_of(one.target) == "engines"]
    edges = {
        (room_of_engines(one.source), room_of_engines(one.target)): f"{one.source} > {one.target}" for one in inside
    }
    edges = {pair: edge for pair, edge in edges.items() if pair[0] != pair[1]}
    assert {pair: edge for pair, edge in edges.items() if pair not in table(INSIDE_ENGINES)} == {}, "not allowed"
    assert table(INSIDE_ENGINES) - edges.keys() == set(), "allowed, but nothing uses it any more"


def test_only_the_packages_own_names_are_taken_from_its_root() -> None:
    assert {one.source for one in IMPORTS if one.target == ""} <= {"versions"}, "it is noted in runs and artifacts"


def test_no_modules_import_one_another_in_a_circle() -> None:
    assert circles((one.source, one.target) for one in IMPORTS if not one.late) == []


def test_imports_inside_functions_that_would_close_a_circle_are_few_and_have_a_reason() -> None:
    above = reachable((one.source, one.target) for one in IMPORTS if not one.late)
    late = {(one.source, one.target) for one in IMPORTS if one.late}
    assert {(a, b) for a, b in late if a in above.get(b, ())} == set(LATE)


def test_only_engines_and_training_import_model_libraries() -> None:
    wrong = {
        (module, name)
        for module in MODULES
        for name, _ in names_in(module)
        if name.split(".")[0] in MODEL_LIBRARIES
        if module.split(".")[0] not in WITH_MODEL_LIBRARIES or module in LIGHT
    }
    assert wrong == {FOR_TRACKERS}


def test_an_optional_package_is_named_in_one_module() -> None:
    texts = {module: path.read_text() for module, path in MODULES.items()}
    tops = {module: {name.split(".")[0] for name, _ in names_in(module)} for module in MODULES}
    for package, leaf in OPTIONAL.items():
        users = {module for module in MODULES if package in tops[module]}
        users |= {module for module, text in texts.items() if f'extra_module("{package}' in text}
        assert users == {leaf}, package
    assert {module: names & NEVER for module, names in tops.items() if names & NEVER} == {}


def test_whatever_is_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = itertools.chain(project["dependencies"], *project["optional-dependencies"].values())
    declared = {re.split(r"[<>=\[]", line)[0].replace("-", "_") for line in lines}
    used = {name.split(".")[0] for module in MODULES for name, _ in names_in(module)} - {"bettertogether"}
    assert used - set(sys.stdlib_module_names) - declared <= THROUGH_OTHERS


def test_importing_the_package_and_its_public_names_loads_no_model_library() -> None:
    names = "; ".join(f"bettertogether.{name}" for name in bettertogether.__all__)
    assert loaded_by(f"import bettertogether; {names}") & HEAVY == set()


def test_importing_every_light_module_loads_nothing_heavy_beyond_dspy() -> None:
    light = [module for module in MODULES if module.split(".")[0] not in WITH_MODEL_LIBRARIES or module in LIGHT]
    ours = "import " + ", ".join(f"bettertogether.{module}".rstrip(".") for module in light)
    assert loaded_by(ours, before="import dspy") & HEAVY == set()


def test_importing_the_package_loads_the_standard_library_alone() -> None:
    assert loaded_by("import bettertogether") - set(sys.stdlib_module_names) == {"bettertogether"}


@pytest.mark.parametrize(
    "name", ["callbacks.MLflowCallback", "errors.ConfigError", "records.StepRecord", "testing.Answer"]
)
def test_a_module_of_the_reference_is_there_whatever_was_imported_before(name: str) -> None:
    assert "bettertogether" in loaded_by(f"import bettertogether; bettertogether.{name}")


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.py")), ids=lambda path: path.stem)
def test_examples_import_public_names_alone(path: Path) -> None:
    names = {name for name, _ in imported_names(ast.parse(path.read_text())) if name.startswith("bettertogether")}
    assert names <= {"bettertogether", *(f"bettertogether.{name}" for name in bettertogether.__all__)}


def test_the_folders_of_tests_are_those_of_the_package() -> None:
    helpers = {"benchmarks"}
    folders = {str(path.parent.relative_to(ROOT / "tests")) for path in (ROOT / "tests").rglob("*.py")} - helpers
    assert folders <= {str(path.parent.relative_to(PACKAGE)) for path in MODULES.values()}


@functools.cache
def files_of_tests() -> dict[Path, ast.Module]:
    return {path: ast.parse(path.read_text()) for path in (ROOT / "tests").rglob("*.py")}


def test_every_test_file_opens_with_a_sentence() -> None:
    assert [path.name for path, tree in files_of_tests().items() if not ast.get_docstring(tree)] == []


def test_no_test_imports_another_test() -> None:
    names = {(path.name, name) for path, tree in files_of_tests().items() for name, _ in imported_names(tree)}
    assert {(file, name) for file, name in names if name.startswith("test_")} == set()


def test_the_scan_sees_imports_inside_functions_and_passes_over_blocks_for_type_checkers() -> None:
    tree = ast.parse(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import peft\nelse:\n    import gguf\n"
        "def f():\n    from transformers.models import x\n    import torch.nn\n    from .torch import y\n"
    )
    assert set(imported_names(tree, "engines.loading", False)) == {
        ("typing.TYPE_CHECKING", False),
        ("gguf", False),
        ("transformers.models.x", True),
        ("torch.nn", True),
        ("bettertogether.engines.torch.y", True),
    }


def test_circles_are_found() -> None:
    assert circles([("a", "b"), ("b", "c"), ("c", "b"), ("c", "d")]) == [["b", "c"]]
