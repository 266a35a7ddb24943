"""The watch: what it makes of one look after another, and what it knows after a restart."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dashboard.config import DashboardConfig
from dashboard.history import History, open_history
from dashboard.watch import Watch
from dht.view import SwarmView
from tests.dashboard.support import MODEL, peer, view

CONFIG = DashboardConfig(news_every_s=0.005)
TIMEOUT_S = 5.0


def seen(*names: str, **values: Any) -> SwarmView:
    """Peers that serve all blocks, as of now."""
    return replace(view(*(peer(name, "0:24", **values) for name in names)), as_of=time.time())


@contextmanager
def following(watch: Watch, reader: SimpleNamespace) -> Iterator[None]:
    task = asyncio.create_task(watch.follow(reader))  # type: ignore[arg-type]  # it asks for `view` only
    try:
        yield
    finally:
        task.cancel()


async def test_a_restart_forgets_nothing(tmp_path: Path) -> None:
    async with open_history(tmp_path / "history.sqlite3", 30) as history, asyncio.timeout(TIMEOUT_S):
        first = Watch(CONFIG, history)
        reader = SimpleNamespace(view=seen("a"))
        with following(first, reader):
            await first.after(0)
            reader.view = seen("a", "b")
            await first.after(1)
        await first.write(time.time())
        assert [event.text for event in first.recent] == ["b came, with blocks 0:24"]
        second = Watch(CONFIG, history)
        await second.remember()
        assert second.recent == first.recent
        with following(second, SimpleNamespace(view=seen("a", "b"))):
            await second.after(0)
        since = {model.complete_since for model in (first.health.models[0], second.health.models[0])}
        assert len(since) == 1
        assert [sample.peers for sample in await history.samples(MODEL, 0)] == [2.0]


async def test_use_is_what_counts_grow_by(tmp_path: Path) -> None:
    async with open_history(tmp_path / "history.sqlite3", 30) as history, asyncio.timeout(TIMEOUT_S):
        watch = Watch(CONFIG, history)
        reader = SimpleNamespace(view=seen("a", tokens_served=100, sequence=10**9))
        with following(watch, reader):
            await watch.after(0)
            reader.view = seen("a", tokens_served=400, sequence=11 * 10**9)
            await watch.after(1)
        assert watch.health.models[0].free_tokens_per_s == 80.0 - 30.0


async def test_a_full_disk_does_not_end_the_page(caplog: pytest.LogCaptureFixture) -> None:
    class FullDisk(History):
        def __init__(self) -> None:
            pass

        async def add(self, *what: Any) -> None:
            raise sqlite3.OperationalError("database or disk is full")

    watch = Watch(CONFIG, FullDisk())
    async with asyncio.timeout(TIMEOUT_S):
        with following(watch, SimpleNamespace(view=seen("a"))):
            await watch.after(0)
    await watch.write(time.time())
    assert "disk is full" in caplog.text


async def test_whoever_waits_is_told_of_the_end() -> None:
    watch = Watch(CONFIG, History.__new__(History))
    waiting = asyncio.create_task(watch.after(0))
    await asyncio.sleep(0)
    await watch.close()
    assert await waiting == 0
