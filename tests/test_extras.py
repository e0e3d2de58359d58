"""What counts as an optional package that is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from bettertogether.errors import MissingExtraError
from bettertogether.extras import extra_module, is_installed


def test_a_folder_of_a_package_s_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_tracker" / "run-1").mkdir(parents=True)
    monkeypatch.syspath_prepend(tmp_path)
    assert not is_installed("some_tracker")
    with pytest.raises(MissingExtraError, match=r"SomeCallback needs some_tracker.*bettertogether\[some_tracker\]"):
        extra_module("some_tracker", "SomeCallback")
