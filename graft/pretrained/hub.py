"""The Hugging Face Hub: names of repositories, downloads and uploads."""

import re
from collections.abc import Sequence
from pathlib import Path

from graft.errors import InputError, RunError

# As huggingface_hub's validate_repo_id has it, which takes a while to import. Graft asks for an
# owner, so that the name of a local folder is never looked up on the Hub.
_REPO_NAME = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)


def is_repo_name(name: str) -> bool:
    """Whether the Hub accepts a name as that of a repository, owner/name."""
    accepted = _REPO_NAME.fullmatch(name) is not None
    return accepted and not ("--" in name or ".." in name or name.endswith(".git"))


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
    """Refuse a name for an upload early, before any work.

    Raises:
        InputError: the Hub does not accept the name.
    """
    if not is_repo_name(name):
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
