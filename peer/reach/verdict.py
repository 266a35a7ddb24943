"""Whether this peer can be reached, by what others say; and whom to ask, and who relays. Pure.

One peer's word is not enough where there are two, and those in one block of addresses count as one: they may be one
person's, or stand beside us behind the same router.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from dht.record import PeerRecord
from peer.reach.dialback import Answer, Helper
from protocol.hosts import block, host_of, ip, is_global, is_loopback
from protocol.limits import WIRE_VERSION

Reachable = Literal["yes", "no", "unclear"]

ASKED = 5  # peers, for each of IPv4 and IPv6
ENOUGH = 2  # that agree, where there are so many


@dataclass(frozen=True, slots=True)
class Position:
    """Where this peer stands.

    Attributes:
        hosts: to announce, those first that more can use.
        seen: hosts from which others saw it come, with what is known of its port there; empty: nobody said anything
            that counts.
        needs_relay: some of those whom it is there for cannot dial it: all, or those who only have IPv4.
        relays: others reached its relay, too.
    """

    hosts: tuple[str, ...]
    seen: Mapping[str, Reachable] = field(default_factory=dict)
    needs_relay: bool = False
    relays: bool = False

    @property
    def is_hidden(self) -> bool:
        """Nobody can dial it, and those who were asked agree on that."""
        return bool(self.seen) and set(self.seen.values()) == {"no"}


def helpers(peers: Iterable[PeerRecord], own_id: str, rng: random.Random) -> list[Helper]:
    """Whom to ask: a few at IPv4 addresses, a few at IPv6 ones, from as many blocks of addresses as there are."""
    able = [p for p in peers if p.peer_id != own_id and p.wire_version == WIRE_VERSION and p.state != "offline"]
    rng.shuffle(able)
    chosen: list[Helper] = []
    for version in (4, 6):
        found = [(peer, [at for at in peer.direct if _version(host_of(at)) == version]) for peer in able]
        chosen += _from_many_blocks([Helper(peer, at[0]) for peer, at in found if at])[:ASKED]
    return chosen


def _from_many_blocks(found: Sequence[Helper]) -> list[Helper]:
    """The same, those first of which none stands in another one's block."""
    first = {helper.block: number for number, helper in reversed(list(enumerate(found)))}
    return [found[n] for n in sorted(range(len(found)), key=lambda n: n not in first.values())]


def _version(host: str) -> int:
    """Of the internet protocol; a name is taken to lead to an IPv4 address."""
    found = ip(host)
    return 4 if found is None else found.version


def judge(answers: Iterable[Answer], port: int) -> dict[str, Reachable]:
    """For each host from which we were seen to come: is this port of it reached?"""
    votes: dict[str, dict[str, bool]] = {}
    for answer in answers:
        by_block = votes.setdefault(answer.host, {})
        by_block[answer.block] = by_block.get(answer.block, False) or port in answer.reached
    verdicts: dict[str, Reachable] = {}
    for host, by_block in votes.items():
        yes, enough = sum(by_block.values()), min(ENOUGH, len(by_block))
        no = len(by_block) - yes
        verdicts[host] = "yes" if yes >= enough and yes > no else "no" if no >= enough and no > yes else "unclear"
    return verdicts


def settle(
    answers: Sequence[Answer],
    port: int,
    relay_port: int,
    plausible: Sequence[str],
    announced: Collection[str] | None = None,
) -> Position:
    """Where this peer stands, by what others say.

    Hosts of the local network are announced only as long as nobody was met beyond it: outside they are of no use, and
    nobody's business. That others on this very machine reach us says nothing.

    Args:
        port: the gRPC port, as others see it; `relay_port` likewise, 0: it does not relay.
        plausible: hosts to announce where nobody says anything, or the one that the user named.
        announced: IP addresses of the host that the user named; None: the user named none. It is believed where nobody
            sees us come from it.
    """
    outside = tuple(host for host in plausible if not is_loopback(host)) or tuple(plausible)
    telling = [answer for answer in answers if not is_loopback(answer.host) and ip(answer.host) is not None]
    if not telling:
        lives_here = all(is_loopback(host) for host in outside)  # as demonstrations and tests do
        return Position(outside, relays=lives_here and any(relay_port in answer.reached for answer in answers))
    verdicts = judge(telling, port)
    if any(is_global(host) for host in verdicts):
        verdicts = {host: verdict for host, verdict in verdicts.items() if is_global(host)}
    if announced is not None:
        verdicts = {host: verdict for host, verdict in verdicts.items() if host in announced}
        if not verdicts:
            return Position(tuple(plausible), relays=bool(relay_port))
    hosts = sorted((h for h, verdict in verdicts.items() if verdict != "no"), key=lambda h: verdicts[h] != "yes")
    if announced is not None and hosts:
        hosts = list(plausible)
    relayed = judge(telling, relay_port) if relay_port else {}
    return Position(
        tuple(hosts),
        verdicts,
        needs_relay=any(_lacks(verdicts, version) for version in (4, 6)),
        relays=any(relayed.get(host) == "yes" and verdict == "yes" for host, verdict in verdicts.items()),
    )


def _lacks(verdicts: Mapping[str, Reachable], version: int) -> bool:
    """Are there hosts of that internet protocol from which we come, and none at which we are reached?"""
    known = [verdict for host, verdict in verdicts.items() if _version(host) == version]
    return bool(known) and "yes" not in known


def choose_relay(
    peers: Iterable[PeerRecord],
    own_id: str,
    taken: Collection[PeerRecord],
    avoid: Collection[str],
    rng: random.Random,
) -> PeerRecord | None:
    """Another relay beside those that are `taken`, best not of the same block of addresses; None: there is none."""
    able = [
        peer
        for peer in peers
        if peer.relay_port and peer.relay_places and peer.direct and peer.state == "online"
        if peer.peer_id not in avoid and peer.peer_id != own_id and peer.peer_id not in {each.peer_id for each in taken}
    ]
    blocks = {block(host_of(each.direct[0])) for each in taken if each.direct}
    elsewhere = [peer for peer in able if block(host_of(peer.direct[0])) not in blocks]
    return rng.choice(elsewhere or able) if able else None
