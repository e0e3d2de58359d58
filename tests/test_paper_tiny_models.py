"""The paper's programs with tiny random models, which answer nothing right, on the real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hotpotqa
import hub_files
import iris
import pytest
from small_models import PACKED, save_model
from table_1 import BEST, STRATEGIES
from transformers import LlamaConfig

LONG = LlamaConfig(**{**PACKED["llama"].to_dict(), "max_position_embeddings": 20_000})


def arguments(tmp_path: Path, data: Path, *more: str) -> list[str]:
    model = save_model(tmp_path / "tiny", LONG)
    run_dir = str(tmp_path / "run")
    return ["--model", str(model), "--data", str(data), "--run-dir", run_dir, "--seeds", "1", "--limit", "3", *more]


@pytest.mark.parametrize(("module", "files"), [(hotpotqa, hub_files.hotpotqa), (iris, hub_files.iris)])
def test_a_tiny_model_runs_the_whole_script(module: Any, files: Any, tmp_path: Path) -> None:
    numbers = hub_files.own_numbers(module.main(arguments(tmp_path, files(tmp_path / "data"), "--max-tokens", "16")))
    assert numbers == {strategy: "-" if "w" in strategy else "0.0" for strategy in STRATEGIES} | {BEST: "0.0"}
