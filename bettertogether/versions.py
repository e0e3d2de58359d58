"""The versions of the packages that a result may depend on."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import __version__


def versions() -> dict[str, str]:
    """Package name to version, for those that are installed."""
    found = {"bettertogether": __version__}
    for package in ("dspy", "torch", "transformers", "peft", "accelerate"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found
