"""What a base model is, by content, so that its name changes whenever its answers may.

Weights are hashed whole (SHA-256, one thread a file). A hash is kept in the cache folder under the file's path, size,
times and inode, so that each file is read once; a blob of the hub's cache has its hash for a name and is not read,
unless it was written to after it was linked.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ..errors import ModelError, RunDirectoryError
from ..files import atomic_write, cache_folder, sha256_of
from ..printable import get_logger

logger = get_logger(__name__)

WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""In the order in which transformers looks for them."""
WEIGHT_ENDINGS = (".safetensors", ".bin")
SMALL_FILES = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "chat_template.jinja", "chat_template.json",
)  # fmt: skip
TEMPLATES = "additional_chat_templates/*.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json",
)  # fmt: skip
"""The first is the whole tokenizer; the others count where it is missing."""
SETTLED_S = 2.0
"""A file that changed later than this before now may change again within one tick of its clock: not remembered."""
SLOW_BYTES = 1 << 30
_BLOB = re.compile(r"[0-9a-f]{64}")
_remembered: dict[tuple[Any, ...], str] = {}


def model_hash(source: str | Path, commit: str | None = None) -> str:
    """SHA-256 (hex) over the weights, config, tokenizer and chat template of a model, wherever it is.

    `commit` is the version of a hub id. Raises ModelError where a file can't be read.
    """
    folder = Path(source).expanduser()
    try:
        parts = _folder_parts(folder) if folder.is_dir() else _hub_parts(str(source), commit)
    except (OSError, ValueError) as error:
        raise ModelError(f"The files of the model {str(source)!r} can't be read: {error}") from error
    return hashlib.sha256(json.dumps(sorted(parts.items())).encode()).hexdigest()


def short_hash(content: str, traits: Mapping[str, Any]) -> str:
    """8 hex digits for a model's content together with whatever else decides its answers."""
    return hashlib.sha256(json.dumps([content, traits], sort_keys=True).encode()).hexdigest()[:8]


def short_name(model: str | Path) -> str:
    """What a model is called: its folder's name, or the last part of its hub id."""
    path = Path(str(model).rstrip("/")).resolve() if Path(model).is_dir() else Path(model)
    name = path.name
    if path.parent.name == "snapshots":
        # Of the hub's cache: models--OWNER--NAME/snapshots/COMMIT.
        name = path.parent.parent.name.rpartition("--")[2]
    # In a model name, "@" begins the adapter.
    return name.replace("@", "_")


def _folder_parts(folder: Path) -> dict[str, str]:
    """File name to hash, for the files that transformers reads of a folder."""
    small = _first_or_rest(TOKENIZER_FILES, lambda name: (folder / name).is_file())
    names = [name for name in (*SMALL_FILES, *small, *_templates(folder)) if (folder / name).is_file()]
    hashes = {name: sha256_of(folder / name) for name in names}
    main = next((name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if main is None:
        weights = [path for path in sorted(folder.iterdir()) if path.name.endswith(WEIGHT_ENDINGS)]
    else:
        weights = [folder / name for name in _shards(folder / main)]
    return hashes | file_hashes(weights)


def _templates(folder: Path) -> list[str]:
    """Names of the further chat templates."""
    return [path.relative_to(folder).as_posix() for path in folder.glob(TEMPLATES)]


def _shards(path: Path) -> list[str]:
    """Names of the weight files that belong to the main one."""
    if not path.name.endswith(".index.json"):
        return [path.name]
    return sorted(set(json.loads(path.read_bytes())["weight_map"].values()))


def _first_or_rest(names: Iterable[str], exists: Any) -> list[str]:
    first, *rest = names
    return [first] if exists(first) else rest


def _hub_parts(repo: str, commit: str | None) -> dict[str, str]:
    """As `_folder_parts`, for a hub id: weights that are not here yet are known by the hub's record of their hash."""
    from huggingface_hub import try_to_load_from_cache

    def local(name: str) -> Path | None:
        found = try_to_load_from_cache(repo, name, revision=commit)
        return Path(found) if isinstance(found, str) else None

    small = _first_or_rest(TOKENIZER_FILES, local)
    config = local("config.json")
    templates = [] if config is None else _templates(config.parent)
    here = {name: path for name in (*SMALL_FILES, *small, *templates) if (path := local(name)) is not None}
    hashes = {name: sha256_of(path) for name, path in here.items()}
    for main in WEIGHT_FILES:
        path = local(main)
        if path is not None:
            shards = {name: local(name) for name in _shards(path)}
            held = file_hashes(found for found in shards.values() if found is not None)
            return hashes | {name: held.get(name) or _remote_hash(repo, name, commit) for name in shards}
    return hashes | _remote_weights(repo, commit)


def _remote_weights(repo: str, commit: str | None) -> dict[str, str]:
    """The weights of a repository of which none are here."""
    import httpx
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    for main in WEIGHT_FILES:
        try:
            if not main.endswith(".index.json"):
                return {main: _remote_hash(repo, main, commit)}
            shards = _shards(Path(hf_hub_download(repo, main, revision=commit)))
            return {name: _remote_hash(repo, name, commit) for name in shards}
        except EntryNotFoundError:
            continue
        except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
            logger.info("The hub does not tell the hashes of %s (%s); its commit stands for them.", repo, error)
            break
    return {"commit": str(commit)}


def _remote_hash(repo: str, name: str, commit: str | None) -> str:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    return str(get_hf_file_metadata(hf_hub_url(repo, name, revision=commit)).etag)


def file_hashes(paths: Iterable[Path]) -> dict[str, str]:
    """SHA-256 of each file by its name; several are read at once."""
    files = list(paths)
    size_bytes = sum(path.stat().st_size for path in files)
    started = time.perf_counter()
    with ThreadPoolExecutor(max(1, min(len(files), os.cpu_count() or 1))) as pool:
        hashes = dict(zip((path.name for path in files), pool.map(file_hash, files), strict=True))
    seconds = time.perf_counter() - started
    if size_bytes > SLOW_BYTES and seconds > 1.0:
        logger.info("Read %.1f GB of weights once for their hash, in %.1f s.", size_bytes / 1e9, seconds)
    return hashes


def file_hash(path: Path) -> str:
    """SHA-256 of a file; read only where the hash of exactly this file is not known."""
    real = path.resolve()
    if _is_untouched_blob(path, real):
        return real.name
    identity = _identity(real)
    known = _recall(identity)
    if known is not None:
        return known
    digest = sha256_of(real)
    changed_ns = max(identity[2], identity[3])
    if _identity(real) == identity and time.time_ns() - changed_ns > SETTLED_S * 1e9:
        _remember(identity, digest)
    return digest


def _is_untouched_blob(link: Path, real: Path) -> bool:
    """Whether a file lies in the hub's cache as it was downloaded, under the name of its hash and linked after that."""
    named = real.parent.name == "blobs" and _BLOB.fullmatch(real.name) is not None
    return (
        named
        and real.parent.parent.name.startswith("models--")
        and link.is_symlink()
        and real.stat().st_mtime_ns <= link.lstat().st_mtime_ns
    )


def _identity(path: Path) -> tuple[str, int, int, int, int]:
    status = path.stat()
    return str(path), status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _memo(path: str) -> Path:
    return (
        cache_folder() / "hashes" / f"{hashlib.sha256(path.encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.json"
    )


def _recall(identity: tuple[Any, ...]) -> str | None:
    if identity in _remembered:
        return _remembered[identity]
    try:
        note = json.loads(_memo(identity[0]).read_text())
        found = note["sha256"] if note["file"] == list(identity) else None
    except (OSError, ValueError, KeyError, TypeError, RunDirectoryError):
        # No note, or one that can't be read: the file is read instead.
        return None
    if found is not None:
        _remembered[identity] = found
    return found


def _remember(identity: tuple[Any, ...], sha256: str) -> None:
    _remembered[identity] = sha256
    try:
        memo = _memo(identity[0])
        memo.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(memo, json.dumps({"file": identity, "sha256": sha256}))
    except (OSError, RunDirectoryError) as error:
        logger.info("The hash of %s can't be kept for the next process: %s", identity[0], error)
