"""When this peer serves other blocks than it does: where the swarm needs it clearly more, and nobody is hurt."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Iterable, Sequence

from dht.record import PeerRecord
from dht.view import SwarmReader, SwarmView
from peer.claim import came_first, refreshed, rivals
from peer.host import Served
from peer.placement import MovePolicy, Placed, better_span, lacking, may_move, next_check_s, placed
from peer.standing import Standing
from protocol.span import Span, missing_spans


def is_safe(mine: PeerRecord, target: Span, others: Sequence[PeerRecord]) -> bool:
    """Does the swarm lose nothing while `mine` moves to `target`, and after it?

    Every block that is given up must be served by another peer, which stays; and so must those that are kept, for they
    are not served meanwhile: unless no answer can be made anyway, because other blocks have no peer.
    Another that is about to move as well, but said so later than `mine` did, will see that it must stay.
    """

    def stays(other: PeerRecord) -> bool:
        gives_way = mine.moving_to is not None and not came_first(other, mine)
        return other.state == "online" and (other.moving_to is None or gives_way)

    staying = [other.span for other in others if stays(other)]
    is_whole = not missing_spans([mine.span, *(o.span for o in others if o.state == "online")], mine.n_blocks)
    alone = [block for block in range(mine.span.start, mine.span.stop) if not any(block in span for span in staying)]
    return not alone if is_whole else all(block in target for block in alone)


def may_go(mine: PeerRecord, target: Span, others: Sequence[PeerRecord]) -> bool:
    """May a peer whose claim on `target` is known to the swarm go there? Not if another's came first, or it would leave
    a hole."""
    return not rivals(mine, others) and is_safe(mine, target, others)


class Balance:
    """Looks from time to time where this peer is needed most."""

    def __init__(
        self,
        standing: Standing,
        served: Served,
        reader: SwarmReader,
        policy: MovePolicy,
        rng: random.Random,
    ) -> None:
        self._standing = standing
        self._served = served
        self._reader = reader
        self._policy = policy
        self._rng = rng
        self._since_s = time.monotonic()
        self._rest_until_s = 0.0

    def arrived(self) -> None:
        """The peer serves its span from now on."""
        self._since_s = time.monotonic()

    def rest(self) -> None:
        """A move failed: no other for a while, for it cost those who were sent away."""
        self._rest_until_s = time.monotonic() + self._policy.min_stay_s

    async def due(self, num_blocks: int) -> Span:
        """Waits until a move pays; where to. `num_blocks`: the most that this peer can hold."""
        while True:
            await self._pause()
            mine, others = await self._seen()
            if mine is None or mine.state != "online" or self._standing.leaving:
                continue
            now_s = time.monotonic()
            stayed_s = now_s - self._since_s
            if now_s < self._rest_until_s or not may_move(self._policy, stayed_s, gap=self._lacks(self._reader.view)):
                continue
            target = self._target(mine, others, num_blocks)
            if target is not None and is_safe(mine, target, others):
                return target

    async def still_due(self, target: Span) -> bool:
        """May this peer, which has announced that it moves to `target`, go there? Looks anew."""
        mine, others = await self._seen()
        # A record that the swarm does not have is no claim that others could heed.
        return mine is not None and mine.moving_to == target and may_go(mine, target, others)

    async def _pause(self) -> None:
        """Until the next look is due; sooner if meanwhile blocks come to lack peers."""
        if not self._lacks(self._reader.view):
            try:
                await self._reader.wait_until(self._lacks, next_check_s(self._policy, self._rng, gap=False))
            except TimeoutError:
                return
        await asyncio.sleep(next_check_s(self._policy, self._rng, gap=True))

    async def _seen(self) -> tuple[PeerRecord | None, list[PeerRecord]]:
        return await refreshed(self._reader, self._served.fingerprint, self._standing.record().peer_id)

    def _lacks(self, view: SwarmView) -> bool:
        return lacking(self._served.n_blocks, self._placed(view.peers(self._served.fingerprint)))

    def _target(self, mine: PeerRecord, others: Sequence[PeerRecord], num_blocks: int) -> Span | None:
        (me,) = self._placed([mine])
        n_blocks, cuts = self._served.n_blocks, self._served.legal_cuts
        return better_span(me, self._placed(others), n_blocks, cuts, num_blocks, self._policy, rng=self._rng)

    def _placed(self, records: Iterable[PeerRecord]) -> tuple[Placed, ...]:
        speed = self._standing.record().tokens_per_s or 1.0
        return placed(records, prior_blocks_per_s=speed * len(self._standing.span))
