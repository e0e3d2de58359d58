"""Which calls go on with a run directory, and how the others are refused."""

from __future__ import annotations

import functools
import importlib
import json
import re
import threading
import uuid
from pathlib import Path
from typing import Any

import dspy
import pytest
from dspy.teleprompt.teleprompt import Teleprompter
from fakes import Parity, learner, numbers, parity_engine, parity_match, plain_lm

from bettertogether import BetterTogether, LoRAConfig, LoRAFinetune
from bettertogether.errors import RunDirectoryError
from bettertogether.programs.behaviour import lm_parts
from bettertogether.programs.code import is_own
from bettertogether.steps.rows import Row, write_rows
from bettertogether.testing import FakeEngine

STRICT = 1.0


class Same(Teleprompter):
    """Gives the student back, and counts how often."""

    def __init__(self, option: Any = 1) -> None:
        self.option = option
        self.times = 0

    def compile(self, student: dspy.Module, *, trainset: Any, extra: Any = None) -> dspy.Module:
        self.times += 1
        self.received = trainset
        return student


def program(
    *, flip: bool = False, words: Any = ("a",), instructions: str = "Say.", lm: Any = None, **config: Any
) -> dspy.Module:
    def answer(parity: str) -> str:
        return {"odd": "even", "even": "odd"}[parity] if flip else parity

    class Program(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = words
            self.lock = threading.Lock()
            self.say = dspy.Predict(Parity.with_instructions(instructions), **config)
            self.say.lm = plain_lm(parity_engine(learner), **(lm or {}))

        def forward(self, number: int) -> dspy.Prediction:
            return dspy.Prediction(parity=answer(self.say(number=number).parity))

    return Program()


def other_forward() -> dspy.Module:
    made = program()

    class Program(type(made)):  # type: ignore[misc]
        def forward(self, number: int) -> dspy.Prediction:
            return self.say(number=number + 0)

    Program.__qualname__ = type(made).__qualname__
    made.__class__ = Program
    return made


def graded(example: Any, prediction: Any, trace: Any = None, *, weight: float = 1.0) -> float:
    return weight * STRICT * (example.parity == prediction.parity)


class Graded:
    def __init__(self, weight: float) -> None:
        self.weight = weight
        self.calls = 0

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        self.calls += 1
        return graded(example, prediction, weight=self.weight)

    def method(self, example: Any, prediction: Any, trace: Any = None) -> float:
        return self(example, prediction)


class Keeping:
    """Keeps what it scored, in a list or in what is `deep` as a list of so many lists."""

    def __init__(self, deep: int = 0) -> None:
        self.deep = deep
        self.seen: list[Any] = []

    def __call__(self, example: Any, prediction: Any, trace: Any = None) -> float:
        self.seen.append(prediction)
        for _ in range(self.deep):
            self.seen = [self.seen]
        return graded(example, prediction)


def closure(weight: float) -> Any:
    def metric(example: Any, prediction: Any, trace: Any = None) -> float:
        return graded(example, prediction, weight=weight)

    return metric


def call(run_dir: Path, **changes: Any) -> dspy.Module:
    student = changes.pop("student", program)()
    metric = changes.pop("metric", lambda: parity_match)()
    options: dict[str, Any] = {"trainset": numbers(12, 40), "valset": numbers(4), "strategy": "s", "progress": False}
    options |= changes
    optimizer = BetterTogether(metric, **options.pop("optimizers", lambda: {"s": Same()})())
    return optimizer.compile(student, run_dir=run_dir, **options)


def keyed(key: str, sort_key: Any = str) -> Any:
    def metric(example: Any, prediction: Any, trace: Any = None, sort_key: Any = sort_key) -> bool:
        return sort_key(example[key]) == prediction.parity

    return metric


class Client:
    def __init__(self, key: str) -> None:
        self.api_key = key


def case(first: dict[str, Any], second: dict[str, Any], named: str) -> Any:
    return pytest.param(first, second, named, id=f"{named} {next(iter(second))}")


DIFFERENT = [
    case({}, {"student": lambda: program(flip=True)}, "student.code.*Program.forward"),
    case({}, {"student": other_forward}, "student.code.*Program.forward"),
    case({}, {"student": lambda: program(words=("b",))}, r"student.attributes.self.words: .*\('a',\).*\('b',\)"),
    case({}, {"student": lambda: program(instructions="Tell.")}, r"student.prompts.say.instructions: .*Say.*Tell"),
    case({}, {"student": lambda: program(lm={"temperature": 1.5})}, r"student.lms.say.temperature: .*0\.0.*1\.5"),
    case({}, {"student": lambda: program(lm={"max_tokens": 3})}, "student.lms.say.max_tokens"),
    case({}, {"student": lambda: program(temperature=1.5)}, "student.attributes.self.say.config"),
    case({}, {"teacher": program()}, "teachers.1.class"),
    case({"teacher": program()}, {"teacher": program(flip=True)}, "teachers.1.code"),
    case({"metric": lambda: closure(1.0)}, {"metric": lambda: closure(0.5)}, r"metric.closure.weight: .*1\.0.*0\.5"),
    case({"metric": lambda: Graded(1.0)}, {"metric": lambda: Graded(0.5)}, r"metric.weight: .*1\.0.*0\.5"),
    case({"metric": lambda: Graded(1.0).method}, {"metric": lambda: Graded(0.5).method}, "metric.of.weight"),
    case(
        {"metric": lambda: functools.partial(graded, weight=1.0)},
        {"metric": lambda: functools.partial(graded, weight=0.5)},
        "metric.keywords.weight",
    ),
    case({"metric": lambda: keyed("parity")}, {"metric": lambda: keyed("number")}, "metric.closure.key"),
    case({"metric": lambda: keyed("parity", sort_key=repr)}, {"metric": lambda: keyed("parity")}, "defaults.sort_key"),
    case({}, {"optimizers": lambda: {"s": Same([1])}}, r"optimizers.s.option: .*1.*\[1\]"),
    case(
        {"optimizers": lambda: {"s": Same(LoRAConfig(rank=4))}},
        {"optimizers": lambda: {"s": Same(LoRAConfig(rank=8))}},
        r"optimizers\.s\.option\.rank: the directory has '4', this call has '8'\n[^ ]",
    ),
    case({}, {"optimizer_compile_args": {"s": {"extra": 2}}}, "compile_args.s.extra"),
    case({}, {"trainset": numbers(12, 41)}, "trainset: .*12 examples"),
    case({}, {"valset": numbers(5)}, "valset: .*4 examples.*5 examples"),
    case({}, {"seed": 3}, "seed"),
    case({}, {"two_by_two": False}, "two_by_two"),
    case({}, {"strategy": "auto"}, "strategy"),
]


@pytest.mark.parametrize(("first", "second", "named"), DIFFERENT)
def test_another_call_is_refused_with_what_differs(
    tmp_path: Path, first: dict[str, Any], second: dict[str, Any], named: str
) -> None:
    call(tmp_path / "run", **first)
    with pytest.raises(RunDirectoryError, match=rf"holds another run; what differs:(.|\n)*{named}"):
        call(tmp_path / "run", **(first | second))
    call(tmp_path / "run", **first)


class Stops(Same):
    """Fails while the switch of its class is on."""

    on = True

    def compile(self, student: dspy.Module, *, trainset: Any, extra: Any = None) -> dspy.Module:
        if Stops.on:
            raise OSError("no space left")
        return super().compile(student, trainset=trainset, extra=extra)


def mended(run_dir: Path, **changes: Any) -> dspy.Module:
    """Two steps, of which the second one may fail."""
    options = {"strategy": "s -> x", "optimizers": lambda: {"s": Same(), "x": Stops()}}
    return call(run_dir, **(options | changes))


def test_a_step_mended_after_it_failed_goes_on_and_is_noted_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    assert [r.status for r in mended(run).report.rounds] == ["complete", "complete", "failed"]
    monkeypatch.setattr(Stops, "on", False)
    steps = {"s": Same(), "x": Stops(option=7)}
    report = mended(run, optimizers=lambda: steps, optimizer_compile_args={"x": {"extra": 3}}).report
    assert [(r.strategy, r.status) for r in report.rounds] == [(name, "complete") for name in ("", "s", "s -> x")]
    assert (steps["s"].times, steps["x"].times) == (0, 1)
    noted = json.loads((run / "run.json").read_text())["run"]
    assert (noted["optimizers"]["x"]["option"], noted["compile_args"]["x"]) == ("7", {"extra": "3"})
    with pytest.raises(RunDirectoryError, match=r"compile_args\.x\.extra(.|\n)*optimizers\.x\.option"):
        mended(run)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"optimizers": lambda: {"s": Same(2), "x": Stops()}}, r"optimizers\.s\.option"),
        ({"optimizer_compile_args": {"s": {"extra": 2}}}, r"compile_args\.s\.extra"),
        ({"seed": 3}, "seed"),
    ],
    ids=["settings of a finished step", "arguments of a finished step", "seed"],
)
def test_after_a_failed_step_what_decided_something_still_counts(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    mended(tmp_path / "run")
    with pytest.raises(RunDirectoryError, match=rf"holds another run; what differs:(.|\n)*{named}"):
        mended(tmp_path / "run", **changes)


def test_a_step_that_a_strategy_leaves_out_meanwhile_is_the_one_that_was_asked_for(tmp_path: Path) -> None:
    steps = {"s": Same(), "x": Same()}
    for strategy in ("s", "s -> x", "s", "s -> x", "s"):
        given = {"x": {"extra": 3}} if "x" in strategy else {}
        call(tmp_path, strategy=strategy, optimizers=lambda: steps, optimizer_compile_args=given)
    assert (steps["s"].times, steps["x"].times) == (1, 1)
    with pytest.raises(RunDirectoryError) as caught:
        call(tmp_path, strategy="s -> x", optimizers=lambda: {"s": Same(), "x": Same(2)})
    assert re.findall(r"^  (\S+): ", str(caught.value), re.MULTILINE) == ["compile_args.x.extra", "optimizers.x.option"]


SAME: list[dict[str, Any]] = [
    {},
    {"strategy": " s"},
    {"strategy": ["s"]},
    {"num_threads": 3},
    {"progress": True},
    {"student": lambda: program(words=["a", {"b": {"x", "y", "z"}}])},
    {"metric": lambda: closure(1.0)},
    {"metric": lambda: Graded(1.0)},
    {"metric": lambda: functools.partial(graded, weight=0.5)},
    {"optimizers": lambda: {"s": Same(threading.Lock())}},
    {"optimizers": lambda: {"s": dspy.BootstrapFewShot(metric=parity_match)}},
    {"student": lambda: program(words=Client(f"sk-{uuid.uuid4()}"))},
    {"student": lambda: program(words=dspy.Embedder("openai/x", api_key=uuid.uuid4().hex))},
]


@pytest.mark.parametrize("options", SAME, ids=lambda options: " ".join(options) or "nothing")
def test_the_same_call_made_anew_goes_on(tmp_path: Path, options: dict[str, Any]) -> None:
    base = {"strategy": "s"} if "strategy" in options else {}
    first = call(tmp_path / "run", **(options | base))
    second = call(tmp_path / "run", **options)
    assert [r.to_dict() for r in second.report.rounds] == [r.to_dict() for r in first.report.rounds]


@pytest.mark.parametrize("strategy", ["s->s", "s  ->  s", "s→s", ["s -> s"]])
def test_white_space_in_a_strategy_does_not_matter(tmp_path: Path, strategy: Any) -> None:
    call(tmp_path / "run", strategy="s -> s")
    assert len(call(tmp_path / "run", strategy=strategy).report.rounds) == 3


def test_what_the_run_itself_changed_in_metric_and_optimizer_is_no_other_call(tmp_path: Path) -> None:
    metric, step = Graded(1.0), Same()
    for times in (1, 1):
        call(tmp_path / "run", metric=lambda: metric, optimizers=lambda: {"s": step})
        assert (metric.calls, step.times, len(step.received)) == (8, times, 12)
    step.option = 2
    with pytest.raises(RunDirectoryError, match=r"optimizers\.s\.option"):
        call(tmp_path / "run", metric=lambda: metric, optimizers=lambda: {"s": step})


def test_what_an_earlier_run_changed_is_no_part_of_the_next_runs_call(tmp_path: Path) -> None:
    """A loop over seeds is killed and begins anew in another process, where all that it uses is new."""
    metric, step = Graded(1.0), Same()
    for seed in range(2):
        call(tmp_path / str(seed), metric=lambda: metric, optimizers=lambda: {"s": step}, seed=seed)
    assert (metric.calls, step.times) == (16, 2)
    noted = [json.loads((tmp_path / str(seed) / "run.json").read_text())["run"] for seed in range(2)]
    assert noted[1] == noted[0] | {"seed": 1}
    for seed in range(2):
        call(tmp_path / str(seed), metric=lambda: Graded(1.0), optimizers=lambda: {"s": Same()}, seed=seed)


@pytest.mark.parametrize("seeds", [[0, 0], [0, 1]], ids=["the same call twice", "a loop over seeds"])
def test_a_memo_of_the_metric_of_optimizers_made_anew_is_no_setting(tmp_path: Path, seeds: list[int]) -> None:
    memo: dict[int, bool] = {}

    def remembering(example: Any, prediction: Any, trace: Any = None) -> bool:
        return memo.setdefault(example.number, prediction.parity == example.parity)

    def run(seed: int) -> str:
        optimizers = {"w": LoRAFinetune(remembering)}
        call(tmp_path / str(seed), metric=lambda: remembering, optimizers=lambda: optimizers, seed=seed, strategy="w")
        noted: dict[str, Any] = json.loads((tmp_path / str(seed) / "run.json").read_text())["run"]
        return noted["optimizers"]["w"]["metric"]

    assert len({run(seed) for seed in seeds}) == 1
    memo.clear()
    assert len({run(seed) for seed in seeds}) == 1


class Working(Same):
    """Changes its option and loses what it was given, as it runs."""

    def __init__(self, option: int) -> None:
        super().__init__(option)
        self.pending = 3

    def compile(self, student: dspy.Module, *, trainset: Any, extra: Any = None) -> dspy.Module:
        self.option //= 2
        self.__dict__.pop("pending", None)
        return super().compile(student, trainset=trainset, extra=extra)


def test_what_an_optimizer_makes_of_itself_is_no_setting_and_that_of_another_one_is(tmp_path: Path) -> None:
    step = Working(4)
    for _ in range(2):
        call(tmp_path / "four", optimizers=lambda: {"s": step})
    call(tmp_path / "two", optimizers=lambda: {"s": Working(2)})
    noted = [
        json.loads((tmp_path / name / "run.json").read_text())["run"]["optimizers"]["s"] for name in ("four", "two")
    ]
    assert [(each["option"], each["pending"]) for each in noted] == [("4", "3"), ("2", "3")]
    with pytest.raises(RunDirectoryError, match=r"optimizers\.s\.option: the directory has '4', this call has '2'"):
        call(tmp_path / "four", optimizers=lambda: {"s": Working(2)})


def test_a_memo_of_the_metric_that_was_filled_elsewhere_has_to_be_emptied(tmp_path: Path) -> None:
    memo: dict[int, bool] = {}

    def remembering(example: Any, prediction: Any, trace: Any = None) -> bool:
        return memo.setdefault(example.number, prediction.parity == example.parity)

    call(tmp_path / "run", metric=lambda: remembering)
    memo[77] = True
    with pytest.raises(RunDirectoryError, match=r"(?s)closure\.memo: .*\(a memo, a counter\) has to be as it was"):
        call(tmp_path / "run", metric=lambda: remembering)
    memo.clear()
    assert len(call(tmp_path / "run", metric=lambda: remembering).report.rounds) == 2


def test_a_metric_may_keep_the_predictions_that_it_saw(tmp_path: Path) -> None:
    metric = Keeping()
    for _ in range(2):
        call(tmp_path / "run", metric=lambda: metric)
        assert len(metric.seen) == 8


def test_a_program_is_returned_where_what_the_run_left_behind_can_t_be_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    metric = Keeping(deep=100_000)
    assert len(call(tmp_path / "run", metric=lambda: metric).report.rounds) == 2
    assert "can't be told (DataError: A list is nested too deep" in caplog.text


def test_a_constant_that_the_metric_reads_is_part_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    call(tmp_path / "run", metric=lambda: graded)
    monkeypatch.setitem(globals(), "STRICT", 0.5)
    with pytest.raises(RunDirectoryError, match=r"metric\.uses\.STRICT: the directory has '1.0', this call has '0.5'"):
        call(tmp_path / "run", metric=lambda: graded)


def test_another_adapter_is_another_call(tmp_path: Path) -> None:
    call(tmp_path / "run")
    with dspy.context(adapter=dspy.ChatAdapter()):
        call(tmp_path / "run")
    with dspy.context(adapter=dspy.JSONAdapter()), pytest.raises(RunDirectoryError, match=r"adapter\.class"):
        call(tmp_path / "run")
    with (
        dspy.context(adapter=dspy.ChatAdapter(use_json_adapter_fallback=False)),
        pytest.raises(RunDirectoryError, match=r"adapter\.use_json_adapter_fallback"),
    ):
        call(tmp_path / "run")


def test_no_secret_is_noted(tmp_path: Path) -> None:
    secret = "sk-abcdefghijklmnop1234567890"

    class Keyed(Same):
        def __init__(self) -> None:
            super().__init__(option={"api_key": secret})
            self.api_key = secret

    call(tmp_path / "run", optimizers=lambda: {"s": Keyed()})
    assert secret not in (tmp_path / "run" / "run.json").read_text()
    call(tmp_path / "run", optimizers=lambda: {"s": Keyed()})


def test_how_long_an_lm_is_waited_for_is_no_other_call() -> None:
    one, patient, other = (
        lm_parts(dspy.LM("openai/x", max_tokens=most, timeout=seconds, num_retries=tries))
        for most, seconds, tries in ((9, 5, 0), (9, 60, 8), (8, 5, 0))
    )
    assert one == patient
    assert one != other


def test_threads_of_a_step_are_no_other_call(tmp_path: Path) -> None:
    for threads in (1, 2):
        arguments = {"s": {"num_threads": threads}}
        call(tmp_path / "run", optimizers=lambda: {"s": LoRAFinetune(parity_match)}, optimizer_compile_args=arguments)


def test_other_rows_in_the_same_file_are_another_call(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def trained_on(answer: str) -> None:
        write_rows([Row(({"role": "user", "content": "?"},), answer, "say", 0)], file)
        given = {"s": {"rows": file}}
        call(tmp_path / "run", optimizers=lambda: {"s": LoRAFinetune(parity_match)}, optimizer_compile_args=given)

    trained_on("even")
    trained_on("even")
    with pytest.raises(RunDirectoryError, match=r"compile_args\.s\.rows"):
        trained_on("odd")


def test_a_directory_of_a_version_that_noted_less_is_refused_in_words(tmp_path: Path) -> None:
    call(tmp_path / "run")
    header = json.loads((tmp_path / "run" / "run.json").read_text())
    del header["run"]["form"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(header))
    with pytest.raises(RunDirectoryError, match="made by another version of bettertogether"):
        call(tmp_path / "run")


def test_two_programs_that_hold_other_things_share_no_runs() -> None:
    from bettertogether.programs.behaviour import program_key

    engine = parity_engine(learner)

    def made(words: Any) -> dspy.Module:
        result = program(words=words)
        result.say.lm = plain_lm(engine)
        result.lock = None
        return result

    assert program_key(made(["a"])) == program_key(made(["a"]))
    assert program_key(made(["a"])) != program_key(made(["b"]))
    assert isinstance(engine, FakeEngine)


def test_two_engines_of_one_name_share_no_runs() -> None:
    from bettertogether.programs.behaviour import program_key

    one, other = parity_engine(learner), parity_engine(lambda request, number: True)
    made = [dspy.Predict(Parity) for _ in range(3)]
    for each, engine in zip(made, (one, one, other), strict=True):
        each.lm = plain_lm(engine)
    keys = list(map(program_key, made))
    assert keys[0] == keys[1] != keys[2]


def test_a_header_that_an_attribute_holds_as_a_pair_is_not_noted(tmp_path: Path) -> None:
    call(tmp_path / "run", student=lambda: program(words=("Authorization", "q7Secret")))
    assert "q7Secret" not in (tmp_path / "run" / "run.json").read_text()


def test_a_damaged_program_of_a_record_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    call(tmp_path / "run")
    path = tmp_path / "run" / "records.jsonl"
    *lines, last = path.read_text().splitlines()
    record = json.loads(last)
    for prompts in record["program"].values():
        prompts["signature"] = None
    path.write_text("\n".join([*lines, json.dumps(record)]) + "\n")
    with pytest.raises(RunDirectoryError, match=r"records\.jsonl: the program of 's' is damaged"):
        call(tmp_path / "run")


def test_a_run_json_whose_optimizers_are_damaged_is_refused(tmp_path: Path) -> None:
    call(tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    header = json.loads(path.read_text())
    header["run"]["optimizers"] = None
    path.write_text(json.dumps(header))
    with pytest.raises(RunDirectoryError, match=r"run\.json is damaged"):
        call(tmp_path / "run")


@pytest.mark.parametrize(("name", "own"), [("packaged_metrics", False), ("my_metrics", True)])
def test_code_that_pip_put_into_a_folder_of_any_name_counts_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, own: bool
) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("def metric(example, pred, trace=None):\n    return 1.0\n")
    (tmp_path / "some-1.0.dist-info").mkdir()
    (tmp_path / "some-1.0.dist-info" / "RECORD").write_text(
        "packaged_metrics/__init__.py,sha256=x,1\nsome-1.0.dist-info/RECORD,,\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert is_own(importlib.import_module(name).metric) is own
