"""What the engines take of DSPy that it does not call public: the place to look when it is upgraded. No torch here."""

from dspy._vendor.lm15.types import StreamEvent
from dspy.clients._deprecation import adapter_message_call

__all__ = ["StreamEvent", "adapter_message_call"]
