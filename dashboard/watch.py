"""Follows a swarm: reads its records, asks its peers, keeps the history, and wakes whoever waits for news."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from typing import Any, NoReturn

from dashboard.config import DashboardConfig
from dashboard.events import Event, changes, since_of
from dashboard.health import Health, Since, assess, used_tokens_per_s
from dashboard.history import History, sample
from dashboard.prober import Prober
from dht.background import background
from dht.config import DhtConfig
from dht.locate import locate_swarm
from dht.node import open_node
from dht.record import PeerRecord
from dht.view import SwarmReader, SwarmView, reading
from protocol.errors import SwarmNotFound
from protocol.mean import smoothed

log = logging.getLogger(__name__)

THIN_EVERY_S = 3600.0
SETTLE_S = 3.0
"""Before the first sample: peers are asked first."""


class Watch:
    """The latest health of a swarm. Made by `watching`.

    Attributes:
        health: as last assessed.
        number: grows whenever `health` is another one.
        is_closed: nobody need wait any more.
        recent: the latest events, newest first.
        dropped: records that were dropped since the start, by reason.
    """

    def __init__(self, config: DashboardConfig, history: History) -> None:
        self.health = Health()
        self.number = 0
        self.is_closed = False
        self.recent: deque[Event] = deque(maxlen=config.events_kept)
        self.dropped: Counter[str] = Counter()
        self.prober = Prober(config, self._records)
        self._config = config
        self._history = history
        self._reader: SwarmReader | None = None
        self._view = SwarmView()
        self._since: Since = {}
        self._records_before: dict[str, PeerRecord] = {}
        self._used: dict[str, float] = {}
        self._unwritten: list[Event] = []
        self._changed = asyncio.Condition()
        self._turned = asyncio.Event()

    async def after(self, number: int) -> int:
        """Waits until the health is another one than that of `number`, or the watch ends; gives its number."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.number > number or self.is_closed)
        return self.number

    async def close(self) -> None:
        """There will be no more news."""
        self.is_closed = True
        async with self._changed:
            self._changed.notify_all()

    async def remember(self) -> None:
        """Takes up what the history knows of the time before this page was started."""
        self.recent.extend(await self._history.events(self._config.events_kept))
        self._since = await self._history.since(time.time())

    async def follow(self, reader: SwarmReader) -> NoReturn:
        """Assesses again and again what the reader and the prober bring, for ever."""
        self._reader = reader
        while True:
            self._look(reader.view)
            async with self._changed:
                self._changed.notify_all()
            await asyncio.sleep(self._config.news_every_s)

    async def keep(self) -> NoReturn:
        """Writes the history, for ever: at a steady pace, and when blocks lose their last peer or have one again."""
        thinned_s = 0.0
        await asyncio.sleep(min(SETTLE_S, self._config.sample_every_s))
        while True:
            await self.write(time.time())
            if time.time() - thinned_s >= THIN_EVERY_S:
                thinned_s = time.time()
                await self._try(self._history.thin(thinned_s, self._config.events_kept))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._config.sample_every_s):
                    await self._turned.wait()
            self._turned.clear()

    async def write(self, now: float) -> None:
        """Writes what is known now. A swarm that was not found leaves a gap."""
        events, self._unwritten = self._unwritten, []
        largest = sorted(self.health.models, key=lambda model: -len(model.peers))[: self._config.history_models]
        is_fresh = now - self.health.as_of <= self._config.stale_after_s
        samples = {model.fingerprint: sample(model, now) for model in largest} if is_fresh else {}
        if is_fresh or events:
            await self._try(self._history.add(samples, events, self._since, now))

    async def _try(self, work: Coroutine[Any, Any, None]) -> None:
        """What cannot be written (a full disk, most likely) is logged: the page is worth more than its past."""
        try:
            await work
        except sqlite3.Error as error:
            log.warning("the history cannot be written: %s", error)

    def _records(self) -> list[PeerRecord]:
        view = self._view if self._reader is None else self._reader.view
        return [peer for model in view.models for peer in view.peers(model.fingerprint)]

    def _look(self, view: SwarmView) -> None:
        if view is not self._view:
            self._view = view
            self._note_use(self._records())
            self.dropped.update(view.dropped)
        now = time.time()
        health = assess(replace(view, as_of=now) if view.as_of else view, self.prober.reach, self._used, self._since)
        happened = changes(self.health, health)
        self._since = since_of(health)
        health = replace(health, as_of=view.as_of)
        self.recent.extendleft(reversed(happened))
        self._unwritten.extend(happened)
        if any(event.kind in ("gap", "whole") for event in happened):
            self._turned.set()
        if health != self.health:
            self.health = health
            self.number += 1

    def _note_use(self, records: list[PeerRecord]) -> None:
        """How fast counts of served tokens grow, from one record of a peer to its next."""
        for record in records:
            before = self._records_before.get(record.peer_id)
            if before is not None and before.sequence != record.sequence:
                used = used_tokens_per_s(before, record)
                if used is not None:
                    self._used[record.peer_id] = smoothed(self._used.get(record.peer_id), used)
        self._records_before = {record.peer_id: record for record in records}
        self._used = {peer_id: used for peer_id, used in self._used.items() if peer_id in self._records_before}


@contextlib.asynccontextmanager
async def watching(config: DashboardConfig, dht_config: DhtConfig, history: History) -> AsyncIterator[Watch]:
    """A watch over the swarm, while the body runs. Where no swarm is found, it goes on looking for one.

    Raises:
        ConfigError: an address is malformed, or the history cannot be read.
    """
    watch = Watch(config, history)
    await watch.remember()
    async with background(_find_and_follow(watch, config, dht_config), "watch"):
        yield watch
    await watch.write(time.time())


async def _find_and_follow(watch: Watch, config: DashboardConfig, dht_config: DhtConfig) -> NoReturn:
    failing = False
    while True:
        try:
            located = await locate_swarm(dht_config)
            async with (
                open_node(dht_config, None, located.maddrs) as node,
                reading(node) as reader,
                background(watch.prober.run(), "prober"),
                background(watch.keep(), "history"),
            ):
                log.info("found a swarm through %s", located.how)
                await watch.follow(reader)
        except SwarmNotFound as error:
            log.log(logging.DEBUG if failing else logging.WARNING, "%s; looking for it again", error.message)
            failing = True
        await asyncio.sleep(config.find_again_s)
