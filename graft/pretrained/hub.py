"""The Hugging Face Hub: names of repositories, downloads and uploads."""

import re
from collections.abc import Sequence
from pathlib import Path

from graft.console import one_line
from graft.errors import InputError, RunError

# The rule of huggingface_hub's validate_repo_id, which takes a while to import. Graft requires an
# owner, so that the name of a local folder is never looked up on the Hub.
_REPO_NAME = re.compile(r"\b[\w.-]{1,96}\b/\b[\w.-]{1,96}\b", re.ASCII)


def is_repo_name(name: str) -> bool:
    """Whether the Hub accepts a name as that of a repository, owner/name."""
    accepted = _REPO_NAME.fullmatch(name) is not None
    return accepted and not ("--" in name or ".." in name or name.endswith(".git"))


def fetch_from_hub(name: str, patterns: Sequence[str]) -> Path:
    """Download files of a repository, or take them from the local cache.

    Args:
        name: the repository, as owner/name.
        patterns: globs of the files to download.

    Returns:
        The folder with the files.

    Raises:
        InputError: there is no such repository, or it cannot be downloaded.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the client raises a dozen unrelated types
        raise InputError(
            f"there is no local folder {name}, and it cannot be fetched from the Hub: "
            f"{one_line(error)}"
        ) from error


def check_repository(name: str) -> None:
    """Check the name of a repository to upload to, before any work.

    Raises:
        InputError: the Hub does not accept the name.
    """
    if not is_repo_name(name):
        raise InputError(f"--upload-repo {name}: the Hub takes names of the form owner/name")


def upload_folder(folder: Path, name: str) -> str:
    """Upload all files of a folder to a repository, which is created if it does not exist.

    Returns:
        The URL of the commit.

    Raises:
        RunError: the upload failed.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(name, exist_ok=True)
        commit = api.upload_folder(
            folder_path=folder, repo_id=name, commit_message="Upload with Graft"
        )
    except Exception as error:  # as above
        raise RunError(
            f"{folder} is written, but uploading it to the Hub as {name} failed: "
            f"{one_line(error)}; log in with `hf auth login` if you have not"
        ) from error
    return str(commit.commit_url)
