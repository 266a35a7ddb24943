"""Claims on blocks: a peer says which ones it is about to serve before it loads them, so that no two fill one gap.

A claim is a record: of a peer that is joining, or online with `moving_to`. Two that chose at the same moment look again
once their claims are in the DHT, and the later one chooses anew. A claim lasts as long as its record: should the peer
die, a minute.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable, Iterable, Sequence

from dht.announcer import Announcer
from dht.record import PeerRecord
from dht.view import SwarmReader
from peer.standing import Standing
from protocol.errors import SwarmNotFound
from protocol.span import Span

logger = logging.getLogger(__name__)

LOOKS = 8
PAUSE_S = (0.1, 0.4)
"""Between a claim and the look for others': the claims of others need a moment too."""


def claimed(record: PeerRecord) -> Span | None:
    """The blocks that a peer is about to serve, and does not serve yet."""
    if record.moving_to is not None:
        return record.moving_to
    return record.span if record.state == "joining" else None


def came_first(other: PeerRecord, mine: PeerRecord) -> bool:
    """Is the other's claim the earlier one? Both sides come to the same answer, whatever their clocks say.

    Who drains in order to move has looked again already, and is taken to be first.
    """
    if other.state == "draining":
        return True
    return (other.sequence, other.peer_id) < (mine.sequence, mine.peer_id)


def rivals(mine: PeerRecord, others: Iterable[PeerRecord]) -> tuple[PeerRecord, ...]:
    """Those of `others` that claim blocks which `mine` claims too, and came first."""
    wanted = claimed(mine)
    if wanted is None:
        return ()
    return tuple(other for other in others if (of := claimed(other)) and of.overlap(wanted) and came_first(other, mine))


async def refreshed(reader: SwarmReader, fingerprint: str, peer_id: str) -> tuple[PeerRecord | None, list[PeerRecord]]:
    """This peer's record as the swarm has it now (None: it has none), and those of the others of its model."""
    try:
        await reader.refresh()
    except SwarmNotFound as error:
        logger.warning("%s; going by what was seen last", error)
    peers = reader.view.peers(fingerprint)
    mine = next((peer for peer in peers if peer.peer_id == peer_id), None)
    return mine, [peer for peer in peers if peer.peer_id != peer_id]


async def settle(
    standing: Standing,
    announcer: Announcer,
    reader: SwarmReader,
    choose: Callable[[Sequence[PeerRecord]], Span],
    rng: random.Random,
) -> None:
    """Looks whether others came first with the claim that was just announced, and claims what `choose` picks instead.

    After `LOOKS` looks it keeps what it has: too many peers for one gap do no harm, and move on later.
    """
    for _ in range(LOOKS):
        await asyncio.sleep(rng.uniform(*PAUSE_S))
        record = standing.record()
        mine, others = await refreshed(reader, record.fingerprint, record.peer_id)
        if mine is None or not rivals(mine, others):
            return
        better = choose(others)
        if better == standing.span:
            return
        logger.info("another peer came first with blocks of %s; taking %s", standing.span, better)
        standing.claim(better)
        await announcer.announce()
