"""A task with a known best answer, and small programs for it: is this number even or odd?"""

from __future__ import annotations

import json
import re
import threading
import time
import types
from collections.abc import Callable, Iterable
from typing import Any, Literal

import dspy
from dspy.lm15 import Request, Response

from bettertogether.callbacks import Callback, TrainingEvent
from bettertogether.lm import LocalLM, engine_lm
from bettertogether.records import PromptDetails, StepRecord
from bettertogether.steps.step import StepResult
from bettertogether.testing import Answer, FakeEngine, FakeRequest


class Parity(dspy.Signature):
    """Say whether the number is even or odd."""

    number: int = dspy.InputField()
    parity: Literal["even", "odd"] = dspy.OutputField()


def right(number: int) -> str:
    return "even" if number % 2 == 0 else "odd"


def wrong(number: int) -> str:
    return right(number + 1)


def placeless(text: object) -> str:
    """What is said of errors, without the places in the tests that raised them."""
    return re.sub(r" \(test_\w+\.py:\d+ in \w+\)", "", str(text))


def numbers(count: int, start: int = 0) -> list[dspy.Example]:
    """Examples `start` .. `start + count - 1`: as many even as odd."""
    return [dspy.Example(number=n, parity=right(n)).with_inputs("number") for n in range(start, start + count)]


ONE = numbers(1, start=1)[0]


def parity_match(example: dspy.Example, prediction: dspy.Prediction, trace: Any = None) -> bool:
    return bool(example.parity == prediction.parity)


def field_of(request: FakeRequest, name: str) -> str:
    """The value of an input field in the last user message, in the Chat, JSON and XML adapters."""
    for pattern in (rf"\[\[ ## {name} ## \]\]\n(.*?)\n\n", rf"<{name}>\n(.*?)\n</{name}>"):
        if found := re.search(pattern, request.user + "\n\n", re.DOTALL):
            return found.group(1).strip()
    raise AssertionError(f"no {name} in {request.user}")


def number_of(request: FakeRequest) -> int:
    return int(field_of(request, "number"))


def reply(request: FakeRequest, **outputs: Any) -> str:
    """Output fields in the format that the request asks for."""
    if "JSON object" in request.user:
        return json.dumps(outputs)
    if "XML tags" in request.user:
        return "\n".join(f"<{name}>\n{value}\n</{name}>" for name, value in outputs.items())
    parts = [f"[[ ## {name} ## ]]\n{_text(value)}" for name, value in outputs.items()]
    return "\n\n".join([*parts, "[[ ## completed ## ]]"])


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def parity_engine(knows: Callable[[FakeRequest, int], bool], **options: Any) -> FakeEngine:
    """An engine that answers right where `knows(request, number)`, wrong elsewhere, in whatever format is asked."""

    def answer(request: FakeRequest) -> Answer:
        number = number_of(request)
        return reply(request, parity=right(number) if knows(request, number) else wrong(number))

    return FakeEngine(answer, **options)


def learner(request: FakeRequest, number: int) -> bool:
    """Knows a third of the numbers; two thirds with demos in the prompt; after training what it was trained on, and
    every number below 30."""
    if request.learned is not None or request.trained_on:
        return number < 30 or request.learned is not None
    return number % 3 == 0 or (request.demos > 0 and number % 3 == 1)


def plain_lm(engine: FakeEngine, model: str | None = None, **options: Any) -> LocalLM:
    """An LM without DSPy's cache, so that every call reaches the engine."""
    return engine_lm(engine, model, **{"cache": False, "temperature": 0.0, **options})


def parity_program(engine: FakeEngine, **options: Any) -> dspy.Predict:
    return with_lm(plain_lm(engine, **options))


def with_lm(lm: Any) -> dspy.Predict:
    program = dspy.Predict(Parity)
    program.set_lm(lm)
    return program


class TwoSteps(dspy.Module):
    """Two predictors: a remark about the number, then its parity."""

    def __init__(self) -> None:
        super().__init__()
        self.remark = dspy.Predict("number: int -> remark: str")
        self.decide = dspy.Predict("number: int, remark: str -> parity: str")

    def forward(self, number: int) -> dspy.Prediction:
        remark = self.remark(number=number).remark
        return self.decide(number=number, remark=remark)


def two_step_engine(knows: Callable[[FakeRequest, int], bool], **options: Any) -> FakeEngine:
    """Answers both predictors of `TwoSteps`."""

    def answer(request: FakeRequest) -> Answer:
        number = number_of(request)
        if "1. `parity`" not in request.system:
            return reply(request, remark=f"{number} ends in {number % 10}")
        return reply(request, parity=right(number) if knows(request, number) else wrong(number))

    return FakeEngine(answer, **options)


def two_step_program(engine: FakeEngine, **options: Any) -> TwoSteps:
    program = TwoSteps()
    program.set_lm(plain_lm(engine, **options))
    return program


class OtherEngine:
    """A custom engine that is no `LocalEngine`: what an API behind DSPy looks like."""

    def __init__(self, answer: Callable[[FakeRequest], Answer]) -> None:
        self.fake = FakeEngine(answer, base_name="api")

    def complete(self, request: Any) -> Any:
        return self.fake.complete(request)


def api_lm(answer: Callable[[FakeRequest], Answer], **options: Any) -> dspy.LM:
    """An LM over `OtherEngine`; `api_lm(...).engine.fake.requests` counts its calls."""
    return dspy.LM("local/api", engine=OtherEngine(answer), cache=False, **options)


class PaidLM(dspy.BaseLM):
    """Answers about parity as a provider behind LiteLLM does; `price` is US dollars an answer, None where LiteLLM knows
    none."""

    def __init__(self, price: float | None) -> None:
        super().__init__("openai/paid", cache=False)
        self.price = price

    def forward(self, prompt: Any = None, messages: Any = None, **options: Any) -> Any:
        number = re.findall(r"\[\[ ## number ## \]\]\n(\d+)", messages[-1]["content"])[0]
        text = f"[[ ## parity ## ]]\n{right(int(number))}\n\n[[ ## completed ## ]]"
        return types.SimpleNamespace(
            choices=[types.SimpleNamespace(message=types.SimpleNamespace(content=text), finish_reason="stop")],
            usage={"prompt_tokens": 10, "completion_tokens": 2},
            model=self.model,
            _hidden_params={"response_cost": self.price},
        )

    async def aforward(self, *arguments: Any, **options: Any) -> Any:
        return self.forward(*arguments, **options)


def models(requests: Iterable[FakeRequest]) -> set[str]:
    return {request.model for request in requests}


def outputs_of(request: FakeRequest) -> dict[str, str]:
    """Output fields that a prompt asks for, with their types as text."""
    section = request.system.partition("Your output fields are:")[2].partition("All interactions")[0]
    return dict(re.findall(r"^\d+\. `(\w+)` \((.*?)\):", section, re.MULTILINE))


def plausible(request: FakeRequest) -> str:
    """Something for every output field of a prompt that an optimizer wrote to get a proposal."""
    outputs = outputs_of(request)
    if not outputs:
        return "```\nSay whether the number is even or odd, carefully.\n```"
    values: dict[str, Any] = {}
    for name, kind in outputs.items():
        values[name] = {"self": "Think."} if kind.startswith("dict") else f"Say even or odd, carefully ({name})."
    return reply(request, **values)


def proposing_engine(knows: Callable[[FakeRequest, int], bool], **options: Any) -> FakeEngine:
    """`parity_engine` that answers the proposal prompts of DSPy's optimizers too."""

    def answer(request: FakeRequest) -> Answer:
        if set(outputs_of(request)) != {"parity"}:
            return plausible(request)
        number = number_of(request)
        return reply(request, parity=right(number) if knows(request, number) else wrong(number))

    return FakeEngine(answer, **options)


def careful(request: FakeRequest, number: int) -> bool:
    """What `learner` knows, and every number below 20 with the instructions of a proposal."""
    return learner(request, number) or ("carefully" in request.system and number < 20)


def prompt_details(done: StepResult | StepRecord | None) -> PromptDetails:
    """What a prompt step did, by its result or its record."""
    assert done is not None
    assert isinstance(done.details, PromptDetails)
    return done.details


def wait_for(condition: Callable[[], bool], seconds: float = 10.0) -> bool:
    """Whether a condition comes true in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def predictor_over(engine: FakeEngine, signature: Any, demos: list[Any] | None = None) -> dspy.Predict:
    predictor = dspy.Predict(signature)
    predictor.set_lm(plain_lm(engine))
    predictor.demos = demos or []
    return predictor


class CutEngine(FakeEngine):
    """Answers that end at max_tokens for every third number. One request at a time, so that the last is this one."""

    _in_turn = threading.Lock()

    def complete(self, request: Request) -> Response:
        with self._in_turn:
            response = super().complete(request)
            cut = number_of(self.requests[-1]) % 3 == 0
        return Response(None, response.model, response.message, "length" if cut else "stop", response.usage)


class FakeMLflow(types.ModuleType):
    """Keeps the calls of any of its functions."""

    def __init__(self) -> None:
        super().__init__("mlflow")
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any, **options: Any) -> None:
            self.calls.append((name, *arguments, *options.values()))

        return call


class TrainingWatch(Callback):
    """Keeps what is told of a training."""

    def __init__(self) -> None:
        self.events: list[TrainingEvent] = []

    def on_training(self, event: TrainingEvent) -> None:
        self.events.append(event)
