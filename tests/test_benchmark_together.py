"""`tests/benchmarks/together.py`: its tables say what the results hold, and a stopped run goes on."""

from __future__ import annotations

import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import dspy
import numpy as np
import pytest

BENCHMARKS = Path(__file__).parent / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from together import arguments, cells, main  # noqa: E402
from together_cell import accepted  # noqa: E402
from together_tables import Gain, Result, differences_table, gain_of, load, means_table, tables  # noqa: E402
from together_tasks import TASKS, reply_match, scene_match, sentence_match  # noqa: E402
from together_texts import FACTS  # noqa: E402

STRATEGIES = ("", "p", "w", "w -> w", "p -> w", "w -> p", "p -> w -> p")
GENERATED = ("router", "hops", "arithmetic", "orders", "sentence", "reply")


def cell(task: str = "iris", seed: int = 0, side: str = "ours", **changes: Any) -> dict[str, Any]:
    """A result file: four examples; the round number n solves the first n of them, seven and more all."""
    tests = {f"k{n}": [1.0] * n + [0.0] * (4 - n) for n in range(5)}
    keys = dict(zip(STRATEGIES, ("k0", "k1", "k2", "k2", "k3", "k3", "k4"), strict=True))
    rounds = {
        name: {"val": 0.1 * place, "test": keys[name], "minutes": 1.0, "lm_calls": 10}
        for place, name in enumerate(STRATEGIES)
    }
    data = {
        "cell": {"task": task, "seed": seed, "side": side, "model": "smollm", "ablation": "default"},
        "done": True,
        "sizes": [50, 50, 4],
        "rounds": rounds,
        "tests": tests,
        "returned": "p -> w -> p",
        "returned_of_all": "p -> w -> p",
        "two_by_two": {"base_old": "k0", "base_new": "k1", "tuned_old": "k2", "tuned_new": "k4"},
    }
    return {**data, **changes}


def write(folder: Path, *cells: dict[str, Any]) -> Path:
    for number, data in enumerate(cells):
        (folder / f"{number}.json").write_text(json.dumps(data))
    return folder


def result(**changes: Any) -> Result:
    return Result("iris", 0, cell(**changes))


def listed(scores: Any) -> list[float]:
    assert scores is not None
    return list(scores)


def test_means_are_over_seeds_and_then_over_tasks(tmp_path: Path) -> None:
    second = cell(seed=1)
    second["rounds"]["p"]["test"] = "k3"
    groups = load(write(tmp_path, cell(), second, cell("orders")))

    lines = [line.split() for line in means_table(groups["smollm", "default"]).splitlines()]

    assert lines[1][:5] == ["iris", "2", "4", "0.000", "0.500"]
    assert lines[2][:5] == ["orders", "1", "4", "0.000", "0.250"]
    assert lines[3][:4] == ["all", "tasks", "0.000", "0.375"]


@pytest.mark.parametrize(("side", "strategy"), [("repeats", "w -> w"), ("preference", "w -> r"), ("policy", "w -> g")])
def test_what_is_added_comes_from_a_cell_of_its_own_and_is_left_out_where_there_is_none(
    tmp_path: Path, side: str, strategy: str
) -> None:
    short, more = cell(), cell(side=side, tests={"k9": [1.0, 1.0, 1.0, 0.0]})
    more["rounds"] = {strategy: {**short["rounds"].pop("w -> w"), "test": "k9"}}
    del short["rounds"]["w -> p"]

    first = means_table(load(write(tmp_path, short))["smollm", "default"]).splitlines()
    assert strategy not in first[0]
    second = means_table(load(write(tmp_path, short, more))["smollm", "default"]).splitlines()
    assert second[0].index(strategy) > 0
    assert second[1].split()[:7] == ["iris", "1", "4", "0.000", "0.250", "0.500", "0.750"]


def test_rounds_that_were_added_alone_have_their_means_and_gains_too(tmp_path: Path) -> None:
    short, more = cell("orders"), cell(side="preference")
    more["rounds"] = {"w": more["rounds"]["w"], "w -> r": more["rounds"]["p -> w -> p"], "": more["rounds"][""]}

    lines = [line.split() for line in tables(load(write(tmp_path, short, more))).splitlines()]

    assert ["iris", "1", "4", "0.000", "0.500", "1.000"] in lines
    gain = lines.index(["w->r", "-", "w", "(1", "runs)"])
    assert lines[gain + 2][:2] == ["iris", "+0.500"]
    assert not any(line[:2] == ["iris", "s0"] for line in lines)


def test_an_interval_resamples_within_each_task_and_seed_and_weighs_tasks_alike() -> None:
    certain = {"a": [np.full(4, 1.0), np.full(2, 0.0)], "b": [np.full(100, 0.0)]}
    noisy = {"a": [np.array([1.0, 0.0] * 50)], "b": [np.full(100, 0.0)]}

    assert gain_of(certain) == Gain(0.25, 0.25, 0.25)
    gain = gain_of(noisy)
    assert gain.mean == 0.25
    # The standard error of the mean of 100 zeros and ones is 0.05; of the mean of both tasks half of it.
    assert gain.low == pytest.approx(0.25 - 1.96 * 0.025, abs=0.006)
    assert gain.high == pytest.approx(0.25 + 1.96 * 0.025, abs=0.006)


def test_the_better_of_p_and_w_alone_is_chosen_by_validation_or_harsher_by_test() -> None:
    one = result()
    one.ours["rounds"]["p"]["val"] = 0.9

    assert listed(one.better_alone(by_test=False)) == [1, 0, 0, 0]
    assert listed(one.better_alone(by_test=True)) == [1, 1, 0, 0]
    one.ours["rounds"]["w"]["val"] = 0.9
    assert listed(one.better_alone(by_test=False)) == [1, 1, 0, 0]


def test_the_interaction_is_what_both_give_beyond_the_sum_of_each() -> None:
    assert listed(result().interaction()) == [-1.0, 0.0, 1.0, 1.0]


def test_differences_are_paired_with_what_dspy_returned_for_the_same_task_and_seed(tmp_path: Path) -> None:
    theirs = cell(side="theirs", returned="p")
    groups = load(write(tmp_path, cell(), theirs, cell("orders")))

    blocks = differences_table(groups["smollm", "default"])

    assert "returned - dspy's (1 runs)\n  pooled  +0.750 [" in blocks
    assert "returned - untouched (2 runs)\n  pooled  +1.000 [+1.000, +1.000] +" in blocks
    assert "p->w->p - better of p, w (by test) (2 runs)\n  pooled  +0.500 [" in blocks
    assert "2x2 of p -> w: interaction (2 runs)\n  pooled  +0.250 [" in blocks


def test_an_ablation_stands_beside_the_default_on_the_same_tasks_and_seeds(tmp_path: Path) -> None:
    other = cell(returned="p")
    other["cell"]["ablation"] = "train_prompt=vanilla"

    text = tables(load(write(tmp_path, cell(), cell("orders"), other)))

    compared = [line.split() for line in text.partition("ablations")[2].splitlines()[2:]]
    assert compared[0][:6] == ["default", "1", "0.500", "0.750", "1.000", "1.000"]
    assert compared[1][:6] == ["train_prompt=vanilla", "1", "0.500", "0.750", "1.000", "0.250"]
    assert compared[1][6:10] == ["0.250", "+0.000", "[+0.000,", "+0.000]"]
    assert compared[1][10] == "-0.750"


def test_cells_of_other_sizes_are_not_paired(tmp_path: Path) -> None:
    folder = write(tmp_path, cell(), cell("orders", sizes=[40, 40, 4]), cell(side="theirs", sizes=[40, 40, 4]))

    with pytest.raises(SystemExit) as refused:
        load(folder)

    assert str(refused.value) == (
        f"{tmp_path / '2.json'} is of [40, 40, 4] examples (train, validation, test), {tmp_path / '0.json'} of "
        "[50, 50, 4]: their scores can't be paired. Keep results of another --limit or --test in a folder of their own."
    )


def test_a_cell_that_is_not_finished_is_in_no_table(tmp_path: Path) -> None:
    assert tables(load(write(tmp_path, cell(done=False)))) == "No finished cell yet."


def test_an_option_that_the_library_does_not_have_is_left_out_and_named(capsys: pytest.CaptureFixture[str]) -> None:
    def step(known: int) -> None: ...

    assert accepted(step, {"known": 1, "unheard_of": 2}) == {"known": 1}
    assert capsys.readouterr().out == "LEFT OUT: step of this version has no unheard_of\n"


@pytest.mark.parametrize("name", GENERATED)
def test_examples_are_the_same_by_seed_and_no_input_is_in_two_parts(name: str) -> None:
    task = TASKS[name]
    parts = task.data(3)

    assert [len(part) for part in parts] == [50, 50, 150]
    inputs = [str(example.inputs()) for part in parts for example in part]
    assert len(set(inputs)) == 250
    assert task.data(3) == parts
    assert task.data(4) != parts
    assert [len(part) for part in task.data(3, limit=8, test=5)] == [8, 8, 5]


def test_the_answer_of_two_hops_stands_at_the_end_of_the_second_fact() -> None:
    for example in TASKS["hops"].data(0)[0]:
        person = next(name for name in FACTS if name in example.question)
        home_or_pet = "lives in (\\w+)" if "county" in example.question else "called (\\w+ \\w+)"
        name = re.search(home_or_pet, FACTS[person])
        assert name is not None
        assert FACTS[name[1]].endswith(f" {example.answer}.")


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("The old dog left the river by train.", True),
        ("The old dog left the river.", False),
        ("The old dog left the river by train", False),
        ("The old dog left. The river is by the train.", False),
        ("Dog, river, train.", False),
        ("The old dog left the river by train and came back with a hat.", False),
        ("The old dog left the river by trains.", False),
    ],
)
def test_a_sentence_is_right_if_it_is_one_and_has_the_words(sentence: str, right: bool) -> None:
    example = dspy.Example(words="train, dog, river").with_inputs("words")
    assert sentence_match(example, dspy.Prediction(sentence=sentence)) is right


@pytest.mark.parametrize(
    ("sentence", "right"),
    [
        ("The old dog left the river by train.", True),
        ("The dog, a train and the river are far from one another in this old town.", True),
        ("A dog, train and river are far from one another.", False),
        ("The old dog left the river by bus.", False),
    ],
)
def test_a_scene_is_right_if_its_words_are_not_listed(sentence: str, right: bool) -> None:
    example = dspy.Example(words="train, dog, river").with_inputs("words")
    assert scene_match(example, dspy.Prediction(sentence=sentence)) is right


@pytest.mark.parametrize(
    ("reply", "right"),
    [
        ("We will mend the hair dryer.", True),
        ("We will mend it soon.", False),
        ("Hair dryer.", False),
        ("Is it the hair dryer that leaks?", False),
    ],
)
def test_a_reply_is_right_if_it_is_a_sentence_and_names_the_product(reply: str, right: bool) -> None:
    example = dspy.Example(message="About my hair dryer: it leaks.", product="hair dryer").with_inputs("message")
    assert reply_match(example, dspy.Prediction(reply=reply)) is right


def test_what_is_asked_for_is_run_seed_by_seed() -> None:
    asked = ["--results", "x", "--tasks", "orders", "arithmetic", "--seeds", "0", "1", "--theirs", "--epochs", "2"]

    found = cells(arguments().parse_args(asked))

    sides = [("ours", {"epochs": 2}), ("theirs", {})]
    assert [(cell["task"], cell["seed"], cell["side"], cell["options"]) for cell in found] == [
        (task, seed, *side) for seed in (0, 1) for task in ("orders", "arithmetic") for side in sides
    ]


def test_the_command_runs_a_task_and_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ["--model", "fake", "--seeds", "0", "--limit", "8", "--test", "6"]
    monkeypatch.setattr(sys, "argv", ["together.py", "--results", str(tmp_path), "--tasks", "orders", *sizes])
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    main()

    stopped = tmp_path / "orders-s0-ours-default-fake.json"
    whole = json.loads(stopped.read_text())
    assert set(whole["rounds"]) == {"", "p", "w", "p -> w", "p -> w -> p"}
    assert {len(scores) for scores in whole["tests"].values()} == {6}
    assert whole["sizes"] == [8, 8, 6]
    assert capsys.readouterr().out.partition("== fake")[2].splitlines()[3].split()[:3] == ["orders", "1", "6"]

    kept = {whole["rounds"][""]["test"]: [0.5] * 6}
    stopped.write_text(json.dumps({**whole, "done": False, "rounds": {}, "tests": kept}))
    main()
    after = json.loads(stopped.read_text())

    # The compile is not repeated, and the test of the untouched program is taken as it stands.
    assert {name: r["minutes"] for name, r in after["rounds"].items()} == {
        name: r["minutes"] for name, r in whole["rounds"].items()
    }
    assert after["tests"] == whole["tests"] | kept
    assert capsys.readouterr().out.partition("min\n")[2] == tables(load(tmp_path)) + "\n"
