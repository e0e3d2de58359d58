"""Shared fixtures: DSPy without caches and without leftovers, run directories in the test's own folder."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import dspy
import pytest

# Before torch is imported: tiny models are fastest on one thread, and tests run beside one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell that starts pytest in the background has it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("bettertogether.testing.engine_contract")

from fakes import learner, parity_engine  # noqa: E402

from bettertogether.testing import FakeEngine  # noqa: E402

ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


@pytest.fixture(scope="session", autouse=True)
def _no_dspy_cache() -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BETTERTOGETHER_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _fresh_settings() -> Iterator[None]:
    with dspy.context(lm=None, adapter=None, callbacks=[], trace=[], num_threads=8):
        yield


@pytest.fixture(params=list(ADAPTERS))
def adapter(request: pytest.FixtureRequest) -> Iterator[dspy.Adapter]:
    """Each of DSPy's text adapters in turn, in use."""
    chosen = ADAPTERS[request.param]()
    with dspy.context(adapter=chosen):
        yield chosen


@pytest.fixture
def learning_engine() -> FakeEngine:
    """See `fakes.learner`."""
    return parity_engine(learner)
