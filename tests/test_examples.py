"""The scripts that users copy from, run as they are, on fakes whose best answer is known and on a tiny model."""

from __future__ import annotations

import contextvars
import csv
import importlib
import json
import re
import runpy
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dspy
import pytest
import torch
from fakes import field_of, outputs_of, plain_lm
from small_models import save_model

import bettertogether
from bettertogether.testing import Answer, FakeEngine, FakeRequest

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = runpy.run_path(str(Path(__file__).parent / "benchmarks" / "notebook.py"))

Run = Callable[..., str]
Serve = Callable[..., None]


def rows_of(name: str) -> list[dict[str, str]]:
    with (EXAMPLES / "data" / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


TICKETS = {row["text"]: row for row in rows_of("tickets.csv")}
ANSWERS = {row["question"]: row for row in rows_of("handbook.csv")}


def in_context(function: Callable[[], Any]) -> Any:
    """Call it where the settings of the test's own context don't win over what it configures."""
    return contextvars.Context().run(function)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a script as `python examples/NAME ARGUMENTS` does; returns what it prints."""

    def run_script(name: str, *arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        monkeypatch.syspath_prepend(str(EXAMPLES))
        capsys.readouterr()
        in_context(lambda: runpy.run_path(str(EXAMPLES / name), run_name="__main__"))
        return capsys.readouterr().out

    return run_script


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Lets `local_lm(NAME)` answer from the fake engine of that name."""

    def serve_fakes(**engines: FakeEngine) -> None:
        def fake_lm(model: str, **options: Any) -> dspy.LM:
            return plain_lm(engines[model], **options)

        monkeypatch.setattr(bettertogether, "local_lm", fake_lm)

    return serve_fakes


def knows(request: FakeRequest, text: str) -> bool:
    """A third of the texts; all of them after training."""
    return request.trained_on > 0 or len(text) % 3 == 0


def trained_fields(engine: FakeEngine) -> set[tuple[str, ...]]:
    """The output fields of the rows of all trainings: a tuple for each predictor."""
    return {tuple(json.loads(row.completion)) for rows in engine.trainings for row in rows}


def score(printed: str, name: str) -> float:
    """The mean in the line of `compare` that has this name."""
    return float(re.findall(rf"^{name} +([\d.]+) \[", printed, re.MULTILINE)[0])


def test_a_classifier_is_made_from_the_rows_of_a_csv(run: Run, serve: Serve, tmp_path: Path) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("id,review,stars\n" + "".join(f'{n},"number {n}",{n % 2 + 4}\n' for n in range(30)))

    def answer(request: FakeRequest) -> Answer:
        number = int(field_of(request, "text").split()[1])
        return {"label": str(number % 2 + 4) if request.trained_on or number < 10 else "4"}

    serve(tiny=FakeEngine(answer))
    columns = ("--csv", table, "--text", "review", "--label", "stars")
    printed = run("classifier_from_csv.py", "--model", "tiny", *columns)
    assert "On 10 rows" in printed
    assert score(printed, "untouched") < score(printed, "compiled") == 1


def test_a_text_that_a_csv_has_several_times_is_one_row(run: Run, serve: Serve, tmp_path: Path) -> None:
    table = tmp_path / "tickets.csv"
    table.write_text("text,team\n" + "".join(f"number {n // 3},{'ab'[n // 3 % 2]}\n" for n in range(36)))
    engine = FakeEngine(lambda request: {"label": "a"})
    serve(tiny=engine)
    assert "On 4 rows" in run("classifier_from_csv.py", "--csv", table, "--model", "tiny")
    asked = [field_of(request, "text") for request in engine.requests]
    tested = set(asked[:4])
    assert (len(tested), len(set(asked)), sorted(asked[-4:])) == (4, 12, sorted(asked[:4]))
    assert tested.isdisjoint(asked[4:-4])


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_column_that_a_csv_lacks_is_named_with_those_that_it_has_without_excels_byte_order_mark(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], encoding: str
) -> None:
    table = tmp_path / "reviews.csv"
    table.write_text("id,review\n1,good\n", encoding=encoding)
    with pytest.raises(SystemExit):
        run("classifier_from_csv.py", "--csv", table)
    assert "has no column 'text', it has ['id', 'review']: name two with --text and --label" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        (b"good", "row 2 after the header is {'text': 'good', 'team': None}; give it a 'text' and a 'team'"),
        (b"good,", "row 2 after the header is {'text': 'good', 'team': ''}; give it a 'text' and a 'team'"),
        (b"good, no,a", "row 2 after the header is {'text': 'good', 'team': ' no', None: ['a']}; give it"),
        ("né,a".encode("latin-1"), "can't be read: 'utf-8' codec can't decode byte 0xe9 in position 18: invalid cont"),
        (None, "can't be read: [Errno 2] No such file or directory"),
    ],
)
def test_a_csv_that_can_t_be_read_is_told_by_its_row(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: bytes | None, words: str
) -> None:
    table = tmp_path / "tickets.csv"
    if rows is not None:
        table.write_bytes(b"text,team\nfine,a\n" + rows)
    with pytest.raises(SystemExit):
        run("classifier_from_csv.py", "--csv", table)
    assert words in capsys.readouterr().err


def test_orders_are_read_into_a_pydantic_model(run: Run, serve: Serve) -> None:
    namespace = runpy.run_path(str(EXAMPLES / "extraction.py"))
    orders = {example.message: example.order for example in namespace["orders"](18, 0)}

    def answer(request: FakeRequest) -> Answer:
        message = field_of(request, "message")
        order = orders[message].model_dump()
        return {"order": order if knows(request, message) else {**order, "quantity": 1}}

    engine = FakeEngine(answer)
    serve(tiny=engine)
    printed = run("extraction.py", "--model", "tiny", "--limit", 6)
    assert 0.75 <= score(printed, "untouched") < score(printed, "compiled") == 1
    assert all('quantity": 1,' not in row.completion for rows in engine.trainings for row in rows)


def test_both_modules_of_the_rag_are_trained_on_right_answers(run: Run, serve: Serve) -> None:
    def answer(request: FakeRequest) -> Answer:
        question = field_of(request, "question")
        if "search_words" in outputs_of(request):
            return {"search_words": question if knows(request, question) else "weather"}
        row = ANSWERS[question]
        return {"answer": row["answer"] if row["passage"] in field_of(request, "passages") else "unknown"}

    engine = FakeEngine(answer)
    serve(tiny=engine)
    printed = run("rag.py", "--model", "tiny", "--limit", 24)
    assert score(printed, "untouched") < score(printed, "compiled") == 1
    assert trained_fields(engine) == {("search_words",), ("answer",)}


def test_the_agent_learns_every_turn_of_the_runs_that_were_right(run: Run, serve: Serve) -> None:
    engine = FakeEngine(agent)
    serve(tiny=engine)
    printed = run("react_agent.py", "--model", "tiny", "--limit", 6)
    assert score(printed, "untouched") < score(printed, "compiled") == 1
    turns = [json.loads(row.completion) for rows in engine.trainings for row in rows]
    assert {turn.get("next_tool_name") for turn in turns} == {"price", "multiply", "finish", None}
    assert "tool_name_2: finish" in printed


def agent(request: FakeRequest) -> Mapping[str, Any]:
    """Asks for the price, multiplies, finishes; or finishes at once where it does not know better."""
    count, item = re.findall(r"do (\d+) pieces of (\w+)", field_of(request, "question"))[0]
    observations = re.findall(r"\[\[ ## observation_\d ## \]\]\n(\d+)", request.user)
    if "cost" in outputs_of(request):
        return {"reasoning": "As observed.", "cost": int(observations[-1]) if observations else 0}
    steps = [("price", {"item": item}), ("multiply", {"a": int(count), "b": int((observations or [0])[0])})]
    at_once = not request.trained_on and int(count) % 3
    name, arguments = ("finish", {}) if at_once else [*steps, ("finish", {})][len(observations)]
    return {"next_thought": "Go on.", "next_tool_name": name, "next_tool_args": arguments}


def test_gepa_s_instructions_are_kept_by_the_weight_step(run: Run, serve: Serve) -> None:
    def answer(request: FakeRequest) -> Answer:
        text = field_of(request, "text")
        told = "money" in request.system and len(text) % 2 == 0
        return {"team": TICKETS[text]["team"] if told or knows(request, text) else "shipping"}

    small = FakeEngine(answer, base_name="small")
    big = FakeEngine(lambda request: {"new_instruction": "Where money is meant, billing."}, base_name="big")
    serve(small=small, big=big)
    printed = run("gepa_then_lora.py", "--model", "small", "--reflector", "big", "--limit", 36, "--calls", 60)
    assert "Instructions: Where money is meant, billing." in printed
    assert score(printed, "untouched") < score(printed, "compiled") == 1
    assert any("belongs to" in request.user for request in big.requests)
    assert (len(small.trainings), len(big.trainings)) == (1, 0)


def test_the_student_learns_what_the_teacher_wrote(run: Run, serve: Serve) -> None:
    def answer(request: FakeRequest) -> Answer:
        right = TICKETS[field_of(request, "text")]["team"]
        big = request.model == "local/big"
        return {"reasoning": "The teacher's." if big else "Mine.", "team": right if big or request.trained_on else "?"}

    small, big = (FakeEngine(answer, base_name=name) for name in ("small", "big"))
    serve(small=small, big=big)
    printed = run("teacher_student.py", "--model", "small", "--teacher", "big", "--limit", 24)
    assert [score(printed, name) for name in ("teacher", "student", "taught student")] == [1, 0, 1]
    assert {json.loads(row.completion)["reasoning"] for rows in small.trainings for row in rows} == {"The teacher's."}
    assert big.trainings == []


def test_the_frozen_model_is_asked_and_not_trained(run: Run, serve: Serve) -> None:
    def answer(request: FakeRequest) -> Answer:
        if "problem" in outputs_of(request):
            return {"problem": field_of(request, "message")}
        text = field_of(request, "text")
        return {"team": TICKETS[text]["team"] if knows(request, text) else "shipping"}

    small, big = (FakeEngine(answer, base_name=name) for name in ("small", "big"))
    serve(small=small, big=big)
    printed = run("several_lms.py", "--model", "small", "--big", "big", "--limit", 24)
    assert score(printed, "untouched") < score(printed, "compiled") == 1
    assert "summarise: local/big\nroute: local/small@" in printed
    assert (trained_fields(small), big.trainings) == ({("team",)}, [])


def test_each_module_has_an_adapter_of_its_own(run: Run, serve: Serve) -> None:
    def answer(request: FakeRequest) -> Answer:
        ticket = TICKETS[field_of(request, "text")]
        known = knows(request, ticket["text"])
        if "team" in outputs_of(request):
            return {"team": ticket["team"] if known else "shipping"}
        return {"urgent": (ticket["urgent"] == "yes") == known}

    engine = FakeEngine(answer)
    serve(tiny=engine)
    printed = run("adapter_per_module.py", "--model", "tiny", "--limit", 24)
    assert score(printed, "untouched") < score(printed, "compiled") == 1
    assert [{tuple(json.loads(row.completion)) for row in rows} for rows in engine.trainings] == [
        {("team",)},
        {("urgent",)},
    ]
    assert len(set(re.findall(r"^(?:route|hurry): (\S+@\S+)", printed, re.MULTILINE))) == 2


def test_a_run_goes_on_and_its_program_is_saved_loaded_served_and_merged(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_VLLM_ANSWER", '{"team": "shipping"}')
    monkeypatch.syspath_prepend(str(EXAMPLES))
    messages = [dspy.Example(text=f"message {n}", team="billing").with_inputs("text") for n in range(12)]
    monkeypatch.setattr(importlib.import_module("tasks"), "ticket_data", lambda limit: (messages[:6], messages[6:], []))
    server = tmp_path / "vllm"
    server.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{Path(__file__).parent}/engines/fake_vllm.py" "$@"\n')
    server.chmod(0o755)
    model = save_model(tmp_path / "tiny")
    program, merged = tmp_path / "program", tmp_path / "merged"
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    compiling = ["compile", "--run-dir", tmp_path / "run", "--save", program, "--strategy", "w"]
    first, again = (run("keep_and_serve.py", *compiling, "--model", model) for _ in range(2))
    message = ("answer", program, "Where is my parcel?", "--model", model)
    here = run("keep_and_serve.py", *message)
    torch.set_num_threads(threads)
    assert again == first
    assert here == "billing\n"
    assert run("keep_and_serve.py", *message, "--vllm", server) == "shipping\n"
    run("keep_and_serve.py", "merge", program, merged)
    assert (merged / "model.safetensors").is_file()


def test_the_quickstart_s_notebook_runs_from_top_to_bottom(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def texts(*sizes: int, seed: int) -> list[list[dspy.Example]]:
        return [
            [
                dspy.Example(text=f"{place} {size} {n}", sentiment=("positive", "negative")[n % 2]).with_inputs("text")
                for n in range(size)
            ]
            for place, size in zip(("train", "val", "test"), sizes, strict=True)
        ]

    def answer(request: FakeRequest) -> Answer:
        number = field_of(request, "text").split()[-1]
        return {"sentiment": "negative" if request.trained_on and number in "13579" else "positive"}

    serve(tiny=FakeEngine(answer))
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(importlib.import_module("tasks"), "sentiment_data", texts)
    code = [cell.text for cell in NOTEBOOK["cells"]('model, sizes = "tiny", (8, 10, 6)') if cell.kind == "code"]
    in_context(lambda: exec("\n".join(code), {}))
    assert score(capsys.readouterr().out, "compiled") == 1


def test_the_notebook_has_the_cells_of_its_script_each_run_in_order() -> None:
    written = json.loads(NOTEBOOK["NOTEBOOK"].read_text(encoding="utf-8"))["cells"]
    cells = [("".join(cell["source"]), cell["cell_type"]) for cell in written]
    assert cells == [(cell.text, cell.kind) for cell in NOTEBOOK["cells"]()]
    counts = [cell["execution_count"] for cell in written if cell["cell_type"] == "code"]
    assert counts == list(range(1, len(counts) + 1))
