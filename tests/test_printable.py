"""Text from models and files can't steer a terminal: not in messages, not in the log."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

import bettertogether
from bettertogether.errors import BetterTogetherError, UnknownAdapterError
from bettertogether.printable import get_logger, one_line, printable

STEERING = "\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\x9b1m\u202e"


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    text = io.StringIO()
    handler = logging.StreamHandler(text)
    logging.getLogger("bettertogether").addHandler(handler)
    yield text
    logging.getLogger("bettertogether").removeHandler(handler)


def test_control_characters_are_written_out() -> None:
    assert printable(STEERING) == r"\x1b]52;c;ZXZpbA==\x07\x1b[2J\r\x9b1m\u202e"


def test_halves_of_characters_and_invisible_ones_are_written_out() -> None:
    assert printable("a\ud83db\U000e0041c") == r"a\ud83db\U000e0041c"


def test_tabs_and_line_breaks_stay_except_where_a_line_is_wanted() -> None:
    assert printable("a\tb\nc") == "a\tb\nc"
    assert one_line("a\tb\nc\r\x1b") == r"a\tb\nc\r\x1b"


def test_letters_of_all_languages_and_emoji_stay_as_they_are() -> None:
    text = "é ß 日本語\u3000عربى क्षि 👩\u200d🔬 \xa0"
    assert printable(text) == text


def test_what_is_no_text_is_shown_as_its_text() -> None:
    assert printable(ValueError("a\x1bb")) == r"a\x1bb"


def all_errors(base: type[BetterTogetherError] = BetterTogetherError) -> list[type[BetterTogetherError]]:
    return [base, *(error for each in base.__subclasses__() for error in all_errors(each))]


@pytest.mark.parametrize("kind", all_errors(), ids=lambda kind: kind.__name__)
def test_the_text_of_each_of_our_errors_is_printable(kind: type[BetterTogetherError]) -> None:
    assert str(kind(f"can't read {STEERING}")).startswith(r"can't read \x1b]52;c;ZXZpbA==\x07\x1b[2J")
    assert "\x1b" not in str(kind(STEERING))


def test_an_error_of_a_missing_key_is_shown_without_quotes() -> None:
    assert str(UnknownAdapterError("no adapter a")) == "no adapter a"


def test_log_lines_and_their_tracebacks_are_printable(log: io.StringIO) -> None:
    try:
        raise ValueError(STEERING)
    except ValueError as error:
        get_logger("bettertogether.somewhere").error("%s ends: %s", "p\x1b", error, exc_info=error)
    assert r"p\x1b ends: \x1b]52" in log.getvalue()
    assert r"ValueError: \x1b]52" in log.getvalue()
    assert "\x1b" not in log.getvalue()


def test_every_module_of_ours_logs_through_it() -> None:
    package = Path(bettertogether.__file__).parent
    raw = [path.name for path in package.rglob("*.py") if "getLogger(" in path.read_text()]
    # rollouts/logs.py writes to none: it filters those of DSPy.
    assert sorted(raw) == ["logs.py", "printable.py"]
