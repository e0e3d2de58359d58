"""Which predictor of a program made which call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import dspy

from ..programs.program import modules_of, predictors_of

FROZEN = ""
"""Name of every predictor of frozen (compiled) sub-modules, whose calls belong to nobody."""


class CallAttribution:
    """Knows the predictors that a program's runs call, whichever copy of them is called.

    `mark` gives each predictor of a copy of the program a mark, which further deep copies of it keep (`dspy.BestOfN`
    and `dspy.Refine` call such copies). One without a mark is known by object, by the identity that a deep copy of
    the original keeps, or by a signature that one predictor alone has.
    """

    def __init__(self, program: dspy.Module) -> None:
        predictors = predictors_of(program)
        self._originals = _by_mark(program)
        self._by_object = {id(predictor): name for name, predictor in predictors.items()}
        frozen = [p for mark, p in self._originals.items() if mark.startswith(_FROZEN_MARK)]
        self._frozen = {key for p in frozen for key in (id(p), p.stage)} - {p.stage for p in predictors.values()}
        self._by_identity: list[Callable[[Any], str | None]] = [
            _unique_lookup(predictors, lambda p: getattr(p, "stage", None)),
            _unique_lookup(predictors, lambda p: repr(p.signature.dump_state()) + repr(sorted(p.signature.fields))),
        ]

    def mark(self, copied: dspy.Module) -> None:
        """Mark the predictors of a copy of the program."""
        for mark, predictor in _by_mark(copied).items():
            predictor.stage = mark

    def predictor(self, name: str) -> dspy.Predict:
        """The program's own predictor of this name."""
        return self._originals[_MARK + name]

    def owner(self, predictor: Any) -> tuple[Any, str | None]:
        """The program's own predictor that this is a copy of (itself when it is none), and the predictor's name,
        `FROZEN`, or None for one that is not the program's."""
        original = self._originals.get(getattr(predictor, "stage", ""), predictor)
        return original, self._by_object.get(id(original)) or self._name_of_unmarked(original)

    def _name_of_unmarked(self, predictor: Any) -> str | None:
        if id(predictor) in self._frozen or getattr(predictor, "stage", None) in self._frozen:
            return FROZEN
        return next((name for look in self._by_identity if (name := look(predictor))), None)


_MARK, _FROZEN_MARK = "bettertogether:predictor:", "bettertogether:frozen:"


def _by_mark(program: dspy.Module) -> dict[str, dspy.Predict]:
    own = {_MARK + name: predictor for name, predictor in predictors_of(program).items()}
    known = {id(predictor) for predictor in own.values()}
    modules = [(name, module) for name, module in modules_of(program) if isinstance(module, dspy.Predict)]
    return own | {_FROZEN_MARK + name: module for name, module in modules if id(module) not in known}


def _unique_lookup(
    predictors: Mapping[str, dspy.Predict], identity: Callable[[Any], object]
) -> Callable[[Any], str | None]:
    names: dict[object, list[str]] = {}
    for name, predictor in predictors.items():
        names.setdefault(identity(predictor), []).append(name)

    def look(predictor: Any) -> str | None:
        found = names.get(identity(predictor), [])
        return found[0] if len(found) == 1 else None

    return look
