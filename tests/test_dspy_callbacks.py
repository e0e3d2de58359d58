"""DSPy's own observability sees our compiles, rounds, evaluations and calls as it sees those of DSPy's optimizers."""

from __future__ import annotations

import io
from collections import Counter
from typing import Any

import dspy
import pytest
from dspy.clients.base_lm import GLOBAL_HISTORY
from dspy.teleprompt.teleprompt import Teleprompter
from dspy.utils.callback import ACTIVE_CALL_ID, BaseCallback
from fakes import learner, numbers, parity_engine, parity_match, parity_program

from bettertogether import BetterTogether, BootstrapFewShotRS, evaluate
from bettertogether.errors import TooManyErrors
from bettertogether.testing import FakeEngine


class Log(BaseCallback):
    """Every call that began, as (kind, instance, inputs, parent), and how each ended."""

    def __init__(self) -> None:
        self.begun: dict[str, tuple[str, Any, Any, str | None]] = {}
        self.ended: dict[str, tuple[Any, BaseException | None]] = {}

    def _begin(self, kind: str, call_id: str, instance: Any, inputs: Any) -> None:
        self.begun[call_id] = kind, instance, inputs, ACTIVE_CALL_ID.get()

    def _end(self, call_id: str, outputs: Any, exception: BaseException | None = None) -> None:
        self.ended[call_id] = outputs, exception

    def on_compile_start(self, call_id: str, instance: Any, inputs: Any) -> None:
        self._begin("compile", call_id, instance, inputs)

    def on_evaluate_start(self, call_id: str, instance: Any, inputs: Any) -> None:
        self._begin("evaluate", call_id, instance, inputs)

    def on_module_start(self, call_id: str, instance: Any, inputs: Any) -> None:
        self._begin("module", call_id, instance, inputs)

    def on_lm_start(self, call_id: str, instance: Any, inputs: Any) -> None:
        self._begin("lm", call_id, instance, inputs)

    on_compile_end = on_evaluate_end = on_module_end = on_lm_end = _end

    def of(self, kind: str) -> list[str]:
        """The ids of these calls, in the order that they began."""
        return [call_id for call_id, begun in self.begun.items() if begun[0] == kind]

    def names(self, kind: str) -> list[str]:
        return [type(self.begun[call_id][1]).__name__ for call_id in self.of(kind)]

    def parents(self, kind: str) -> Counter[str]:
        """What the calls of a kind were made by."""
        made_by = (self.begun[call_id][3] for call_id in self.of(kind))
        return Counter("nothing" if parent is None else self.begun[parent][0] for parent in made_by)


@pytest.fixture
def engine() -> FakeEngine:
    return parity_engine(learner)


def compiled(engine: FakeEngine, step: Teleprompter | None = None, **options: Any) -> dspy.Module:
    return BetterTogether(parity_match, p=step or BootstrapFewShotRS(parity_match, num_candidates=1)).compile(
        parity_program(engine),
        trainset=numbers(12, 40),
        valset=numbers(10),
        strategy="p",
        progress=False,
        **options,
    )


def test_an_evaluation_is_seen_with_its_results_and_its_calls_within() -> None:
    log, examples = Log(), numbers(6)
    program = parity_program(parity_engine(lambda request, number: number % 2 == 0))
    with dspy.context(callbacks=[log]):
        evaluation = evaluate(program, examples, parity_match)
    (call_id,) = log.of("evaluate")
    _, evaluator, inputs, _ = log.begun[call_id]
    assert isinstance(evaluator, dspy.Evaluate)
    assert (evaluator.devset, evaluator.metric) == (examples, parity_match)
    assert (inputs["program"], inputs["callback_metadata"]) == (program, None)
    result, error = log.ended[call_id]
    assert error is None
    assert result.score == 50.0 == 100 * evaluation.mean
    assert [(example, score) for example, _, score in result.results] == list(
        zip(examples, evaluation.scores, strict=True)
    )
    assert [prediction.parity for _, prediction, _ in result.results] == [
        trace.prediction.parity for trace in evaluation.traces
    ]
    assert (log.parents("module"), log.parents("lm")) == ({"evaluate": 6}, {"module": 6})


def test_an_example_that_fails_has_an_empty_prediction(engine: FakeEngine) -> None:
    class Fails(dspy.Module):
        def forward(self, number: int) -> Any:
            raise ValueError("no")

    log = Log()
    with dspy.context(callbacks=[log]):
        evaluate(Fails(), numbers(1), parity_match)
    (result, _), *_ = [log.ended[call_id] for call_id in log.of("evaluate")]
    ((_, prediction, score),) = result.results
    assert (prediction.toDict(), score) == ({}, 0.0)


def test_an_evaluation_that_is_given_up_ends_with_its_error(engine: FakeEngine) -> None:
    def broken(example: Any, prediction: Any, trace: Any = None) -> float:
        raise ValueError("no")

    log = Log()
    with dspy.context(callbacks=[log]), pytest.raises(TooManyErrors) as caught:
        evaluate(parity_program(engine), numbers(4), broken, max_errors=1)
    assert [log.ended[call_id] for call_id in log.of("evaluate")] == [(None, caught.value)]


def test_a_compile_shows_its_steps_and_the_score_of_every_round_and_candidate(engine: FakeEngine) -> None:
    log = Log()
    with dspy.context(callbacks=[log]):
        report = compiled(engine).report
    assert log.names("compile") == ["BetterTogether", "BootstrapFewShotRS"]
    assert [log.ended[call_id][1] for call_id in log.of("compile")] == [None, None]
    assert log.ended.keys() == log.begun.keys()
    results: dict[str, list[Any]] = {"eval_full": [], "eval_minibatch": []}
    for call_id in log.of("evaluate"):
        results[log.begun[call_id][2]["callback_metadata"]["metric_key"]].append(log.ended[call_id][0])
    assert [result.score for result in results["eval_full"]] == [100 * record.score for record in report.rounds]
    candidates = sum(len(result.results) for result in results["eval_minibatch"])
    assert candidates == report.rounds[1].details.race.calls_made


@pytest.mark.parametrize("theirs", [False, True])
def test_the_usage_of_a_compile_is_that_of_its_report(engine: FakeEngine, theirs: bool) -> None:
    # It asks in threads of DSPy's.
    step = dspy.BootstrapFewShotWithRandomSearch(parity_match, num_candidate_programs=1, num_threads=4)
    with dspy.track_usage() as tracker:
        ledger = compiled(engine, step if theirs else None).report.ledger
    usage = tracker.get_total_tokens()["local/fake"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (ledger.prompt_tokens, ledger.generated_tokens)


def test_the_last_call_of_an_evaluation_can_be_inspected(engine: FakeEngine) -> None:
    shown = io.StringIO()
    evaluate(parity_program(engine), numbers(1, 1234), parity_match)
    dspy.inspect_history(file=shown)
    assert "[[ ## number ## ]]\n1234\n" in shown.getvalue()


def test_no_history_is_kept_where_it_is_turned_off(engine: FakeEngine) -> None:
    before = list(GLOBAL_HISTORY)
    with dspy.context(disable_history=True):
        evaluate(parity_program(engine), numbers(1), parity_match)
    assert before == GLOBAL_HISTORY
