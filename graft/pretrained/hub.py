"""Fetches from the Hugging Face Hub, and hands folders to it."""

import re
from collections.abc import Sequence
from pathlib import Path

from graft.errors import InputError, RunError


def fetch_from_hub(name: str, patterns: Sequence[str]) -> Path:
    """Download what is new of a repository, or take it from the local cache.

    Args:
        name: the repository, as owner/name.
        patterns: globs of the files that are wanted.

    Returns:
        The folder with the files.

    Raises:
        InputError: `name` is no repository's name, or the Hub does not give it.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # Its client raises a dozen unrelated types for what can go wrong.
        reason = " ".join(str(error).split())
        raise InputError(
            f"{name} is no folder here, and the Hub does not give it: {reason}"
        ) from error


def check_repository(name: str) -> None:
    """Refuse early, before any work, what cannot be a repository's name.

    Raises:
        InputError: it is not of the form owner/name.
    """
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise InputError(f"--upload-repo {name}: give owner/name")


def upload_folder(folder: Path, name: str) -> str:
    """Put all files of a folder into a repository, which is made if there is none.

    Returns:
        The address of the commit.

    Raises:
        RunError: the Hub does not take it; the folder stays as it is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        done = api.upload_folder(
            folder_path=folder, repo_id=name, commit_message="Upload with Graft"
        )
    except Exception as error:  # as above
        reason = " ".join(str(error).split())
        raise RunError(
            f"{folder} is written, but the Hub does not take it as {name}: {reason}; "
            "`hf auth login` tells it who you are"
        ) from error
    return str(done.commit_url)
