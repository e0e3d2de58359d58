"""Which demos a predictor can show: those that can be sent and saved, and leave room for a question and its answer."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import dspy

from ..errors import ArtifactError
from ..lm import local_engine
from ..printable import NOT_UNICODE, is_unicode
from ..programs.demo_values import encode_demo
from ..rollouts.failures import error_text
from .prompt_capture import render_prompt

ANSWER_ROOM_TOKENS = 256
"""Tokens that demos must leave free in the context for an answer, at least."""

HOGS = 10
"""One question in so many may be too long to be asked beside demos, where none of those would fit beside it."""


class DemoFit:
    """The demos that one predictor can show, and why it can't show others."""

    def __init__(self, name: str, predictor: dspy.Predict, questions: Sequence[Mapping[str, Any]]) -> None:
        self._name = name
        self._predictor = predictor
        self._engine = local_engine(predictor.lm)
        self._room = 0
        if self._engine is not None:
            self._room = max(predictor.lm.kwargs.get("max_tokens") or 0, ANSWER_ROOM_TOKENS)
        fields = predictor.signature.input_fields
        asked = [{field: question.get(field, "") for field in fields} for question in questions]
        distinct = {str(inputs): inputs for inputs in asked}
        self._questions = [distinct[text] for text in sorted(distinct, key=len, reverse=True)]
        self._known: dict[int, tuple[Any, str | None]] = {}
        self._too_long: set[int] = set()
        self._unanswerable: set[int] = set()
        self._hogs = 0

    @property
    def passed_over(self) -> int:
        """How many questions are too long to be asked beside demos."""
        return len(self._unanswerable) + self._hogs

    @property
    def left_out(self) -> Counter[str]:
        """How many demos can't be shown, by reason."""
        reasons = Counter(reason for _, reason in self._known.values() if reason is not None)
        return reasons + Counter({"too long for the model's context": len(self._too_long)})

    def usable(self, demo: Any) -> bool:
        """Whether a demo can be sent and saved."""
        if id(demo) not in self._known:
            # With the demo itself, whose id is then nobody else's.
            self._known[id(demo)] = demo, self._problem(demo)
        return self._known[id(demo)][1] is None

    def fitting(self, demos: Sequence[Any]) -> list[Any]:
        """The demos, from the first, that together leave room for the longest question and an answer."""
        usable = [demo for demo in demos if self.usable(demo)]
        if self._engine is None or not usable:
            return usable
        for number, question in enumerate(self._longest):
            kept = self._beside(question, usable)
            if kept:
                self._hogs = max(self._hogs, number)
                return kept
        self._too_long.update(id(demo) for demo in usable)
        return []

    def _beside(self, question: Mapping[str, Any], demos: Sequence[Any]) -> list[Any]:
        if self._tokens(question, demos) + self._room <= self._limit:
            return list(demos)
        kept: list[Any] = []
        for demo in demos:
            if self._tokens(question, [*kept, demo]) + self._room <= self._limit:
                kept.append(demo)
            elif self._tokens(question, [demo]) + self._room > self._limit:
                self._too_long.add(id(demo))
        return kept

    @property
    def _limit(self) -> int:
        assert self._engine is not None
        return self._engine.max_length

    def _tokens(self, question: Mapping[str, Any], demos: Sequence[Any]) -> int:
        assert self._engine is not None
        return len(self._engine.prompt_tokens(render_prompt(self._predictor, self._engine, question, demos)))

    @cached_property
    def _longest(self) -> list[Mapping[str, Any]]:
        """The longest question that can be answered at all, then the next ones, up to the share that may be lost."""
        rest: list[Mapping[str, Any]] = [*self._questions]
        while rest and not self._can_be_answered(rest[0]):
            rest = rest[1:]
        return rest[: 1 + len(rest) // HOGS]

    def _can_be_answered(self, question: Mapping[str, Any]) -> bool:
        if self._failure(question, []):
            return False
        fits = self._tokens(question, []) < self._limit
        if not fits:
            self._unanswerable.add(id(question))
        return fits

    @cached_property
    def _good_question(self) -> Mapping[str, Any] | None:
        return next((question for question in reversed(self._questions) if not self._failure(question, [])), None)

    def _problem(self, demo: Any) -> str | None:
        try:
            text = json.dumps(encode_demo(self._predictor, demo, self._name), ensure_ascii=False)
        except ArtifactError as error:
            return str(error)
        if not is_unicode(text):
            return f"its text is {NOT_UNICODE}"
        if self._engine is None:
            return None
        own = {field: demo.get(field, "") for field in self._predictor.signature.input_fields}
        return self._failure(self._good_question or own, [demo])

    def _failure(self, question: Mapping[str, Any], demos: Sequence[Any]) -> str | None:
        """What is raised when this prompt is made, in a line."""
        assert self._engine is not None
        try:
            render_prompt(self._predictor, self._engine, question, demos)
        except Exception as error:
            return error_text(error)
        return None
