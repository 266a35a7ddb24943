"""Which peers this page reaches; of the others, what stands in the way, and what their operators can do. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dashboard.events import name_of
from dashboard.health import PeerHealth, Standing
from protocol.limits import WIRE_VERSION


@dataclass(frozen=True, slots=True)
class Advice:
    """What is wrong with reaching peers, and what their operators can do about it."""

    trouble: str
    remedy: str


def reachability(peers: Sequence[PeerHealth]) -> str:
    """How many peers this page reaches, in one sentence."""
    asked = [peer for peer in peers if peer.reach.answers is not None]
    answering = sum(1 for peer in asked if peer.reach.answers)
    if not asked:
        return "No peer was asked yet whether it can be reached from here."
    if answering == len(asked):
        return f"This page reaches {'the only peer' if answering == 1 else f'all {answering} peers'} that it asked."
    return f"This page reaches {answering} of {len(asked)} peers that it asked."


def advice(peers: Sequence[PeerHealth]) -> Iterable[Advice]:
    """What stands in the way of peers that cannot be used, and what to do about it."""
    silent = [peer for peer in peers if peer.standing is Standing.SILENT]
    private = [peer for peer in silent if peer.has_private_address and not peer.reach.ever]
    lost = [peer for peer in silent if peer not in private]
    if private:
        yield Advice(
            f"{_names(private)} {_verb(private)} an address of a network of its own: it cannot be reached from here.",
            "Yours? Give it the address that others see: --announce-host NAME, and forward --port and --dht-port of"
            " your router to it.",
        )
    if lost:
        yield Advice(
            f"{_names(lost)} cannot be reached.",
            "Yours? See whether it still runs. If it does, others must reach both its ports, --port and --dht-port:"
            " open them in the firewall; behind a router, forward them, and say --announce-host.",
        )
    strange = [peer for peer in peers if not peer.is_compatible]
    if strange:
        yield Advice(
            f"{_names(strange)} cannot be used: another version of the protocol than {WIRE_VERSION}.",
            "Yours? Update it: the newest Potluck speaks what most of this swarm speaks.",
        )


def _names(peers: Sequence[PeerHealth], shown: int = 3) -> str:
    names = [name_of(peer) for peer in peers[:shown]]
    if len(peers) > shown:
        names.append(f"{len(peers) - shown} more")
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _verb(peers: Sequence[PeerHealth]) -> str:
    return "announces" if len(peers) == 1 else "announce"
