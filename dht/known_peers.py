"""Nodes that this machine has met, kept so that a restart needs no bootstrap node."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from dht.files import read_json, write_json
from dht.maddr import Maddr

log = logging.getLogger(__name__)

FILE = "known-peers.json"
MAX_KNOWN = 64
FORGET_AFTER_S = 30 * 24 * 3600.0


def load(home: Path, swarm: str = "") -> tuple[str, ...]:
    """Multiaddrs of known nodes, last met first. A damaged file counts as empty. Blocks on the disk.

    `swarm`: the name of a private one (`JoinToken.name`), whose nodes are kept apart.
    """
    return tuple(_read(_path(home, swarm)))


def remember(home: Path, maddrs: Iterable[str], now: float, swarm: str = "") -> None:
    """Note that these nodes were met at `now` (seconds since 1970). Blocks on the disk.

    A node is kept under its latest address only. A failure to write is logged: it costs a later start some time.
    """
    path = _path(home, swarm)
    known = {maddr.peer_id: (str(maddr), now) for text in maddrs if (maddr := Maddr.parse(text)) is not None}
    for text, seen in _read(path).items():
        maddr = Maddr.require(text)
        if now - seen < FORGET_AFTER_S:
            known.setdefault(maddr.peer_id, (text, seen))
    latest = sorted(known.values(), key=lambda entry: -entry[1])[:MAX_KNOWN]
    try:
        write_json(path, {"peers": [{"maddr": text, "seen": seen} for text, seen in latest]})
    except OSError as error:
        log.warning("known peers cannot be saved in %s: %s", home, error)


def _path(home: Path, swarm: str) -> Path:
    return home / (f"known-peers-{swarm}.json" if swarm else FILE)


def _read(path: Path) -> dict[str, float]:
    """Multiaddr -> when it was met, last met first; entries that are none are left out."""
    state = read_json(path)
    entries = state.get("peers") if isinstance(state, dict) else None
    if not isinstance(entries, list):
        if state is not None:
            log.warning("ignoring %s: it is not a list of peers", path)
        return {}
    found = {}
    for entry in entries:
        text, seen = (entry.get("maddr"), entry.get("seen")) if isinstance(entry, dict) else (None, None)
        if isinstance(text, str) and isinstance(seen, int | float) and Maddr.parse(text) is not None:
            found[text] = float(seen)
    return dict(sorted(found.items(), key=lambda item: -item[1]))
