"""A predictor's prompt with placeholders is the prompt that it sends, once these are filled in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import dspy
import pytest
from small_models import save_model

from bettertogether import local_lm, prompt_templates
from bettertogether.errors import ProgramError
from bettertogether.steps.prompt_capture import render_prompt

INPUTS: dict[str, Any] = {"question": "How many?", "numbers": "[1, 2]"}


class Count(dspy.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = dspy.Predict("question, numbers: list[int], past: dspy.History -> total: int", "Count {them}.")
        self.count.demos = [dspy.Example(question="None?", numbers=[], total=0)]


def filled(text: str) -> str:
    return text.replace("{{question}}", INPUTS["question"]).replace("{{numbers}}", INPUTS["numbers"])


@pytest.mark.parametrize("adapter", [dspy.ChatAdapter(), dspy.JSONAdapter()])
def test_the_template_filled_in_is_the_prompt(adapter: Any, tmp_path: Path) -> None:
    program = Count()
    program.set_lm(local_lm(save_model(tmp_path / "tiny")))
    with dspy.context(adapter=adapter):
        template = prompt_templates(program)["count"]
        inputs = {**INPUTS, "past": dspy.History(messages=[])}
        sent = render_prompt(program.count, program.count.lm.engine, inputs, program.count.demos)
    assert template.inputs == ("question", "numbers")
    assert [{**message, "content": filled(message["content"])} for message in template.messages] == list(sent)
    assert template.text is not None
    assert filled(template.text) == program.count.lm.engine.prompt_text(sent)


def test_an_lm_elsewhere_has_messages_alone() -> None:
    program = dspy.Predict("question -> answer")
    program.set_lm(dspy.LM("openai/any"))
    template = prompt_templates(program)["self"]
    assert template.text is None
    assert [message["role"] for message in template.messages] == ["system", "user"]
    assert template.messages[-1]["content"].startswith("[[ ## question ## ]]\n{{question}}\n")


def test_what_is_no_program_is_refused() -> None:
    with pytest.raises(ProgramError, match="program='x' is not allowed: give a program"):
        prompt_templates("x")
