"""What a person says about which peers to use. Pure: peers are named, records are matched."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dht.record import PeerRecord

MIN_END_CHARS = 6  # of a peer id; logs name peers by their last 8


@dataclass(frozen=True, slots=True)
class Rules:
    """Which peers a client uses. A peer is named by its id, by the end of its id, or by its public name.

    A public name proves nothing, since a peer gives it to itself: `trust` takes ids alone.

    Attributes:
        route: used wherever they serve and have not just failed; others only for what is left.
        avoid: never used, whatever `route` says.
        trust: with `trusted_only`, nobody else is used.
    """

    route: tuple[str, ...] = ()
    avoid: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    trusted_only: bool = False

    def allows(self, peer: PeerRecord) -> bool:
        """May the peer be used at all?"""
        if _named(peer, self.avoid):
            return False
        return not self.trusted_only or any(_ends_id(name, peer) for name in self.trust)

    def prefers(self, peer: PeerRecord) -> bool:
        """Is the peer one of `route`?"""
        return _named(peer, self.route)

    def excluding(self) -> str:
        """The flags by which peers may be left out, for messages; empty where all are allowed."""
        flags = (("--avoid", bool(self.avoid)), ("--trusted-only", self.trusted_only))
        return " or ".join(flag for flag, given in flags if given)


def _named(peer: PeerRecord, names: Iterable[str]) -> bool:
    return any(_ends_id(name, peer) or name == peer.public_name != "" for name in names)


def _ends_id(name: str, peer: PeerRecord) -> bool:
    return len(name) >= MIN_END_CHARS and peer.peer_id.endswith(name)
