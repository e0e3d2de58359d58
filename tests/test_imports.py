"""House rule: only `engines` and `training` import torch and what is built on it, and importing stays cheap."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import bettertogether

PACKAGE = Path(bettertogether.__file__).parent
HEAVY = {"torch", "transformers", "peft", "accelerate", "bitsandbytes", "safetensors", "datasets", "gguf"}
OPTIONAL = {"llguidance", "vllm", "matplotlib", "mlflow", "sklearn"}
MODULES = sorted(
    str(path.relative_to(PACKAGE.parent).with_suffix("")).replace("/", ".").removesuffix(".__init__")
    for path in PACKAGE.rglob("*.py")
)
LIGHT = [
    module
    for module in MODULES
    if not module.startswith(("bettertogether.engines.", "bettertogether.training."))
    or module.removeprefix("bettertogether.") in ("engines.protocol", "training.config", "training.progress")
]


def imported_names(source: Path) -> set[str]:
    """Top-level package names that a file imports anywhere, type-checking blocks excepted."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add((node.module or "").split(".")[0])
        typing_only = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        todo += node.orelse if isinstance(node, ast.If) and typing_only else list(ast.iter_child_nodes(node))
    return names


def loaded_by(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(*sorted({{name.split('.')[0] for name in sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("source", sorted(PACKAGE.glob("*.py")), ids=lambda path: path.name)
def test_a_module_outside_engines_and_training_imports_no_model_library(source: Path) -> None:
    assert imported_names(source) & HEAVY == set()


def test_the_scan_sees_imports_inside_functions_and_skips_typing_blocks(tmp_path: Path) -> None:
    source = tmp_path / "module.py"
    source.write_text(
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import peft\nelse:\n    import gguf\n"
        "def f():\n    from transformers.models import x\n    import torch.nn\n    from .torch import y\n"
    )
    assert imported_names(source) == {"typing", "gguf", "transformers", "torch"}


def test_importing_the_package_and_its_public_names_loads_no_model_library() -> None:
    names = "; ".join(f"bettertogether.{name}" for name in bettertogether.__all__)
    assert loaded_by(f"import bettertogether; {names}") & (HEAVY | OPTIONAL) == set()


def test_importing_every_light_module_loads_nothing_heavy_beyond_dspy() -> None:
    ours = loaded_by("import " + ", ".join(LIGHT))
    assert (ours - loaded_by("import dspy")) & (HEAVY | OPTIONAL) == set()


def test_importing_the_package_does_not_even_load_dspy() -> None:
    assert "dspy" not in loaded_by("import bettertogether")


def test_importing_the_package_takes_no_longer_than_dspy_and_a_tenth_of_a_second() -> None:
    def seconds(module: str) -> float:
        code = f"import time; t = time.perf_counter(); import {module}; print(time.perf_counter() - t)"
        runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(2)]
        return min(float(run.stdout) for run in runs)

    assert seconds("bettertogether") <= seconds("dspy") + 0.1
