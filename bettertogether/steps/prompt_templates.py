"""The prompts of a program for programs that don't have DSPy."""

from __future__ import annotations

from dataclasses import dataclass

import dspy
from dspy.adapters.chat_adapter import ChatAdapter

from ..engines.protocol import ChatMessage
from ..errors import ProgramError
from ..lm import local_engine
from ..programs.program import predictors_of
from .prompt_capture import render_prompt


@dataclass(frozen=True)
class PromptTemplate:
    """A predictor's prompt, in which "{{name}}" stands for the value of the input field of that name."""

    inputs: tuple[str, ...]
    """Names of the input fields."""
    messages: tuple[ChatMessage, ...]
    """Roles and texts, for a chat API: instructions, demos, and the inputs last."""
    text: str | None
    """The same as the model's chat template writes it, for a completions API; None for an LM that is not local."""


def prompt_templates(program: dspy.Module) -> dict[str, PromptTemplate]:
    """The prompt of each predictor, by its name, as the DSPy adapter in use writes it with its instructions and demos.

    A chat history is left empty. Raises ProgramError for what is no program.
    """
    if not isinstance(program, dspy.Module):
        raise ProgramError(f"program={program!r:.100} is not allowed: give a program (a dspy.Module).")
    return {name: _template(predictor) for name, predictor in predictors_of(program).items()}


def _template(predictor: dspy.Predict) -> PromptTemplate:
    fields = predictor.signature.input_fields
    histories = {name: dspy.History(messages=[]) for name, field in fields.items() if field.annotation is dspy.History}
    names = tuple(name for name in fields if name not in histories)
    inputs = {name: f"{{{{{name}}}}}" for name in names} | histories
    lm = predictor.lm or dspy.settings.lm
    engine = local_engine(lm)
    if engine is None:
        adapter = dspy.settings.adapter or ChatAdapter()
        messages = adapter.format(predictor.signature, predictor.demos, inputs)
        return PromptTemplate(names, tuple({"role": m["role"], "content": m["content"]} for m in messages), None)
    asked = predictor.deepcopy()
    asked.lm = lm
    messages = render_prompt(asked, engine, inputs, predictor.demos)
    write = getattr(engine, "prompt_text", None)
    return PromptTemplate(names, messages, None if write is None else write(messages))
