"""Tells the swarm what this peer is and does: at a steady pace, at a change, and once more when it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dht.background import background
from dht.record import MODELS_KEY, ModelRecord, PeerRecord
from protocol.errors import BadRecord, ConfigError

if TYPE_CHECKING:
    from dht.config import DhtConfig
    from dht.node import SwarmNode

log = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
"""How often the peer's own status is looked at for a change; a change of state calls `changed` and does not wait."""
QUEUE_NEWS_MS = 20.0
"""A smaller change of the waiting time is no news: a queue of nearly nothing doubles all the time."""
RETRY_AFTER_S = 2.0
REFUSED = (
    "the nodes of this swarm refuse what this peer says: if the swarm is private, give its join token (--join-token); "
    "if it is open, leave the token out"
)
TOMBSTONE_MARGIN_S = 0.001
"""A node replaces a record only by one that expires later."""


@dataclass(frozen=True)
class Announced:
    """The last announcement: what was said, and when (monotonic seconds)."""

    record: PeerRecord
    at_s: float


def is_due(last: Announced | None, record: PeerRecord, now_s: float, config: DhtConfig) -> bool:
    """Should `record` be announced now? Pure."""
    if last is None or last.record.state != record.state:
        return True
    age_s = now_s - last.at_s
    if age_s >= config.announce_every_s:
        return True
    return age_s >= config.announce_min_gap_s and has_changed(last.record, record, config.load_step)


def has_changed(before: PeerRecord, after: PeerRecord, load_step: float) -> bool:
    """Is there news that should not wait: any lasting fact, or load by `load_step` (relative)?"""
    if _facts(before) != _facts(after):
        return True
    step = load_step * max(after.kv_tokens_total, 1)
    return (
        abs(before.kv_tokens_left - after.kv_tokens_left) >= step
        or _differs(before.step_ms, after.step_ms, load_step)
        or _differs(before.queue_ms, after.queue_ms, load_step, floor=QUEUE_NEWS_MS)
        or _differs(before.tokens_per_s, after.tokens_per_s, load_step)
    )


def _facts(record: PeerRecord) -> PeerRecord:
    """What is news whenever it changes: all but load, round-trip times, what was served and a relay's room. These ride
    along."""
    return replace(
        record,
        kv_tokens_left=0,
        step_ms=None,
        queue_ms=None,
        tokens_per_s=None,
        tokens_served=None,
        rtts_ms=(),
        relay_places=0,
        sequence=0,
        expires_at=0.0,
        maddrs=(),
    )


def _differs(before: float | None, after: float | None, load_step: float, floor: float = 0.0) -> bool:
    if before is None or after is None:
        return before is not after
    return abs(after - before) >= max(load_step * max(abs(before), abs(after), 1e-9), floor)


class Announcer:
    """Publishes the records that `describe` gives. Made by `announcing`.

    Failures are logged and retried, never raised: a peer that cannot announce still serves.
    """

    def __init__(self, node: SwarmNode, describe: Callable[[], PeerRecord], model: ModelRecord | None) -> None:
        if node.identity is None:
            raise ConfigError("a client has no identity to announce")
        self._node = node
        self._identity = node.identity
        self._describe = describe
        self._model = model
        self._shards = 1 if model is None else model.shards
        self._last: Announced | None = None
        self._expires_at = 0.0
        self._sequence = 0
        self._failing = False
        self._announcing = asyncio.Lock()
        self._wake = asyncio.Event()

    def changed(self) -> None:
        """The peer's state changed: look now, instead of within a second."""
        self._wake.set()

    async def announce(self) -> bool:
        """Publish the present record at once. False: no node took it; `run` will try again.

        Raises:
            BadRecord: readers would refuse it.
        """
        return await self._publish(self._describe())

    async def leave(self) -> bool:
        """Publish the tombstone. False: no node took it; readers then see the peer until its last record expires."""
        return await self._try(replace(self._describe(), state="offline"))

    async def run(self) -> None:
        """Announce whenever it is due, for ever."""
        while True:
            wait_s = LOOK_EVERY_S
            record = self._describe()
            if is_due(self._last, record, time.monotonic(), self._node.config) and not await self._try(record):
                wait_s = RETRY_AFTER_S
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._wake.wait()
            self._wake.clear()

    async def _try(self, record: PeerRecord) -> bool:
        try:
            return await self._publish(record)
        except BadRecord as error:
            self._note_failure(f"this peer's record is not fit to be announced: {error}")
            return False

    async def _publish(self, record: PeerRecord) -> bool:
        async with self._announcing:
            now = self._node.now()
            # Both only ever grow, even if the clock is set back: otherwise nodes would keep the older record.
            self._sequence = max(self._sequence + 1, int(now * 1e9))
            self._expires_at = max(self._expires_at + TOMBSTONE_MARGIN_S, now + self._node.config.expiry_s)
            stamped = replace(
                record,
                maddrs=record.maddrs or self._node.maddrs[:4],
                sequence=self._sequence,
                expires_at=self._expires_at,
            )
            raw = await asyncio.to_thread(stamped.encode, self._identity, self._shards)
            stored = await self._node.store(stamped.key(self._shards), raw, stamped.expires_at)
            if stored and self._model is not None and record.state != "offline":
                stored = await self._list_model(self._model)
            if stored:
                self._last = Announced(record, time.monotonic())
            if self._node.is_refused:
                self._note_failure(REFUSED)
            elif not stored:
                self._note_failure("no node of the swarm took this peer's record; trying again")
            else:
                self._failing = False
            return stored

    def _note_failure(self, message: str) -> None:
        log.log(logging.DEBUG if self._failing else logging.WARNING, message)
        self._failing = True

    async def _list_model(self, model: ModelRecord) -> bool:
        listing = replace(model, signer=self._node.peer_id, sequence=self._sequence, expires_at=self._expires_at)
        raw = await asyncio.to_thread(listing.encode, self._identity)
        return await self._node.store(MODELS_KEY, raw, listing.expires_at)


@contextlib.asynccontextmanager
async def announcing(
    node: SwarmNode, describe: Callable[[], PeerRecord], model: ModelRecord | None = None
) -> AsyncIterator[Announcer]:
    """Announce what `describe` says while the body runs, and leave a tombstone at the end, however it ends.

    Args:
        node: opened with the identity whose `peer_id` the records carry.
        describe: the peer's present record; `sequence`, `expires_at` and (if empty) `maddrs` are filled in here.
            Called about once a second: keep it cheap.
        model: the listing of the served model; `signer`, `sequence` and `expires_at` are filled in here.

    Raises:
        BadRecord: `describe` gives a record that readers would refuse.
        ConfigError: the node is a client.
    """
    announcer = Announcer(node, describe, model)
    await announcer.announce()
    try:
        async with background(announcer.run(), "announcer"):
            yield announcer
    finally:
        if not await announcer.leave():
            log.warning("the swarm was not told that this peer leaves; it will find out within a minute")
