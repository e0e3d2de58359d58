"""What the engines take of DSPy that it does not call public: the place to look when it is upgraded. No torch here."""

from dspy._vendor.lm15.types import StreamEvent

__all__ = ["StreamEvent"]
