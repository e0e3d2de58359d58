"""The versions of the packages that a result may depend on."""

from __future__ import annotations

import functools
from importlib.metadata import PackageNotFoundError, version

from . import __version__


def versions() -> dict[str, str]:
    """Package name to version, for those that are installed."""
    return {"bettertogether": __version__, **_installed()}


@functools.cache
def _installed() -> dict[str, str]:
    found = {}
    for package in ("dspy", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
