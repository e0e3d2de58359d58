"""What the engines take of DSPy that it does not call public: the place to look when it is upgraded. No torch here."""

from dspy._vendor.lm15.types import StreamEvent
from dspy.clients._deprecation import adapter_message_call
from dspy.clients.legacy_requests import _strict_json_schema as strict_schema

__all__ = ["StreamEvent", "adapter_message_call", "strict_schema"]
