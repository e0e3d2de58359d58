"""The data card counts what the rows are made of."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
from fakes import parity_engine

from bettertogether.engines.protocol import ChatMessage
from bettertogether.steps.data_card import make_data_card
from bettertogether.steps.rows import Row
from bettertogether.steps.rows_from_traces import LocalModel

PROMPT: tuple[ChatMessage, ...] = ({"role": "system", "content": "s"}, {"role": "user", "content": "ü\n"})


def row(label: str | None = None, predictor: str = "self", example: int = 0, source: str = "student") -> Row:
    return Row(PROMPT, f"answer {example}", predictor, example, label, source)


def test_the_data_card_counts_by_predictor_label_source_and_reason() -> None:
    engine = parity_engine(lambda *_: True)
    rows = [row("a"), row("a", "p", 1, "sample"), row("b", "p", 1, "rescue")]
    dropped = {("", "parse failure"): 3, ("p", "too long"): 1}
    trainable = dict.fromkeys(("self", "p"), LocalModel(engine, None))
    card = make_data_card(rows, trainable, dropped=dropped, examples=5, warnings=["few"])
    assert card.kept_by_predictor == {"self": 1, "p": 2}
    assert card.kept_by_label == {"a": 2, "b": 1}
    assert card.kept_by_source == {"student": 1, "sample": 1, "rescue": 1}
    assert card.dropped_by_reason == {"parse failure": 3, "too long": 1}
    assert card.dropped_by_predictor == {"": 3, "p": 1}
    assert (card.examples, card.examples_covered, card.warnings) == (5, 2, ("few",))
    length = len(engine.prompt_tokens(PROMPT))
    assert card.prompt_tokens == {"min": length, "median": length, "max": length}
    assert json.loads(json.dumps(asdict(card)))["warnings"] == ["few"]


@pytest.mark.parametrize(("count", "shown"), [(1, 1), (5, 5), (6, 5), (23, 5)])
def test_the_data_card_shows_up_to_five_rows(count: int, shown: int) -> None:
    rows = [row(example=i) for i in range(count)]
    trainable = {"self": LocalModel(parity_engine(lambda *_: True), None)}
    card = make_data_card(rows, trainable, dropped={}, examples=count)
    assert len(card.samples) == shown
