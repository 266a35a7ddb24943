"""How a swarm was: samples, events, and since when it is as it is, in an SQLite file. Kept 30 days, thinned.

Thinning is pure: of the last day all samples are kept, of the last week one for five minutes, before that one an hour.
What was merged keeps the worst coverage of its time, so that an outage is not averaged away, and means of all else.
"""

from __future__ import annotations

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from dashboard.events import Event
from dashboard.health import ModelHealth
from protocol.errors import ConfigError

Result = TypeVar("Result")

DAY_S = 86_400
TIERS: tuple[tuple[float, float], ...] = ((1 * DAY_S, 30), (7 * DAY_S, 300), (30 * DAY_S, 3600))
"""Up to which age (seconds) one sample is kept for how many seconds."""
STILL_S = 600.0
"""A page that was away for longer does not know since when things are as they are."""
BUSY_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Sample:
    """A model at a moment, or over a while. Times in seconds since 1970; None: not known.

    Attributes:
        weight: how many samples were merged into this one.
        weakest: how many peers served the block that fewest served.
    """

    at: float
    weight: int
    n_blocks: int
    blocks_served: int
    weakest: int
    peers: float
    answering: float
    tokens_per_s: float | None
    free_tokens_per_s: float | None
    token_ms: float | None


COLUMNS = tuple(column.name for column in fields(Sample))


def sample(model: ModelHealth, at: float) -> Sample:
    """What is remembered of a model."""
    return Sample(
        at=at,
        weight=1,
        n_blocks=model.n_blocks,
        blocks_served=model.blocks_served,
        weakest=min(model.replicas),
        peers=float(len(model.peers)),
        answering=float(model.answering),
        tokens_per_s=model.tokens_per_s,
        free_tokens_per_s=model.free_tokens_per_s,
        token_ms=model.token_ms,
    )


def thinned(samples: Iterable[Sample], now: float, tiers: Sequence[tuple[float, float]] = TIERS) -> list[Sample]:
    """At most one sample for each stretch of time of its tier; none that is older than the last tier. In order.

    Doing it twice changes nothing more.
    """
    stretches: dict[tuple[int, int], list[Sample]] = {}
    for one in sorted(samples, key=lambda one: one.at):
        tier = next((index for index, (age_s, _) in enumerate(tiers) if now - one.at <= age_s), None)
        if tier is not None:
            stretches.setdefault((tier, int(one.at // tiers[tier][1])), []).append(one)
    return sorted((merged(stretch) for stretch in stretches.values()), key=lambda one: one.at)


def merged(samples: Sequence[Sample]) -> Sample:
    """One sample for several in order, at the time of the first."""
    if len(samples) == 1:
        return samples[0]
    return Sample(
        at=samples[0].at,
        weight=sum(one.weight for one in samples),
        n_blocks=samples[-1].n_blocks,
        blocks_served=min(one.blocks_served for one in samples),
        weakest=min(one.weakest for one in samples),
        peers=_mean([(one.peers, one.weight) for one in samples]) or 0.0,
        answering=_mean([(one.answering, one.weight) for one in samples]) or 0.0,
        tokens_per_s=_mean([(one.tokens_per_s, one.weight) for one in samples]),
        free_tokens_per_s=_mean([(one.free_tokens_per_s, one.weight) for one in samples]),
        token_ms=_mean([(one.token_ms, one.weight) for one in samples]),
    )


def _mean(values: Sequence[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in values if value is not None]
    weights = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / weights if weights else None


def columns(samples: Sequence[Sample], gap_s: float) -> dict[str, list[float | None]]:
    """For charts: a list for each attribute, with None where nothing is known for longer than `gap_s`."""
    rows: list[tuple[float | None, ...]] = []
    for one in samples:
        before = rows[-1][0] if rows else None
        if before is not None and one.at - before > gap_s:
            rows.append((before + gap_s / 2, *[None] * (len(COLUMNS) - 1)))
        rows.append(astuple(one))
    return {name: [row[index] for row in rows] for index, name in enumerate(COLUMNS)}


class History:
    """The file. Made by `open_history`; its methods are for one loop, the file for one thread."""

    def __init__(self, database: sqlite3.Connection, thread: ThreadPoolExecutor, keep_s: float) -> None:
        self._database = database
        self._thread = thread
        self._keep_s = keep_s

    async def add(
        self,
        samples: Mapping[str, Sample],
        events: Sequence[Event],
        since: Mapping[str, tuple[str, float]],
        now: float,
    ) -> None:
        """Samples by fingerprint, events that happened, and what is since when."""

        def write() -> None:
            marks = ", ".join("?" * (len(COLUMNS) + 1))
            with self._database:
                self._database.executemany(
                    f"INSERT OR REPLACE INTO samples VALUES ({marks})",  # noqa: S608  # question marks
                    [(fingerprint, *astuple(one)) for fingerprint, one in samples.items()],
                )
                self._database.executemany(
                    "INSERT INTO events VALUES (?, ?, ?, ?)", [(e.at, e.kind, e.model, e.text) for e in events]
                )
                self._database.execute("DELETE FROM since")
                self._database.executemany(
                    "INSERT INTO since VALUES (?, ?, ?, ?)", [(who, what, at, now) for who, (what, at) in since.items()]
                )

        await self._run(write)

    async def samples(self, fingerprint: str, after: float) -> list[Sample]:
        """Of a model, in order."""

        def read() -> list[Sample]:
            names = ", ".join(COLUMNS)
            query = f"SELECT {names} FROM samples WHERE model = ? AND at >= ? ORDER BY at"  # noqa: S608  # our names
            return [Sample(*row) for row in self._database.execute(query, (fingerprint, after))]

        return await self._run(read)

    async def events(self, limit: int) -> list[Event]:
        """The latest first."""

        def read() -> list[Event]:
            query = "SELECT at, kind, model, text FROM events ORDER BY at DESC, rowid ASC LIMIT ?"
            return [Event(*row) for row in self._database.execute(query, (limit,))]

        return await self._run(read)

    async def since(self, now: float) -> dict[str, tuple[str, float]]:
        """What is since when, as last written, if that was not long ago."""

        def read() -> dict[str, tuple[str, float]]:
            query = "SELECT subject, state, at FROM since WHERE seen >= ?"
            return {who: (what, at) for who, what, at in self._database.execute(query, (now - STILL_S,))}

        return await self._run(read)

    async def thin(self, now: float, events_kept: int) -> None:
        """Merges and forgets what is old."""

        def rewrite() -> None:
            names = ", ".join(COLUMNS)
            marks = ", ".join("?" * (len(COLUMNS) + 1))
            tiers = [(min(age_s, self._keep_s), step_s) for age_s, step_s in TIERS]
            models = [row[0] for row in self._database.execute("SELECT DISTINCT model FROM samples")]
            for model in models:
                query = f"SELECT {names} FROM samples WHERE model = ?"  # noqa: S608  # our own names
                kept = thinned((Sample(*row) for row in self._database.execute(query, (model,))), now, tiers)
                with self._database:
                    self._database.execute("DELETE FROM samples WHERE model = ?", (model,))
                    self._database.executemany(
                        f"INSERT INTO samples VALUES ({marks})",  # noqa: S608  # question marks
                        [(model, *astuple(one)) for one in kept],
                    )
            with self._database:
                self._database.execute("DELETE FROM events WHERE at < ?", (now - self._keep_s,))
                self._database.execute(
                    "DELETE FROM events WHERE rowid NOT IN (SELECT rowid FROM events ORDER BY at DESC LIMIT ?)",
                    (events_kept,),
                )

        await self._run(rewrite)

    async def _run(self, work: Callable[[], Result]) -> Result:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


@contextlib.asynccontextmanager
async def open_history(path: Path, keep_days: float) -> AsyncIterator[History]:
    """The history in a file, which is made if it is not there.

    Raises:
        ConfigError: the file cannot be written, or holds something else.
    """
    with ThreadPoolExecutor(1, "history") as thread:
        loop = asyncio.get_running_loop()
        database = await loop.run_in_executor(thread, _connect, path)
        try:
            yield History(database, thread, keep_days * DAY_S)
        finally:
            await loop.run_in_executor(thread, database.close)


def _connect(path: Path) -> sqlite3.Connection:
    numbers = ", ".join(COLUMNS[1:])  # untyped: what is written is read
    script = f"""
        PRAGMA journal_mode = WAL;
        PRAGMA synchronous = NORMAL;
        CREATE TABLE IF NOT EXISTS samples (model, at, {numbers}, PRIMARY KEY (model, at)) WITHOUT ROWID;
        CREATE TABLE IF NOT EXISTS events (at, kind, model, text);
        CREATE TABLE IF NOT EXISTS since (subject PRIMARY KEY, state, at, seen);
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        database: Any = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)
        try:
            database.executescript(script)
        except sqlite3.Error:
            database.close()
            raise
    except (OSError, sqlite3.Error) as error:
        raise ConfigError(f"the history {path} cannot be used: {error}; name another file with --history") from None
    connection: sqlite3.Connection = database
    return connection
