"""Where a model's files are: the embedded model, a folder, or a Hugging Face hub repository, found by name.

Nothing here needs torch or transformers; the hub is only asked when the name is neither embedded nor a folder.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import BrokenCheckpoint, UnknownModel
from slicing import hub

EMBEDDED = Path(__file__).parent / "embedded"
EMBEDDED_NAMES = ("potluck-demo",)

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?")


@dataclass(frozen=True, slots=True)
class ModelSource:
    """One model's files.

    Attributes:
        name: what the user wrote; for messages and for the swarm's list of models.
        location: an absolute folder, or a hub repository id where `revision` is set.
        revision: the commit that the hub resolved the name to; None for a folder.
    """

    name: str
    location: str
    revision: str | None = None

    def find(self, filename: str) -> Path | None:
        """The local path of one file, downloaded from the hub if need be; None if the model has no such file.

        Raises:
            UnknownModel: the hub cannot be reached and the file is not in the local cache.
        """
        if self.revision is not None:
            return hub.fetch(self.location, filename, self.revision)
        path = Path(self.location, filename)
        return path if path.is_file() else None

    def file(self, filename: str) -> Path:
        """Like `find`, for a file that must exist.

        Raises:
            BrokenCheckpoint: the model has no such file.
            UnknownModel: see `find`.
        """
        path = self.find(filename)
        if path is None:
            raise BrokenCheckpoint(f"model {self.name!r} lacks the file {filename}; download it again")
        return path


def resolve(name: str, *, revision: str | None = None) -> ModelSource:
    """Find the model called `name`: an embedded model, else an existing folder, else a hub id.

    Args:
        revision: branch, tag or commit of a hub repository; a hub model is pinned to the commit it resolves to now.

    Raises:
        UnknownModel: there is none, its hub cannot be reached, or access to it was not granted.
    """
    return find_here(name) or ModelSource(name, name, hub.commit_of(name, revision))


def find_here(name: str) -> ModelSource | None:
    """What `resolve` finds without asking the hub: an embedded model or a folder. None: only the hub can say.

    Raises:
        UnknownModel: the name is none that the hub could know either, or the folder holds no model.
    """
    if name in EMBEDDED_NAMES:
        folder = EMBEDDED / name
        if not (folder / "config.json").is_file():
            raise UnknownModel(f"this installation lacks the embedded model {name!r}; reinstall potluck")
        return ModelSource(name, str(folder))
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UnknownModel(f"the folder {name!r} holds no model: it has no config.json")
        return ModelSource(name, str(folder.resolve()))
    if not _HUB_ID.fullmatch(name):
        raise UnknownModel(
            f"there is no folder {name!r}, and it is no hub id either; name a folder with a config.json, "
            f"a hub id such as org/model, or {EMBEDDED_NAMES[0]}"
        )
    return None
