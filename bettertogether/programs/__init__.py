"""Programs as values: copied, described, restored. What every other wing needs of a `dspy.Module`."""

from .program import prompts_state

__all__ = ["prompts_state"]
