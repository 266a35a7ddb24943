"""Where a peer is reached."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Place:
    """Where a peer is reached, as its record says it: see `dht.record.PeerRecord`."""

    addresses: tuple[str, ...] = ()
    relayed: int = 0
    relay_port: int = 0
    relay_places: int = 0
