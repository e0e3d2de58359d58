"""A run tells which answers were sampled for each call, also those that could not be read."""

from __future__ import annotations

import dspy
from dspy.lm15 import Request, Response
from fakes import ONE, TwoSteps, plain_lm, reply

from bettertogether.rollouts.rollout import Call
from bettertogether.rollouts.runner import Runner
from bettertogether.testing import FakeEngine, FakeRequest


class InTokens(FakeEngine):
    """Says with each answer how many words it has, where it is to be stored."""

    def complete(self, request: Request) -> Response:
        response = super().complete(request)
        words = [len((response.text or "").split())]
        tokens = {"token_ids": words} if request.config.store else None
        return Response(None, response.model, response.message, "stop", response.usage, provider_data=tokens)


def program(decided: str, **options: bool) -> TwoSteps:
    """Its second predictor answers like that where it isn't asked for JSON."""

    def answer(request: FakeRequest) -> str:
        if "1. `parity`" not in request.system:
            return reply(request, remark="it is a number")
        return reply(request, parity="odd") if "JSON object" in request.user and decided == "no" else decided

    made = TwoSteps()
    made.set_lm(plain_lm(InTokens(answer), None, **options))
    return made


def in_words(calls: tuple[Call, ...]) -> list[tuple[str, list[int]]]:
    return [(call.predictor, [words for answer in call.sampled for words in answer["token_ids"]]) for call in calls]


def test_a_call_has_all_its_answers_in_tokens_the_one_that_counts_last() -> None:
    run = Runner(program("no", store=True)).run(ONE)
    assert in_words(run.calls) == [("remark", [14]), ("decide", [1, 2])]
    assert run.unread == ()


def test_without_store_there_are_none() -> None:
    assert in_words(Runner(program("no")).run(ONE).calls) == [("remark", []), ("decide", [])]


def test_a_call_that_could_not_be_read_is_told_apart_from_the_others() -> None:
    run = Runner(program("no idea at all", store=True)).run(ONE)
    assert run.failure == "parse failure"
    assert in_words(run.calls) == [("remark", [14])]
    ((name, words),) = in_words(run.unread)
    assert (name, set(words)) == ("decide", {4})
    assert run.unread[0].text == "no idea at all"


def test_a_program_that_goes_on_after_such_a_call_has_both() -> None:
    class Stubborn(dspy.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = program("no idea at all", store=True)

        def forward(self, number: int) -> dspy.Prediction:
            try:
                return self.steps(number=number)
            except dspy.utils.exceptions.AdapterParseError:
                return dspy.Prediction(parity="odd")

    run = Runner(Stubborn()).run(ONE)
    assert (run.failure, run.prediction.parity) == (None, "odd")
    assert [call.predictor for call in run.unread] == ["steps.decide"]
