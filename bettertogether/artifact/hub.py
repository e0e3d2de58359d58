"""A program as a repository on the Hugging Face hub."""

from __future__ import annotations

import tempfile
from pathlib import Path

import dspy

from ..errors import ArtifactError
from .artifact import REPORT, require_module, write

_OURS = ["adapters/*", REPORT]
"""What an earlier push may have left that this one does not write."""


def push_to_hub(
    program: dspy.Module,
    repo: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    message: str = "Save the program",
) -> str:
    """Save a program to a model repository on the Hugging Face hub, in one commit; returns the commit's URL.

    What is written is what `save` writes, with a model card; adapters and the report of an earlier push that the
    program no longer has are deleted there. Base weights are not copied.

    Args:
        program: What `compile` returned, or any program that `save` takes.
        repo: "owner/name", or "name" for a repository of your own; it is made where there is none.
        private: Whether a new repository is private; None: the owner's default.
        token: As in huggingface_hub; None: that of `hf auth login`.
        revision: Branch to write to; None: main.
        message: Commit message.

    Raises ArtifactError for a program that can't be saved, a name that the hub does not allow, and whatever the hub
    answers. `load(snapshot_download(repo, local_dir="my-program"))` gives the program back.
    """
    require_module(program, "program")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ArtifactError(f"repo={repo!r:.100} is not allowed: give 'owner/name'. {error}") from error
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        write(program, Path(folder), repo=repo)
        try:
            name = api.create_repo(repo, private=private, exist_ok=True).repo_id
            commit = api.upload_folder(
                repo_id=name,
                folder_path=folder,
                revision=revision,
                commit_message=message,
                delete_patterns=_OURS,
            )
        except Exception as error:
            reason = " ".join(str(error).split())
            raise ArtifactError(
                f"{repo} can't be written on the hub: {reason} Log in with `hf auth login`, or give a token= that may "
                "write there. The program is as it was; save(program, folder) keeps it on this machine."
            ) from error
    return str(commit.commit_url)
