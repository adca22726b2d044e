"""One file of this package on the Hugging Face hub or in a folder: found, written and pushed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clue_fast.errors import FileFormatError, HubError

LOGIN = "log in with `hf auth login`, set HF_TOKEN, or pass token"


def find_file(name: str | os.PathLike[str], file: str, **options: Any) -> Path:
    """Returns the path of a file of a folder, or of a repository of the hub.

    Args:
        name: of the folder, or "owner/name" on the hub.
        file: its name there.
        options: of ``huggingface_hub.hf_hub_download``, such as ``revision`` and ``token``.

    Raises:
        FileFormatError: the folder has no such file.
        HubError: the hub has none, or cannot be reached.
    """
    folder = Path(name)
    if folder.is_dir():
        if not (folder / file).is_file():
            raise FileFormatError(f"{folder} holds no {file}; name the folder that it was saved in")
        return folder / file
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(os.fspath(name), file, **options))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise HubError(
            f"{name} is no folder here, and {file} cannot be read from the hub: {_reason(error)}; check the name and "
            f"the network; for a private repository {LOGIN}"
        ) from error


def push_folder(
    repository: str,
    write: Callable[[Path], None],
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "",
    revision: str | None = None,
) -> str:
    """Pushes what is written into a folder to a repository of the hub, which is made if there is none.

    Args:
        repository: "owner/name".
        write: called with an empty folder.
        private: of a repository that is made now.
        token: of the account; default is that of the login.
        message: of the commit.
        revision: branch to push to; default is the main one.

    Returns:
        The address of the commit.

    Raises:
        HubError: there is no login, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi, get_token

    if not (token or get_token()):
        raise HubError(f"{repository} cannot be pushed to without a login: {LOGIN}")
    api = HfApi(token=token)
    try:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder))
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, revision=revision)
    except Exception as error:  # as above
        raise HubError(f"{repository} cannot be pushed to: {_reason(error)}; {LOGIN}, and check the name") from error
    return str(done.commit_url)


def _reason(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
