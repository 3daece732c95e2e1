"""Upload of a finished release to a repository of the Hugging Face Hub.

Nothing but the files of the release is sent, which the privacy gate has searched. A new repository is private, because
its owner decides who sees a model of patients' scans.
"""

from __future__ import annotations

import logging
import re
import shlex
from pathlib import Path

from samgraft.shared.errors import StorageError, UsageError
from samgraft.shared.fetch import OFFLINE_VARIABLE, is_offline

log = logging.getLogger(__name__)

LOGIN = "hf auth login"
NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
"""Form of a repository's name. The Hub has further rules, which it reports itself."""


def check_repository(repository: str) -> None:
    """Check the name of a repository and the login, before a release is made.

    Raises:
        UsageError: If the name is invalid, the network is disallowed, or there is no login.
    """
    from huggingface_hub import get_token

    if not NAME.fullmatch(repository):
        raise UsageError(f"--push must name a repository (got {repository!r}, expected OWNER/NAME).")
    if is_offline():
        raise UsageError(f"--push needs the network, which {OFFLINE_VARIABLE} disallows. Unset it or leave --push out.")
    if get_token() is None:
        raise UsageError("--push needs a login at the Hugging Face Hub.", next_command=LOGIN)


def push_release(folder: Path, repository: str) -> str:
    """Upload a release as one commit and return the address of the commit.

    Args:
        folder: Folder of a finished release.
        repository: Repository as ``OWNER/NAME``. It is created, private, if it does not exist.

    Raises:
        StorageError: If the Hub refuses it or cannot be reached. The release stays.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, repo_type="model", private=True, exist_ok=True)
        commit = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="Add checked release")
    # The library and its HTTP client raise classes without a common parent, and all mean that nothing was committed.
    except Exception as err:
        status = getattr(getattr(err, "response", None), "status_code", None)
        reason = f"status {status}" if status else type(err).__name__
        raise StorageError(
            f"the release could not be uploaded ({reason}).",
            where=repository,
            kept=f"the release {folder.name}",
            next_command=f"{LOGIN}, then hf upload {repository} {shlex.quote(str(folder))}",
        ) from err
    return str(commit.commit_url)
