"""What an LM's response says of its answers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .replay import Reply


def reply_of(entry: Mapping[str, Any], number: int) -> Reply:
    """One of the answers of an entry in DSPy's history."""
    output = entry["outputs"][number]
    fields = output if isinstance(output, Mapping) else {"text": output}
    return Reply(fields.get("text"), fields.get("reasoning_content"), is_cut(entry["response"], number))


def is_cut(response: Any, number: int = 0) -> bool:
    """Whether one of the answers in an LM's response ended at max_tokens: of DSPy's engine API, or as an OpenAI client
    returns it (chat completions, responses)."""
    if isinstance(response, list | tuple):
        return number < len(response) and is_cut(response[number])
    if choices := part_of(response, "choices"):
        response = choices[number]
    reason = part_of(response, "finish_reason") or part_of(part_of(response, "incomplete_details"), "reason")
    return reason in ("length", "max_output_tokens", "max_tokens")


def part_of(value: Any, name: str) -> Any:
    """An attribute of a response, or an entry where it is a mapping; None where it has none."""
    return value.get(name) if isinstance(value, Mapping) else getattr(value, name, None)
