"""Traces to training rows, rendered by the very code that will render the prompt at inference.

A row's prompt is obtained by making the predictor's call with the engine swapped for one that takes down the request:
whatever adapter, field types, tools or history are in play, the training prompt is what the engine will receive.
"""

from __future__ import annotations

import copy
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import dspy
from dspy.adapters.chat_adapter import ChatAdapter
from dspy.adapters.decision import resolve_adapter
from dspy.adapters.utils import annotation_allows_none, serialize_for_json
from dspy.lm15 import Request

from ..engines.protocol import ChatMessage, LocalEngine, TrainingRow
from ..errors import DataError
from ..files import atomic_write
from ..records import DataCard, SampleRow
from ..rollouts.rollout import Call

TrainPrompt = Literal["vanilla", "optimized", "mixed"]


@dataclass(frozen=True)
class Row:
    """One call to learn, and where it comes from."""

    messages: tuple[ChatMessage, ...]
    """The prompt, as the engine receives it."""
    completion: str
    predictor: str
    example: int
    """Position of the example in the trainset."""
    label: str | None = None
    source: str = "student"
    """"student", "teacher", "sample", "rescue", or "given" for rows of the user's own."""

    @property
    def training_row(self) -> TrainingRow:
        """What the engine trains on."""
        return TrainingRow(self.messages, self.completion)

    def to_json(self) -> SampleRow:
        """Prompt-completion form that `datasets.load_dataset("json")` and trl read."""
        return {
            "prompt": list(self.messages),
            "completion": [{"role": "assistant", "content": self.completion}],
            "predictor": self.predictor,
            "example": self.example,
            "label": self.label,
            "source": self.source,
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Row:
        """Inverse of `to_json`. Raises DataError."""
        try:
            prompt = tuple({"role": m["role"], "content": m["content"]} for m in data["prompt"])
            answer = data["completion"]
            text = answer if isinstance(answer, str) else answer[-1]["content"]
            return cls(
                prompt,  # type: ignore[arg-type]
                text,
                data.get("predictor", ""),
                data.get("example", -1),
                data.get("label"),
                data.get("source", "given"),
            )
        except (KeyError, TypeError, IndexError) as error:
            raise DataError(
                f'Not a row: {json.dumps(data, default=str)[:200]} ({error!r}). A row is {{"prompt": [messages], '
                '"completion": text or [message], "predictor": name}}.'
            ) from error


class RequestTaken(BaseException):
    """Carries a request out of DSPy instead of an answer; not an Exception, so that nothing handles it as a failure."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        self.request = request


class _RequestTaker:
    """Declares what the real engine declares, and raises each request instead of answering."""

    def __init__(self, engine: LocalEngine) -> None:
        self.supported_params = engine.supported_params
        self.supports_response_schema = engine.supports_response_schema
        self.supports_function_calling = engine.supports_function_calling
        self.supports_reasoning = engine.supports_reasoning

    def complete(self, request: Request) -> Any:
        raise RequestTaken(request)


def take_request(
    predictor: dspy.Predict,
    inputs: Mapping[str, Any],
    demos: Sequence[Any],
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Any = None,
) -> Request:
    """The request that the predictor's LM would be sent for these inputs and demos; `adapter` None takes the one in
    use."""
    taker = copy.copy(predictor)
    taker.lm = predictor.lm.copy(engine=_RequestTaker(predictor.lm.engine), cache=False, callbacks=[])
    taker.demos = list(demos)
    taker.callbacks = []
    # Of a predictor that is a program by itself, an optimizer may have replaced it.
    taker.__dict__.pop("forward", None)
    used = {"adapter": adapter or dspy.settings.adapter}
    try:
        with dspy.context(callbacks=[], trace=[], disable_history=True, send_stream=None, **used):
            taker(**inputs, **({"config": dict(config)} if config else {}))
    except RequestTaken as taken:
        return taken.request
    raise DataError(f"a {type(predictor).__name__} answers without calling its LM, so it has no prompt")


def render_prompt(
    predictor: dspy.Predict,
    engine: LocalEngine,
    inputs: Mapping[str, Any],
    demos: Sequence[Any],
    *,
    config: Mapping[str, Any] | None = None,
    adapter: Any = None,
) -> tuple[ChatMessage, ...]:
    """The chat messages that `engine` receives when the predictor is called."""
    return engine.messages(take_request(predictor, inputs, demos, config=config, adapter=adapter))


def render_completion(
    predictor: dspy.Predict,
    inputs: Mapping[str, Any],
    outputs: Mapping[str, Any],
    *,
    adapter: Any = None,
    text: str | None = None,
) -> str:
    """The answer as the adapter in use writes it; where that is not read back as the same outputs, or the adapter
    can't write one, `text`, which is how the LM wrote it. Raises DataError when neither is read back."""
    signature = predictor.signature
    lm = predictor.lm
    adapter = adapter or dspy.settings.adapter or ChatAdapter()
    adapter = resolve_adapter(lm, adapter, signature, predictor.fields, signature)
    processed = adapter._call_preprocess(lm, {}, signature, dict(inputs))
    missing = [
        name
        for name, info in processed.output_fields.items()
        if outputs.get(name) is None and not annotation_allows_none(info.annotation)
    ]
    if missing:
        raise DataError(f"output fields missing: {missing}")
    try:
        return _checked(adapter, processed, outputs, _written(adapter, processed, outputs))
    except DataError:
        if text is None:
            raise
        return _checked(adapter, processed, outputs, text)


def _written(adapter: Any, signature: type[dspy.Signature], outputs: Mapping[str, Any]) -> str:
    try:
        return str(adapter.format_assistant_message_content(signature, dict(outputs)))
    except NotImplementedError as error:
        raise DataError(
            f"{type(adapter).__name__} can't write an answer: define its format_assistant_message_content"
        ) from error


def _checked(adapter: Any, signature: type[dspy.Signature], outputs: Mapping[str, Any], completion: str) -> str:
    try:
        parsed = adapter.parse(signature, completion)
    except Exception as error:
        raise DataError(f"{type(adapter).__name__} can't read back the answer it wrote") from error
    if any(str(parsed[name]).strip() != str(outputs[name]).strip() for name in signature.output_fields):
        raise DataError(f"{type(adapter).__name__} reads the answer back as something else")
    return completion


def without_example(demos: Sequence[Any], inputs: Mapping[str, Any]) -> list[Any]:
    """The demos that don't show these very inputs, so that a row's prompt does not hold its own answer."""
    # As JSON or text, which is how they are shown: arrays and tables can't be compared.
    asked = {name: serialize_for_json(value) for name, value in inputs.items()}
    return [demo for demo in demos if any(serialize_for_json(demo.get(n)) != shown for n, shown in asked.items())]


def prompt_variants(predictor: dspy.Predict, call: Call, train_prompt: TrainPrompt) -> list[list[Any]]:
    """The demos of each prompt that a call gives a row for. Raises DataError for a call with demos of its own that
    show its very inputs."""
    if call.demos is not None:
        if len(without_example(call.demos, call.inputs)) < len(call.demos):
            raise DataError("the demos that the call was given show its own inputs")
        return [list(call.demos)]
    if train_prompt == "vanilla":
        return [[]]
    optimized = without_example(predictor.demos, call.inputs)
    return [optimized] if train_prompt == "optimized" or not optimized else [[], optimized]


def rows_of_call(
    predictor: dspy.Predict,
    engine: LocalEngine,
    call: Call,
    train_prompt: TrainPrompt,
    **origin: Any,
) -> list[Row]:
    """The rows of one call; `origin` gives example, label and source. Raises DataError with the reason to drop it."""
    if call.cut or call.unfit:
        raise DataError("cut at max_tokens" if call.cut else call.unfit)
    if call.signature is not None:
        predictor = copy.copy(predictor)
        predictor.signature = call.signature
    completion = render_completion(predictor, call.inputs, call.outputs, adapter=call.adapter, text=call.text)
    rows = []
    for demos in prompt_variants(predictor, call, train_prompt):
        messages = render_prompt(predictor, engine, call.inputs, demos, config=call.config, adapter=call.adapter)
        length = len(engine.prompt_tokens(messages)) + len(engine.completion_tokens(completion))
        if length > engine.max_length:
            raise DataError(f"longer than the model's context of {engine.max_length} tokens")
        rows.append(Row(messages, completion, call.predictor, **origin))
    return rows


def make_data_card(
    rows: Sequence[Row],
    engines: Mapping[str, LocalEngine],
    *,
    dropped: Mapping[tuple[str, str], int],
    examples: int,
    warnings: Iterable[str] = (),
) -> DataCard:
    """Count the rows; `engines` maps predictor names to engines, `dropped` (predictor, reason) to counts."""
    lengths: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        engine = engines.get(row.predictor) or next(iter(engines.values()))
        lengths["prompt"].append(len(engine.prompt_tokens(row.messages)))
        lengths["completion"].append(len(engine.completion_tokens(row.completion)))
    by_reason: Counter[str] = Counter()
    by_predictor: Counter[str] = Counter()
    for (predictor, reason), count in dropped.items():
        by_reason[reason] += count
        by_predictor[predictor] += count
    step = max(1, len(rows) // 5)
    return DataCard(
        kept_by_predictor=dict(Counter(row.predictor for row in rows)),
        kept_by_label=dict(Counter(row.label for row in rows if row.label is not None)),
        kept_by_source=dict(Counter(row.source for row in rows)),
        dropped_by_reason=dict(by_reason.most_common()),
        dropped_by_predictor=dict(by_predictor),
        examples=examples,
        examples_covered=len({row.example for row in rows}),
        prompt_tokens=_spread(lengths["prompt"]),
        completion_tokens=_spread(lengths["completion"]),
        samples=tuple(row.to_json() for row in rows[::step][:5]),
        warnings=tuple(warnings),
    )


def _spread(lengths: list[int]) -> dict[str, int]:
    ordered = sorted(lengths)
    return {"min": ordered[0], "median": ordered[len(ordered) // 2], "max": ordered[-1]} if ordered else {}


def balance_labels(labels: Sequence[str | None], wanted: Sequence[str | None], max_repeat: int = 3) -> list[int]:
    """Positions of `labels`, repeated or left out so that their shares become those of `wanted`.

    A label is repeated at most `max_repeat` times and the total is as large as that allows. Without labels, or where
    a label of `wanted` has no row at all, the others keep their shares. Order is kept.
    """
    positions: dict[str, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        if label is not None:
            positions[label].append(position)
    wanted_counts = Counter(label for label in wanted if label in positions)
    if len(positions) < 2 or wanted_counts.keys() != positions.keys():
        return list(range(len(labels)))
    scale = min(
        max(len(members) / wanted_counts[label] for label, members in positions.items()),
        min(max_repeat * len(members) / wanted_counts[label] for label, members in positions.items()),
    )
    chosen = [position for position, label in enumerate(labels) if label is None]
    for label, members in positions.items():
        target = max(1, round(scale * wanted_counts[label]))
        chosen.extend(members[i % len(members)] for i in range(target))
    return sorted(chosen)


def write_rows(rows: Iterable[Row], path: Path) -> Path:
    """Write rows as JSON lines that `datasets.load_dataset("json")` reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, "".join(json.dumps(row.to_json(), ensure_ascii=False) + "\n" for row in rows))
    return path


def read_rows(path: Path) -> list[Row]:
    """Rows from JSON lines. Raises DataError naming the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read ({error}): give a file of JSON lines, one row each.") from error
    rows = []
    # Not splitlines(): JSON strings may hold line separators other than the newline.
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(Row.from_json(json.loads(line)))
        except (json.JSONDecodeError, DataError) as error:
            raise DataError(f"{path} line {number}: {error}") from error
    return rows
