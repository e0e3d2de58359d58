"""Optional packages: whether they are there, and a clear error where they are not.

A folder that has a package's name counts as none, though Python would import it: wandb leaves a folder `wandb` beside
the program that logs.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from .errors import MissingExtraError


def is_installed(package: str) -> bool:
    """Whether a package can be imported; it is not imported for that."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def extra_module(package: str, needed_by: str) -> Any:
    """The package, imported. Raises MissingExtraError, with the extra of the package's name as the cure."""
    try:
        module = importlib.import_module(package)
        if module.__spec__ is not None and module.__spec__.origin is None:
            raise ImportError(f"{package} is a folder without a module")
    except ImportError as error:
        raise MissingExtraError(
            f"{needed_by} needs {package}, which is not installed: pip install 'bettertogether[{package}]'."
        ) from error
    return module
