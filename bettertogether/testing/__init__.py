"""For tests of programs and engines: an engine with a known best answer, and the tests that every engine passes."""

from .engine_contract import EngineContract
from .fake_engine import Answer, FakeEngine, FakeRequest

__all__ = ["Answer", "EngineContract", "FakeEngine", "FakeRequest"]
