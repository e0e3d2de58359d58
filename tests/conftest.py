"""Shared fixtures: DSPy without caches and without leftovers, run directories in the test's own folder."""

from __future__ import annotations

import functools
import gc
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import dspy
import pydantic
import pytest
from dspy.adapters import utils as dspy_values

# Before torch is imported: tiny models are fastest on one thread, and tests run beside one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

TEST_CUDA = "BETTERTOGETHER_TEST_CUDA"
if not os.environ.get(TEST_CUDA):
    # The same tests on every machine: where nothing else is asked for, a GPU would be taken.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# What a test writes need not outlive the machine, and thousands of waits for its disk are minutes.
os.fsync = lambda fd: None

# Looking through all that was imported for garbage, again and again, finds none.
gc.set_threshold(10_000, 50, 50)

# A shell that starts pytest in the background has it ignore Ctrl-C, and all that it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

pytest.register_assert_rewrite("bettertogether.testing.engine_contract")

from fakes import learner, parity_engine  # noqa: E402

from bettertogether.testing import FakeEngine  # noqa: E402

ADAPTERS = {"chat": dspy.ChatAdapter, "json": dspy.JSONAdapter, "xml": dspy.XMLAdapter}


# DSPy makes one for every value in every prompt: an eighth of all the time that tests take.
dspy_values.TypeAdapter = functools.cache(pydantic.TypeAdapter)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leave out what needs a GPU."""
    if item.get_closest_marker("cuda") and not os.environ.get(TEST_CUDA):
        pytest.skip(f"{TEST_CUDA} is not set: it needs a GPU")


@pytest.fixture(scope="session", params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """The processor, and a GPU for those who ask for it."""
    return str(request.param)


@pytest.fixture(scope="session", autouse=True)
def _no_dspy_cache() -> None:
    dspy.configure_cache(enable_disk_cache=False, enable_memory_cache=False)


@pytest.fixture(autouse=True)
def _own_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Beside the test's own folder: where a test takes long, hashes of its model are noted there.
    monkeypatch.setenv("BETTERTOGETHER_CACHE", f"{tmp_path}-cache")


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
