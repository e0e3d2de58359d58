"""A captured prompt is what the engine receives, and an answer is written so that it is read back."""

from __future__ import annotations

import enum
import random
from typing import Any, Literal

import dspy
import pytest
from fakes import Parity, numbers, parity_engine, parity_program, plain_lm, predictor_over
from pydantic import BaseModel
from tries import call_rows

from bettertogether.errors import DataError
from bettertogether.rollouts.runner import Runner
from bettertogether.steps.demo_examples import without_example
from bettertogether.steps.prompt_capture import _is_same, render_completion, take_request
from bettertogether.testing import FakeEngine


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


class Wheel(BaseModel):
    size: int
    label: str | None = None


class Bike(BaseModel):
    name: str
    wheels: list[Wheel]


class Nested(dspy.Signature):
    """Describe the bike."""

    bike: Bike = dspy.InputField()
    spare: list[Wheel] = dspy.OutputField()
    better: Bike = dspy.OutputField(desc="a better one")


class Plain(dspy.Signature):
    """All kinds of plain fields."""

    text: str = dspy.InputField()
    choice: Literal["a", "b"] = dspy.OutputField()
    flag: bool = dspy.OutputField()
    share: float = dspy.OutputField()
    counts: list[int] = dspy.OutputField()
    table: dict[str, int] = dspy.OutputField()
    color: Color = dspy.OutputField()
    note: str | None = dspy.OutputField()


class Thinking(dspy.Signature):
    """Think."""

    question: str = dspy.InputField()
    reasoning: dspy.Reasoning = dspy.OutputField()
    answer: str = dspy.OutputField()


class Talk(dspy.Signature):
    """Go on."""

    history: dspy.History = dspy.InputField()
    question: str = dspy.InputField()
    answer: str = dspy.OutputField()


class Tools(dspy.Signature):
    """Use the tools."""

    question: str = dspy.InputField()
    tools: list[dspy.Tool] = dspy.InputField()
    outputs: dspy.ToolCalls = dspy.OutputField()


def weather(city: str, day: int = 0) -> str:
    """The weather."""
    return f"{city} {day}"


HISTORY = dspy.History(messages=[{"question": "one?", "answer": "1"}, {"question": "two?", "answer": "2"}])
TOOL_CALLS = dspy.ToolCalls.from_dict_list([{"name": "weather", "args": {"city": "Oslo"}}])
BIKE = Bike(name='Ö\'Brien "x"', wheels=[Wheel(size=28), Wheel(size=26, label="rear")])
PLAIN_OUTPUTS = {
    "choice": "b",
    "flag": True,
    "share": 0.25,
    "counts": [1, 2],
    "table": {"x": 1},
    "color": Color.BLUE,
    "note": None,
}
CASES: dict[str, tuple[type[dspy.Signature], dict[str, Any], dict[str, Any]]] = {
    "plain": (Plain, {"text": "line one\n\n  line two"}, PLAIN_OUTPUTS),
    "optional given": (Plain, {"text": "ü 日本"}, {**PLAIN_OUTPUTS, "note": "a note\nof two lines", "flag": False}),
    "nested": (Nested, {"bike": BIKE}, {"spare": [Wheel(size=20)], "better": BIKE}),
    "reasoning": (Thinking, {"question": "why?"}, {"reasoning": dspy.Reasoning(content="So\nit is."), "answer": "so"}),
    "history": (Talk, {"history": HISTORY, "question": "three?"}, {"answer": "3"}),
    "tools": (Tools, {"question": "Oslo?", "tools": [dspy.Tool(weather)]}, {"outputs": TOOL_CALLS}),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> tuple[type[dspy.Signature], dict[str, Any], dict[str, Any]]:
    return CASES[request.param]


def answering(adapter: dspy.Adapter, signature: type[dspy.Signature], outputs: dict[str, Any]) -> FakeEngine:
    """An engine that answers with these outputs in the adapter's own format."""
    return FakeEngine(lambda _: adapter.format_assistant_message_content(signature, dict(outputs)))


def test_a_rows_prompt_is_byte_for_byte_what_the_engine_received(adapter: dspy.Adapter, case: Any) -> None:
    signature, inputs, outputs = case
    engine = answering(adapter, signature, outputs)
    program = predictor_over(engine, signature)
    run = Runner(program).run(dspy.Example(**inputs).with_inputs(*inputs))
    assert run.error is None
    (row,) = call_rows(program, engine, run.calls[0])
    (request,) = engine.requests
    assert row.messages == request.messages
    assert engine.prompt_tokens(row.messages) == engine.prompt_tokens(request.messages)


def test_a_rows_completion_is_read_back_as_the_same_answer(adapter: dspy.Adapter, case: Any) -> None:
    signature, inputs, outputs = case
    engine = answering(adapter, signature, outputs)
    program = predictor_over(engine, signature)
    completion = render_completion(program, inputs, outputs)
    again = predictor_over(FakeEngine(lambda _: completion), signature)(**inputs)
    assert {name: str(again[name]) for name in outputs} == {name: str(value) for name, value in outputs.items()}


def test_with_demos_a_rows_prompt_is_what_the_engine_receives_too(adapter: dspy.Adapter, case: Any) -> None:
    signature, inputs, outputs = case
    first_input = next(name for name in inputs if name not in ("history", "tools"))
    other = "another" if isinstance(inputs[first_input], str) else Bike(name="other", wheels=[])
    demos = [dspy.Example(augmented=True, **{**inputs, first_input: other}, **outputs)]
    engine = answering(adapter, signature, outputs)
    program = predictor_over(engine, signature, demos)
    run = Runner(program).run(dspy.Example(**inputs).with_inputs(*inputs))
    (row,) = call_rows(program, engine, run.calls[0], "optimized")
    assert row.messages == engine.requests[0].messages
    assert len(row.messages) >= 4


VALUES: dict[Any, list[Any]] = {
    str: ["x", "", "two\nlines ", "[[ ## a ## ]]", '{"a": 1}', "<b>ü</b>", "日本 🙂", "[x]", "None", " 3"],
    int: [0, -7, 10**12],
    float: [0.5, -3.0, 1e-9],
    bool: [True, False],
    list[str]: [[], ["a", "b\nc"], ['"']],
    dict[str, Any]: [{}, {"k": [1, None, "v"]}],
    Literal["a", "b c"]: ["a", "b c"],
    Color: list(Color),
    Wheel: [Wheel(size=1), Wheel(size=2, label="l")],
    list[Wheel]: [[], [Wheel(size=3)]],
    str | None: [None, "text"],
    dspy.Reasoning: [dspy.Reasoning(content="So\nit is.")],
    dspy.Code: [dspy.Code(code="print(1)\n")],
}
AS_INPUT = [kind for kind in VALUES if kind not in (dspy.Reasoning,)]


def random_case(seed: int) -> tuple[type[dspy.Signature], dict[str, Any], dict[str, Any], list[dspy.Example]]:
    """A signature with fields of all kinds, inputs and outputs for it, and up to two demos."""
    rng = random.Random(seed)
    inputs = {f"in_{i}": rng.choice(AS_INPUT) for i in range(rng.randint(1, 3))}
    outputs = {f"out_{i}": rng.choice(list(VALUES)) for i in range(rng.randint(1, 3))}
    fields = {name: (kind, dspy.InputField()) for name, kind in inputs.items()}
    fields |= {name: (kind, dspy.OutputField(desc=rng.choice(["", "a desc"]))) for name, kind in outputs.items()}

    def some(kinds: dict[str, Any]) -> dict[str, Any]:
        return {name: rng.choice(VALUES[kind]) for name, kind in kinds.items()}

    given = [dspy.Example(augmented=True, **some(inputs | outputs)) for _ in range(rng.randint(0, 2))]
    asked = some(inputs)
    return dspy.Signature(fields, "Do.\nIt."), asked, some(outputs), without_example(given, asked)


@pytest.mark.parametrize("seed", range(40))
def test_the_row_of_any_call_is_what_was_sent_and_reads_back(adapter: dspy.Adapter, seed: int) -> None:
    signature, inputs, outputs, demos = random_case(seed)
    engine = answering(adapter, signature, outputs)
    program = predictor_over(engine, signature, demos)
    (call,) = Runner(program).run(dspy.Example(**inputs).with_inputs(*inputs)).calls
    (row,) = call_rows(program, engine, call, "optimized")
    assert row.messages == engine.requests[0].messages
    again = predictor_over(FakeEngine(lambda _: row.completion), signature)(**inputs)
    assert [str(again[name]).strip() for name in outputs] == [str(call.outputs[name]).strip() for name in outputs]


def test_arrays_and_tables_as_inputs_are_told_apart() -> None:
    numpy = pytest.importorskip("numpy")
    fields = {"number": (int, dspy.InputField()), "x": (Any, dspy.InputField()), "parity": (str, dspy.OutputField())}
    engine = parity_engine(lambda *_: True)
    demos = [dspy.Example(number=n, x=numpy.arange(n, n + 3), parity="odd") for n in (1, 2)]
    program = predictor_over(engine, dspy.Signature(fields), demos)
    inputs = {"number": 1, "x": numpy.arange(1, 4)}
    (call,) = Runner(program).run(dspy.Example(**inputs).with_inputs("number", "x")).calls
    (row,) = call_rows(program, engine, call, "optimized")
    assert "[2 3 4]" in row.messages[1]["content"]
    assert len(row.messages) == 4
    assert without_example(demos, {"number": 2, "x": numpy.arange(1, 4)}) == demos


def test_chain_of_thought_rows_hold_the_reasoning(adapter: dspy.Adapter) -> None:
    program = dspy.ChainOfThought("question -> answer")
    signature = program.predict.signature
    engine = answering(adapter, signature, {"reasoning": "Two and two.", "answer": "4"})
    program.set_lm(plain_lm(engine))
    run = Runner(program).run(dspy.Example(question="2+2?").with_inputs("question"))
    (row,) = call_rows(program.predict, engine, run.calls[0])
    assert row.messages == engine.requests[0].messages
    assert "Two and two." in row.completion
    assert row.completion.index("Two and two.") < row.completion.index("4")


def test_the_chat_completion_is_the_format_that_the_prompt_asks_for() -> None:
    program = predictor_over(parity_engine(lambda *_: True), Parity)
    completion = render_completion(program, {"number": 1}, {"parity": "odd"})
    assert completion == "[[ ## parity ## ]]\nodd\n\n[[ ## completed ## ]]\n"


def test_an_answer_that_came_in_the_second_format_is_a_row_in_the_first() -> None:
    engine = FakeEngine(lambda request: "no" if request.schema is None else {"parity": "odd"})
    program = predictor_over(engine, Parity)
    run = Runner(program).run(numbers(1, start=1)[0])
    (row,) = call_rows(program, engine, run.calls[0])
    assert row.messages == engine.requests[0].messages
    assert row.completion.startswith("[[ ## parity ## ]]")


def test_an_answer_with_the_adapters_own_marker_in_it_is_dropped() -> None:
    program = predictor_over(FakeEngine(lambda _: ""), "question -> answer")
    with pytest.raises(DataError, match="ChatAdapter"):
        render_completion(program, {"question": "q"}, {"answer": "one\n[[ ## answer ## ]]\ntwo"})


def test_half_an_emoji_is_learned_only_as_the_escape_that_the_lm_wrote() -> None:
    program = predictor_over(FakeEngine(lambda _: ""), "question -> answer")
    written, answer = '{"answer": "\\ud83d"}', {"answer": "\ud83d"}
    assert render_completion(program, {"question": "q"}, answer, adapter=dspy.JSONAdapter(), text=written) == written
    with pytest.raises(DataError, match="half of an emoji"):
        render_completion(program, {"question": "q"}, answer, adapter=dspy.JSONAdapter())


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_an_equal_set_in_another_order_is_the_same_answer(adapter: dspy.Adapter) -> None:
    found = set(range(100))
    for number in range(100):
        if number not in (7, 8):
            found.discard(number)
    assert str(found) != str({7, 8})
    program = predictor_over(FakeEngine(lambda _: ""), "question -> found: set[int]")
    assert "7" in render_completion(program, {"question": "q"}, {"found": found}, adapter=adapter)


def test_what_equality_has_no_one_answer_for_is_another_answer() -> None:
    numpy = pytest.importorskip("numpy")
    assert not _is_same(numpy.arange(2), numpy.arange(2) + 1)


def test_a_missing_output_field_is_a_reason_to_drop_the_call() -> None:
    program = predictor_over(FakeEngine(lambda _: ""), Parity)
    with pytest.raises(DataError, match=r"output fields missing: \['parity'\]"):
        render_completion(program, {"number": 1}, {})


def test_taking_a_request_makes_no_call_no_trace_and_no_history() -> None:
    engine = parity_engine(lambda *_: True)
    program = parity_program(engine)
    with dspy.context(trace=[]):
        take_request(program, {"number": 1}, [])
        assert dspy.settings.trace == []
    assert engine.requests == []
    assert program.lm.history == []
    assert program.history == []


def test_taking_a_request_works_within_a_stream_and_with_callbacks() -> None:
    class Counting(dspy.utils.callback.BaseCallback):
        calls = 0

        def on_lm_start(self, *arguments: Any, **keywords: Any) -> None:
            self.calls += 1

    counting = Counting()
    program = parity_program(parity_engine(lambda *_: True))
    program.lm.callbacks = [counting]
    with dspy.context(callbacks=[counting], send_stream=object()):
        request = take_request(program, {"number": 1}, [])
    assert request.model == "local/fake"
    assert counting.calls == 0


def test_a_predictor_that_answers_without_its_lm_has_no_prompt() -> None:
    class Constant(dspy.Predict):
        def forward(self, **inputs: Any) -> dspy.Prediction:
            return dspy.Prediction(parity="odd")

    program = Constant(Parity)
    program.set_lm(plain_lm(parity_engine(lambda *_: True)))
    with pytest.raises(DataError, match="a Constant answers without calling its LM"):
        take_request(program, {"number": 1}, [])


def test_a_predictor_whose_forward_was_replaced_has_the_prompt_of_its_class() -> None:
    program = parity_program(parity_engine(lambda *_: True))
    prompt = take_request(program, {"number": 1}, [])
    program.forward = lambda **inputs: dspy.Prediction(parity="odd")
    assert take_request(program, {"number": 1}, []) == prompt


def test_a_prompt_that_is_only_looked_at_warns_of_no_input(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr("dspy.predict.predict.logger.warning", lambda text, *_: said.append(text))
    program = dspy.Predict("passages: list[str], question -> answer")
    program.set_lm(plain_lm(FakeEngine(lambda request: {"answer": "a"})))
    take_request(program, {"passages": "", "question": "q"}, [])
    assert said == []
    assert program(passages="", question="q").answer == "a"
    assert len(said) == 1
