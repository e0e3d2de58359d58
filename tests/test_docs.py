"""Every python block of README and of the documentation runs, and the site has every public name and every error."""

from __future__ import annotations

import contextvars
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import create_autospec

import datasets
import dspy
import pytest
from fakes import outputs_of, plain_lm, reply
from small_models import save_adapter, save_model

import bettertogether
from bettertogether import errors
from bettertogether.testing import Answer, FakeEngine, FakeRequest

ROOT = Path(__file__).parents[1]
DOCS = ROOT / ".github" / "docs"
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if "```python" in page.read_text("utf-8")]


def blocks(page: Path) -> Iterator[str]:
    """The code of a page's blocks, each behind as many empty lines as stand before it in the page."""
    text = page.read_text("utf-8")
    for block in re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


def says_yes(request: FakeRequest) -> Answer:
    return reply(request, **dict.fromkeys(outputs_of(request), "yes"))


def examples(count: int) -> list[dspy.Example]:
    """Questions of which every fourth is answered "no"."""
    answers = ("yes", "yes", "yes", "no")
    return [dspy.Example(question=f"Is it {n}?", answer=answers[n % 4]).with_inputs("question") for n in range(count)]


def match(example: dspy.Example, prediction: dspy.Prediction, trace: object = None) -> bool:
    return bool(example.answer == prediction.answer)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dspy.Module:
    """A program with a report of p and w, over a tiny model with an adapter that can be saved and merged."""
    folder = tmp_path_factory.mktemp("compiled")
    rows = examples(8)
    program = bettertogether.BetterTogether(match).compile(
        student(), trainset=rows[:4], valset=rows[4:], strategy="p -> w", run_dir=folder / "run", progress=False
    )
    program.set_lm(
        bettertogether.local_lm(save_model(folder / "tiny"), adapter=save_adapter(folder / "adapter", seed=0))
    )
    return program


def student() -> dspy.Module:
    program = dspy.ChainOfThought("question -> answer")
    program.set_lm(plain_lm(FakeEngine(says_yes)))
    return program


@pytest.fixture
def names(compiled: dspy.Module) -> dict[str, Any]:
    """What the pages take for given."""
    rows = examples(12)
    return {
        "student": student(),
        "big_lm": plain_lm(FakeEngine(says_yes)),
        "metric": match,
        "feedback_metric": lambda example, prediction, trace, pred_name, pred_trace: match(example, prediction),
        "trainset": rows[:4],
        "valset": rows[4:8],
        "testset": rows[8:],
        "my_rows": [(row.question, row.answer) for row in rows],
        "MyProgram": student,
        "compiled": compiled,
    }


@pytest.fixture
def at_home(compiled: dspy.Module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever needs a network or a big model is replaced by something that takes the same arguments."""

    lms = {"local_lm": plain_lm(FakeEngine(says_yes)), "vllm_lm": compiled.predictors()[0].lm}

    def boolq(name: str) -> datasets.DatasetDict:
        row = {"question": "is 2 even", "answer": True, "passage": "2 is even."}
        return datasets.DatasetDict(train=datasets.Dataset.from_list([row]))

    for name, lm in lms.items():
        monkeypatch.setattr(bettertogether, name, create_autospec(getattr(bettertogether, name), return_value=lm))
    monkeypatch.setattr(bettertogether, "push_to_hub", create_autospec(bettertogether.push_to_hub))
    monkeypatch.setattr(datasets, "load_dataset", boolq)
    monkeypatch.chdir(tmp_path)
    Path("fsdp.yaml").write_text("distributed_type: FSDP\nnum_processes: 4\nfsdp_config: {fsdp_version: 2}\n")
    two_nodes = "num_processes: 2\nnum_machines: 2\nmain_process_ip: node0\nmain_process_port: 29500\n"
    Path("two_nodes.yaml").write_text("distributed_type: MULTI_CPU\nuse_cpu: true\n" + two_nodes)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_code_of_a_page_runs_from_top_to_bottom(page: Path, names: dict[str, Any], at_home: None) -> None:
    given = names["compiled"]
    for code in blocks(page):
        # What a page compiles is compiled on a fake, which can't be merged: what it keeps is the program given.
        names["compiled"] = given
        contextvars.Context().run(exec, compile(code, page, "exec"), names)


def test_the_reference_has_every_public_name() -> None:
    named = re.findall(r"^::: bettertogether\.(\w+)$", (DOCS / "reference.md").read_text("utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(bettertogether.__all__)


def test_every_error_is_told_with_what_to_do() -> None:
    assert "\n::: bettertogether.errors\n" in (DOCS / "troubleshooting.md").read_text("utf-8")
    classes = [kind for kind in vars(errors).values() if isinstance(kind, type) and kind.__module__ == errors.__name__]
    silent = [kind.__name__ for kind in classes if "\n\n" not in (kind.__doc__ or "")]
    assert silent == ["BetterTogetherError"]
