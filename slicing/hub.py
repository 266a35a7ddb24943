"""Single files of Hugging Face hub repositories, with the hub's errors put into ours.

`HF_ENDPOINT`, `HF_HOME`, `HF_TOKEN` and `HF_HUB_OFFLINE` mean what they mean to huggingface_hub. It is imported on
first use: the embedded model and folders need no hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from protocol.errors import BrokenCheckpoint, UnknownModel

if TYPE_CHECKING:
    from huggingface_hub.utils._safetensors import SafetensorsFileMetadata


def commit_of(repo: str, revision: str | None) -> str:
    """The commit that `revision` (default: main) of `repo` is now, or was when it was last cached.

    Raises:
        UnknownModel: no such repository or revision, no config.json in it, no access, or no hub and nothing cached.
    """
    path = fetch(repo, "config.json", revision)
    if path is None:
        raise UnknownModel(f"the hub repository {repo!r} holds no transformers model: it has no config.json")
    # huggingface_hub keeps files under snapshots/<commit>/
    return path.parent.name


def fetch(repo: str, filename: str, revision: str | None) -> Path | None:
    """The cached copy of one file, downloaded first if need be; None if the repository has no such file.

    Without a hub, the copy that was cached last.

    Raises:
        UnknownModel: as `commit_of`.
    """
    from huggingface_hub import hf_hub_download

    known = _cached(repo, filename, revision)
    if known is not None:
        return known or None
    try:
        up = _is_up(repo, filename, revision)
        path = hf_hub_download(repo, filename, revision=revision, endpoint=_endpoint(), local_files_only=not up)
    except _hub_errors() as error:
        if _says_absent(error):
            return None
        raise _for_a_person(repo, error) from error
    return Path(path)


def _is_up(repo: str, filename: str, revision: str | None) -> bool:
    """Does the hub answer, be it no? Asked before `hf_hub_download`, which retries for 20 seconds where nobody does."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision, endpoint=_endpoint()))
    except _hub_errors() as error:
        return _is_answer(error)
    return True


def _cached(repo: str, filename: str, revision: str | None) -> Path | Literal[False] | None:
    """The file of that commit on this machine; False: the commit is known to have none; None: not known."""
    from huggingface_hub import _CACHED_NO_EXIST, try_to_load_from_cache

    if revision is None:
        return None
    found = try_to_load_from_cache(repo, filename, revision=revision)
    if found is _CACHED_NO_EXIST:
        return False
    return Path(found) if isinstance(found, str) else None


def remote_header(repo: str, filename: str, revision: str) -> SafetensorsFileMetadata:
    """The header of a safetensors file, by HTTP range requests: the tensors themselves stay where they are.

    Raises:
        BrokenCheckpoint: the repository has no such file, or it is no safetensors file.
        UnknownModel: as `commit_of`.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import SafetensorsParsingError

    try:
        return HfApi(endpoint=_endpoint()).parse_safetensors_file_metadata(repo, filename, revision=revision)
    except SafetensorsParsingError as error:
        raise BrokenCheckpoint(f"the header of {filename} in the hub repository {repo!r} is malformed") from error
    except _hub_errors() as error:
        if _says_absent(error):
            raise BrokenCheckpoint(f"the hub repository {repo!r} lacks the file {filename}") from error
        raise _for_a_person(repo, error) from error


def size_of(repo: str, filename: str, revision: str) -> int:
    """The size in bytes of a file at the hub; 0 where the hub does not say, or has no such file.

    Raises:
        UnknownModel: as `commit_of`.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    try:
        return get_hf_file_metadata(hf_hub_url(repo, filename, revision=revision, endpoint=_endpoint())).size or 0
    except _hub_errors() as error:
        if _says_absent(error):
            return 0
        raise _for_a_person(repo, error) from error


def is_cached(repo: str, filename: str, revision: str) -> bool:
    """Is the file on this machine already?"""
    return bool(_cached(repo, filename, revision))


def _endpoint() -> str | None:
    # huggingface_hub reads the variable once, when it is imported; a later change would go unnoticed
    return os.environ.get("HF_ENDPOINT")


def _hub_errors() -> tuple[type[Exception], ...]:
    """What huggingface_hub raises for a fault of the name, of the network, or of the hub."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    return HTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled


def _says_absent(error: Exception) -> bool:
    """Did the hub answer that the file is not there? (An unreachable hub is a subclass of that in huggingface_hub.)"""
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    return isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)


def _is_answer(error: Exception) -> bool:
    """Is it the hub that says no, and not the network?"""
    from huggingface_hub.errors import (
        HFValidationError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    return isinstance(
        error, RemoteEntryNotFoundError | RepositoryNotFoundError | RevisionNotFoundError | HFValidationError
    )


def _for_a_person(repo: str, error: Exception) -> UnknownModel:
    """Say what `error` means to the person who named `repo`."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    where = _endpoint() or "https://huggingface.co"
    match error:
        case GatedRepoError():
            message = f"{repo!r} is gated: accept its terms at {where}/{repo}, then log in with `hf auth login`"
        case RevisionNotFoundError():
            message = f"the hub repository {repo!r} has no such revision"
        case RepositoryNotFoundError() | HFValidationError():
            message = (
                f"there is no folder and no hub repository {repo!r} (asked {where}); if it is private, "
                "log in with `hf auth login`"
            )
        case _:
            message = (
                f"{repo!r} is no folder and not wholly in the local cache, and the hub at {where} cannot be reached "
                f"({type(error).__name__}); check the network, or name a folder"
            )
    return UnknownModel(message)
