"""Demos come back from JSON with their types, so that a restored prompt is the one that was scored."""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import enum
import fractions
import json
import math
import os
import pathlib
import subprocess
import sys
import uuid
from collections import Counter, OrderedDict, defaultdict, namedtuple
from pathlib import Path
from typing import Any, Literal, NamedTuple

import dspy
import numpy as np
import pandas as pd
import pydantic
import pytest
from fakes import plain_lm
from saved import fresh_engine
from typing_extensions import TypedDict

from bettertogether import load, save
from bettertogether.errors import ArtifactError
from bettertogether.programs.demo_values import decode_demos, encode_demos
from bettertogether.programs.program import load_prompts, prompts_state


class Color(enum.Enum):
    RED = "red"
    BLUE = 7


class Level(enum.IntEnum):
    LOW = 1


class Rights(enum.Flag):
    READ = 1
    WRITE = 2


class Size(enum.StrEnum):
    SMALL = "s"


class Point(NamedTuple):
    x: int
    day: datetime.date


Pair = namedtuple("Pair", ["left", "right"])


class Part(pydantic.BaseModel):
    name: str = pydantic.Field(alias="partName", default="")
    color: Color = Color.RED
    made: datetime.date | None = None
    _seen: int = pydantic.PrivateAttr(default=3)


class Open(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    size: int = 0

    @pydantic.field_validator("size")
    @classmethod
    def _twice(cls, size: int) -> int:
        return 2 * size


class Many(pydantic.RootModel[list[Color]]):
    pass


class Box(pydantic.BaseModel):
    parts: dict[str, list[Part]] = {}
    shape: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class Line:
    start: Point
    colors: frozenset[Color] = frozenset()


@dataclasses.dataclass(slots=True)
class Slotted:
    size: decimal.Decimal


class Record(TypedDict):
    color: Color


class Unmentioned(pydantic.BaseModel):
    day: datetime.date


class Derived(Part):
    more: int = 1


class Named:
    def __str__(self) -> str:
        return "a name"


DAY = datetime.date(2024, 1, 2)
MOMENT = datetime.datetime(2024, 1, 2, 3, 4, 5, 6)

EXACT: list[tuple[Any, Any]] = [
    (Color, Color.RED),
    (Level, Level.LOW),
    (Size, Size.SMALL),
    (list[Color], [Color.RED, Color.BLUE]),
    (dict[Color, int], {Color.RED: 1}),
    (dict[int, str], {1: "a"}),
    (dict[str, Any], {"$type": "date", "value": "2024-01-02"}),
    (dict[str, Any], {"$set": {"a": 1}}),
    (dict[str, list[int]], defaultdict(list, a=[1])),
    (dict[datetime.date, int], defaultdict(None, {DAY: 1})),
    (Color | None, None),
    (Literal[Color.RED], Color.RED),
    (datetime.date, DAY),
    (datetime.datetime, MOMENT),
    (datetime.datetime, MOMENT.replace(tzinfo=datetime.UTC)),
    (datetime.datetime, MOMENT.replace(tzinfo=datetime.timezone(datetime.timedelta(hours=5.5)))),
    (datetime.time, datetime.time(1, 2, 3)),
    (datetime.timedelta, datetime.timedelta(days=-1, seconds=5, microseconds=7)),
    (uuid.UUID, uuid.UUID(int=5)),
    (set[str], {"a", "b", "c"}),
    (frozenset[int], frozenset({3, 1})),
    (set[Color], {Color.RED}),
    (set[int], {7, 15}),
    (frozenset[int], frozenset([7, 15])),
    (list[set[int]], [{7, 15}]),
    (tuple[int, str], (1, "a")),
    (list[tuple[int, datetime.date]], [(1, DAY)]),
    (bytes, b"\x00\xffa"),
    (decimal.Decimal, decimal.Decimal("1.10")),
    (complex, 1 - 2j),
    (Path, Path("/a/b")),
    (pathlib.PurePosixPath, pathlib.PurePosixPath("a")),
    (pathlib.PureWindowsPath, pathlib.PureWindowsPath("c:\\a")),
    (pydantic.HttpUrl, pydantic.HttpUrl("https://example.org/a?b=c")),
    (pydantic.AnyUrl, pydantic.AnyUrl("ftp://example.org")),
    (float, math.inf),
    (list[float], [-math.inf, -0.0, 1e-300]),
    (int, 10**40),
    (str, "half an emoji \ud83d"),
    (str, "  kept  \u2028\n"),
    (Part, Part(partName="a", color=Color.BLUE, made=DAY)),
    (Box, Box(parts={"a": [Part(partName="b")]}, shape=(1, 2))),
    (list[Box | None], [Box(), None]),
    (Open, Open.model_validate({"size": 2, "other": {"day": DAY}})),
    (Many, Many([Color.RED])),
    (Line, Line(Point(1, DAY), frozenset({Color.RED}))),
    (dict[str, Line], {"a": Line(Point(1, DAY))}),
    (Slotted, Slotted(decimal.Decimal("1.0"))),
    (Point, Point(1, DAY)),
    (Pair, Pair(1, "b")),
    (Record, {"color": Color.RED}),
    (str, DAY),
    (int, np.int64(5)),
    (float, np.float32(0.1)),
    (bool, np.bool_(True)),
    (str, np.str_("a")),
    (Any, np.datetime64("2024-01-02")),
    (Any, pd.Timestamp("2024-01-02 03:04:05.000000006")),
    (Any, pd.Timedelta("1 days 2 hours")),
]

AS_SHOWN: list[tuple[Any, Any]] = [
    (str, Unmentioned(day=DAY)),
    (list[Any], [Unmentioned(day=DAY), Color.RED, DAY]),
    (str, Color.RED),
    (Part, Derived(partName="a", more=2)),
    (Rights, Rights.READ | Rights.WRITE),
    (str, Named()),
    (Any, pd.DataFrame({"a": [1, 2], "b": ["x", None]})),
    (Any, pd.Series([1.5, 2.5])),
    (Any, fractions.Fraction(1, 3)),
    (Any, OrderedDict(a=1)),
    (Any, Counter("aab")),
    (Any, pydantic.SecretStr("key")),
    (dspy.Image, dspy.Image("https://example.org/a.png")),
    (list[dspy.Image], [dspy.Image("https://example.org/a.png")]),
    (dspy.Audio, dspy.Audio(data="aGk=", audio_format="wav")),
    (dspy.Code["python"], dspy.Code["python"](code="print(1)")),
    (dspy.Reasoning, dspy.Reasoning(content="so")),
    (dspy.ToolCalls, dspy.ToolCalls.from_dict_list([{"name": "a", "args": {"b": 1}}])),
]


def predictor_with(kind: Any, value: Any) -> dspy.Predict:
    """A predictor that has the type as an input and as an output, with a whole and an incomplete demo."""
    fields = {"x": (kind, dspy.InputField()), "q": (str, dspy.InputField()), "y": (kind, dspy.OutputField())}
    predictor = dspy.Predict(dspy.Signature(fields, "Do it."))
    whole = dspy.Example(augmented=True, x=value, q="a", y=value)
    predictor.demos = [whole.with_inputs("x", "q"), dspy.Example(x=value, y=value), {"q": "b", "y": value}]
    return predictor


def prompts(predictor: dspy.Predict) -> list[str]:
    adapters = (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter())
    inputs = {"x": "", "q": "c"}
    return [repr(adapter.format(predictor.signature, predictor.demos, inputs)) for adapter in adapters]


def restored(predictor: dspy.Predict) -> dspy.Predict:
    """The predictor as a run directory gives it back."""
    text = json.dumps(prompts_state(predictor), allow_nan=False).encode("utf-8", "surrogatepass")
    bare = dspy.Predict(predictor.signature)
    found: dspy.Predict = load_prompts(bare, json.loads(text))
    return found


def ids(cases: list[tuple[Any, Any]]) -> list[str]:
    return [f"{number}-{type(value).__name__}" for number, (_, value) in enumerate(cases)]


@pytest.mark.parametrize(("kind", "value"), EXACT, ids=ids(EXACT))
def test_a_value_comes_back_as_it_was_and_gives_the_same_prompt(kind: Any, value: Any) -> None:
    predictor = predictor_with(kind, value)
    back = restored(predictor)
    assert prompts(back) == prompts(predictor)
    for demo in back.demos:
        assert type(demo["y"]) is type(value) or isinstance(value, set | frozenset)
        assert isinstance(demo["y"], type(value))
        assert demo["y"] == value
        assert repr(demo["y"]) == repr(value)


@pytest.mark.parametrize(("kind", "value"), AS_SHOWN, ids=ids(AS_SHOWN))
def test_a_value_of_a_type_that_the_signature_lacks_comes_back_as_the_prompt_shows_it(kind: Any, value: Any) -> None:
    predictor = predictor_with(kind, value)
    assert prompts(restored(predictor)) == prompts(predictor)


@pytest.mark.parametrize(("kind", "value"), [*EXACT, *AS_SHOWN], ids=ids([*EXACT, *AS_SHOWN]))
def test_an_artifact_gives_the_same_prompt(kind: Any, value: Any, tmp_path: Path) -> None:
    predictor = predictor_with(kind, value)
    predictor.set_lm(plain_lm(fresh_engine()))
    loaded = load(save(predictor, tmp_path), into=dspy.Predict(predictor.signature), base_model=fresh_engine())
    assert prompts(loaded) == prompts(predictor)


def test_a_history_and_tools_among_the_inputs_give_the_same_prompt() -> None:
    fields = {"past": (dspy.History, dspy.InputField()), "tools": (list[dspy.Tool], dspy.InputField())}
    predictor = dspy.Predict(dspy.Signature({**fields, "q": (str, dspy.InputField()), "y": (str, dspy.OutputField())}))
    past = dspy.History(messages=[{"q": "a", "y": DAY}])
    tool = dspy.Tool(len, name="len", desc="length", args={"obj": {"type": "string"}})
    predictor.demos = [dspy.Example(past=past, tools=[tool], q="a", y="b")]
    inputs = {"past": past, "tools": [tool], "q": "c"}
    back = restored(predictor)
    assert back.demos[0]["past"] == past
    for adapter in (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter()):
        shown = [adapter.format(each.signature, each.demos, dict(inputs)) for each in (predictor, back)]
        assert shown[0] == shown[1]


def test_not_a_number_comes_back() -> None:
    predictor = predictor_with(list[float], [math.nan])
    back = restored(predictor)
    assert prompts(back) == prompts(predictor)
    assert math.isnan(back.demos[0]["y"][0])


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype="int16").reshape(2, 3),
        np.array([0.1, math.nan], dtype="float32"),
        np.zeros((0, 3)),
        np.array(["a", "bc"]),
        np.array([b"a"]),
        np.array([True]),
        np.array([1 + 2j]),
        np.array(["2024-01-02", "NaT"], dtype="datetime64[ns]"),
        np.array(3.5),
        np.array([1, 2], dtype=">i4"),
    ],
)
def test_an_array_comes_back_with_its_type_and_shape(array: Any) -> None:
    predictor = predictor_with(Any, array)
    back = restored(predictor)
    found = back.demos[0]["y"]
    assert prompts(back) == prompts(predictor)
    assert (type(found), found.dtype, found.shape) == (np.ndarray, array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()


def test_a_demo_keeps_its_mark_its_input_keys_and_the_order_of_its_fields() -> None:
    demo = dspy.Example(y="b", augmented=True, q="a").with_inputs("q")
    back = decode_demos(dspy.Predict("q -> y"), encode_demos(_with(demo), "self"), "self")[0]
    assert list(back.toDict()) == ["y", "augmented", "q"]
    assert back.inputs().toDict() == {"q": "a"}
    assert back == demo


def test_plain_demos_are_plain_json() -> None:
    demo = dspy.Example(q="a", y=["b", {"c": 1.5}], augmented=True)
    assert encode_demos(_with(demo), "self") == [{"q": "a", "y": ["b", {"c": 1.5}], "augmented": True}]


def test_a_set_is_shown_in_its_order_in_another_process(tmp_path: Path) -> None:
    words = [f"word {number}" for number in range(20)]
    predictor = predictor_with(set[str], set(words))
    (tmp_path / "state.json").write_text(json.dumps(prompts_state(predictor)))
    code = (
        "import dspy, json, sys\n"
        "from bettertogether.programs.program import load_prompts\n"
        "fields = {'x': (set[str], dspy.InputField()), 'q': (str, dspy.InputField()), "
        "'y': (set[str], dspy.OutputField())}\n"
        "p = load_prompts(dspy.Predict(dspy.Signature(fields, 'Do it.')), json.load(open(sys.argv[1])))\n"
        "assert isinstance(p.demos[0]['y'], set) and len(p.demos[0]['y']) == 20\n"
        "adapters = (dspy.ChatAdapter(), dspy.JSONAdapter(), dspy.XMLAdapter())\n"
        "print(json.dumps([repr(a.format(p.signature, p.demos, {'x': '', 'q': 'c'})) for a in adapters]))\n"
    )
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code, str(tmp_path / "state.json")]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        assert json.loads(done.stdout) == prompts(predictor)


def test_a_class_that_moved_to_another_module_is_found_by_its_name() -> None:
    predictor = predictor_with(Color, Color.RED)
    saved = json.loads(json.dumps(prompts_state(predictor)).replace(f"{__name__}:Color", "__main__:Color"))
    assert load_prompts(dspy.Predict(predictor.signature), saved).demos[0]["y"] is Color.RED


@pytest.mark.parametrize(
    "value",
    [
        {"$type": "os:system", "value": "true"},
        {"$type": "subprocess:Popen", "value": ["true"]},
        {"$type": "test_demo_values:Color", "value": "GREEN"},
        {"$type": "test_demo_values:Part", "value": {}},
        {"$type": "test_demo_values:Line", "value": {"start": 1}},
        {"$type": "date", "value": "yesterday"},
        {"$type": "date"},
        {"$type": "numpy.ndarray", "value": ["O", [1], [None]]},
        {"$type": "numpy.ndarray", "value": ["<i8", [2], [1]]},
        {"$type": ["date"], "value": "2024-01-02"},
        {"$type": "set", "value": [[1]]},
    ],
)
def test_what_no_table_and_no_signature_names_is_refused_in_reading(value: Any) -> None:
    predictor = dspy.Predict(dspy.Signature({"q": (Line, dspy.InputField()), "y": (Color, dspy.OutputField())}))
    with pytest.raises(ArtifactError, match="A demo of 'self' is damaged"):
        decode_demos(predictor, [{"q": "a", "y": value}], "self")


def test_demos_that_are_no_list_are_refused_in_reading() -> None:
    with pytest.raises(ArtifactError, match="demos of 'self' are damaged"):
        decode_demos(dspy.Predict("q -> y"), {"q": "a"}, "self")
    with pytest.raises(ArtifactError, match="A demo of 'self' is damaged"):
        decode_demos(dspy.Predict("q -> y"), [5], "self")


def test_reading_an_object_validates_nothing_again() -> None:
    predictor = predictor_with(Open, Open(size=2))
    assert restored(predictor).demos[0]["y"].size == 4


def test_a_secret_is_not_written() -> None:
    assert "hush" not in json.dumps(prompts_state(predictor_with(Any, pydantic.SecretStr("hush"))))


def test_a_value_that_a_prompt_shows_by_its_address_is_refused_by_field_and_type() -> None:
    with pytest.raises(ArtifactError, match=r"demos of 'step' can't be saved: field 'y' holds a builtins:object"):
        encode_demos(_with(dspy.Example(q="a", y=object())), "step")


def test_a_value_that_holds_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(ArtifactError, match="field 'y' holds a builtins:list"):
        encode_demos(_with(dspy.Example(q="a", y=loop)), "self")


def test_a_value_that_no_prompt_shows_may_be_anything() -> None:
    demo = dspy.Example(q="a", y="b", source=object())
    assert list(encode_demos(_with(demo), "self")[0]) == ["q", "y", "source"]


def _with(demo: Any) -> dspy.Predict:
    predictor = dspy.Predict("q -> y")
    predictor.demos = [demo]
    return predictor
