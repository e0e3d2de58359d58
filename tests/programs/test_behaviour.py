"""Code is told apart by what it does, not by where it stands, on every version of Python."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from bettertogether.programs.behaviour import BehaviourWalk

PROGRAM = """
import typing
import dspy

Answer = typing.Literal["yes", "no"]

def make():
    class Ask(dspy.Signature):
        question: str = dspy.InputField()
        answer: Answer = dspy.OutputField()
    class Held:
        limit: int = 3
        def longest(self, text: str) -> str:
            self.text = text
            return text[: self.limit]
    return Ask, Held
"""


KIND = "type Kind = Literal['a']" if sys.version_info >= (3, 12) else "Kind = TypeAliasType('Kind', Literal['a'])"


def behaviour(source: str, name: str = "make") -> str:
    """The hash of what a module's source defines."""
    scope: dict[str, Any] = {"__name__": "of_the_user"}
    exec(compile(source, "of_the_user.py", "exec", dont_inherit=True), scope)
    return BehaviourWalk(lasting=True).of(scope[name])


@pytest.mark.parametrize("lines", [1, 300])
def test_lines_above_a_function_that_makes_classes_change_nothing(lines: int) -> None:
    assert behaviour("\n" * lines + PROGRAM) == behaviour(PROGRAM)


def test_what_stands_in_a_class_that_a_function_makes_counts() -> None:
    others = [PROGRAM.replace(*change) for change in (("limit: int = 3", "limit: int = 4"), ("[: self", "[-self"))]
    assert len({behaviour(source) for source in (PROGRAM, *others)}) == 3


@pytest.mark.parametrize("future", ["", "from __future__ import annotations\n"])
def test_the_types_of_a_class_s_fields_count_and_lines_above_it_do_not(future: str) -> None:
    source = future + "\nclass Held:\n    limit: int\n    of: 'Later'\n    def longest(self, n: int): return n\n"
    assert behaviour("\n" + source, "Held") == behaviour(source, "Held")
    assert behaviour(source.replace("limit: int", "limit: float"), "Held") != behaviour(source, "Held")


def test_a_class_counts_with_the_values_that_its_annotations_name() -> None:
    source = "import typing\nKind = typing.Literal['a']\nclass Held:\n    kind: Kind\n"
    assert behaviour(source.replace("'a'", "'b'"), "Held") != behaviour(source, "Held")


@pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated at once")
def test_an_annotation_that_names_nothing_yet_counts_by_its_text() -> None:
    source = "class Held:\n    kind: Kind\n"
    assert behaviour("\n" + source, "Held") == behaviour(source, "Held")
    assert behaviour(source.replace("Kind", "Other"), "Held") != behaviour(source, "Held")


@pytest.mark.parametrize("annotation", ["Kind", "list[Kind]", "Kind | None"])
def test_a_type_statement_counts_by_its_value(annotation: str) -> None:
    source = (
        f"import dspy\nfrom typing import Literal\nfrom typing_extensions import TypeAliasType\n{KIND}\n"
        f"class Ask(dspy.Signature):\n    q: str = dspy.InputField()\n    a: {annotation} = dspy.OutputField()\n"
    )
    assert behaviour("\n" + source, "Ask") == behaviour(source, "Ask")
    assert behaviour(source.replace("'a'", "'b'"), "Ask") != behaviour(source, "Ask")


@pytest.mark.skipif(sys.version_info < (3, 12), reason="no `type` statement")
def test_a_type_statement_whose_names_exist_for_the_type_checker_alone_counts_by_its_name() -> None:
    assert behaviour("type Kind = Later", "Kind") != behaviour("type Other = Later", "Other")
