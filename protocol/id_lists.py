"""Lists of ids that a person gives: one by one, or `@FILE` with one on each line."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from protocol.errors import ConfigError

MAX_FILE_BYTES = 4 << 20


def read_ids(entries: Iterable[str], flag: str) -> tuple[str, ...]:
    """The ids that `entries` name, each once; `#` begins a comment in a file. Blocks on the disk.

    Args:
        flag: where they were given, for messages.

    Raises:
        ConfigError: a file cannot be read.
    """
    return tuple(dict.fromkeys(name for entry in entries for name in _expanded(entry, flag)))


def _expanded(entry: str, flag: str) -> Iterator[str]:
    if not entry.startswith("@"):
        yield entry
        return
    try:
        with Path(entry[1:]).expanduser().open("rb") as file:
            text = file.read(MAX_FILE_BYTES).decode(errors="replace")
    except OSError as error:
        raise ConfigError(f"{flag} {entry}: the file cannot be read: {error.strerror or error}") from None
    for line in text.splitlines():
        if name := line.partition("#")[0].strip():
            yield name
