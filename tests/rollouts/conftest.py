"""A two-step program's engine."""

from __future__ import annotations

import pytest
from fakes import two_step_engine

from bettertogether.testing import FakeEngine


@pytest.fixture
def engine() -> FakeEngine:
    return two_step_engine(lambda *_: True)
