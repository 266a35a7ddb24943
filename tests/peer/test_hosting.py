"""A span that moves: what the swarm is told, what stays in memory, and that a failed move leaves a serving peer."""

from __future__ import annotations

import asyncio
import random
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from dht.announcer import announcing
from dht.background import background
from dht.config import DhtConfig
from dht.record import PeerRecord
from peer.balance import Balance
from peer.config import PeerConfig
from peer.first_span import FirstSpan
from peer.host import SpanHost
from peer.hosting import Hosting
from peer.loading import SpanLoader
from peer.standing import Standing
from protocol.errors import BrokenCheckpoint, ConfigError
from protocol.messages import Open
from protocol.span import Span
from slicing import SpanModel, load_span, resolve
from slicing.checkpoint import read_tensor
from tests.dht.support import FakeNode
from tests.harness import STOP_GRACE_S, find_host, identity, served
from tests.slicing.architectures import make_checkpoint

PATIENCE_S = 30.0
N_BLOCKS = 6


@pytest.fixture(scope="module", name="folder")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return folder


class Script:
    """A `Balance` that says what the test tells it to."""

    def __init__(self) -> None:
        self.targets: asyncio.Queue[Span] = asyncio.Queue()
        self.looks: list[bool] = []  # answers of `still_due`; empty: True
        self.rested = 0
        self.arrivals = 0

    def arrived(self) -> None:
        self.arrivals += 1

    def rest(self) -> None:
        self.rested += 1

    async def due(self, num_blocks: int) -> Span:
        assert num_blocks == 3
        return await self.targets.get()

    async def still_due(self, target: Span) -> bool:
        return self.looks.pop(0) if self.looks else True


@dataclass
class Chosen:
    """A `FirstSpan` that has chosen."""

    loader: SpanLoader
    num_blocks: int | None = 3

    async def load(self, standing: Standing, announcer: object) -> SpanModel:
        return await self.loader.load(standing.span)


@dataclass
class Host:
    """A peer that serves, without a DHT."""

    standing: Standing
    hosting: Hosting
    balance: Script
    loader: SpanLoader
    node: FakeNode
    said: list[str] = field(default_factory=list)

    @property
    def records(self) -> list[PeerRecord]:
        """All that were announced."""
        return [
            PeerRecord.decode(raw, now=self.node.now())
            for key, raw, _ in self.node.stored
            if not key.endswith("models")
        ]

    @property
    def told(self) -> list[str]:
        """State, span and destination of each announcement, without repetitions."""
        lines = [f"{r.state} {r.span}" + (f" -> {r.moving_to}" if r.moving_to else "") for r in self.records]
        return [line for i, line in enumerate(lines) if i == 0 or line != lines[i - 1]]

    @property
    def model(self) -> SpanModel:
        assert self.standing.host is not None
        return self.standing.host.model

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not holds():
                await asyncio.sleep(0.01)


@asynccontextmanager
async def serving(folder: Path, **settings: Any) -> AsyncIterator[Host]:
    """A peer of the blocks 0:3."""
    config = PeerConfig(host="127.0.0.1", num_blocks=3, kv_tokens=256, lan=False, stop_grace_s=STOP_GRACE_S, **settings)
    node = FakeNode(DhtConfig(), identity(0))
    loader = SpanLoader.choose(config, resolve(str(folder)), served(folder))
    standing = Standing(identity(0), loader.served, Span(0, 3), config, lambda: ["127.0.0.1"])
    balance = Script()
    async with announcing(cast(Any, node), standing.record) as announcer:
        said: list[str] = []
        open_host = partial(SpanHost.open, served=loader.served, identity=identity(0), config=config, resolve=find_host)
        hosting = Hosting(
            standing, announcer, loader, cast(FirstSpan, Chosen(loader)), cast(Balance, balance),
            open_host, config.drain_s, random.Random(1), said.append,
        )  # fmt: skip
        async with background(hosting.run(), "hosting"):
            await hosting.ready.wait()
            yield Host(standing, hosting, balance, loader, node, said)


def outputs(model: SpanModel) -> list[torch.Tensor]:
    cache = model.new_cache()
    found = []
    for tokens in (4, 1):
        hidden = torch.randn((1, tokens, model.hidden_size), generator=torch.Generator().manual_seed(tokens))
        found.append(model.step(hidden, cache))
    return found


async def test_a_move_is_told_step_by_step_and_keeps_port_and_blocks(folder: Path) -> None:
    async with serving(folder) as peer:
        port = peer.model and peer.standing.record().addresses
        dropped, kept = (weakref.ref(next(peer.model.blocks[i].parameters())) for i in (0, 2))
        peer.balance.targets.put_nowait(Span(2, 5))
        await peer.until(lambda: peer.standing.span == Span(2, 5) and peer.standing.state == "online")
        record = peer.standing.record()
        assert record.addresses == port
        assert len(record.block_digests) == 3 and record.step_ms is not None
        assert dropped() is None, "the memory of what is not served any more"
        assert kept() is next(peer.model.blocks[2].parameters())
        fresh = load_span(peer.loader.source, Span(2, 5), dtype=torch.float32)
        for expected, found in zip(outputs(fresh), outputs(peer.model), strict=True):
            assert torch.equal(expected, found)
        await peer.until(lambda: peer.told[-1] == "online 2:5")
        assert peer.told == ["joining 0:3", "online 0:3", "online 0:3 -> 2:5", "draining 0:3 -> 2:5", "online 2:5"]
        assert peer.balance.arrivals == 2
        assert peer.standing.moves == 1
        (line,) = [line for line in peer.said if line.startswith("moved")]
        assert line.startswith("moved from blocks 0:3 to 2:5")
    assert peer.records[-1].state == "offline"


async def test_a_move_that_somebody_else_claimed_first_is_given_up_unnoticed(folder: Path) -> None:
    async with serving(folder) as peer:
        peer.balance.looks = [False]
        peer.balance.targets.put_nowait(Span(3, 6))
        await peer.until(lambda: "online 0:3 -> 3:6" in peer.told and peer.told[-1] == "online 0:3")
        assert not any(line.startswith("draining") for line in peer.told)
        assert peer.standing.host is not None and not peer.standing.host.sessions.draining


async def test_a_move_is_given_up_when_somebody_came_while_it_loaded(folder: Path) -> None:
    async with serving(folder) as peer:
        peer.balance.looks = [True, False]
        peer.balance.targets.put_nowait(Span(3, 6))
        await peer.until(lambda: "online 0:3 -> 3:6" in peer.told and peer.told[-1] == "online 0:3")
        assert not any(line.startswith("draining") for line in peer.told)


async def test_a_move_is_given_up_even_when_drained(folder: Path) -> None:
    async with serving(folder) as peer:
        peer.balance.looks = [True, True, False]
        peer.balance.targets.put_nowait(Span(3, 6))
        await peer.until(lambda: "draining 0:3 -> 3:6" in peer.told and peer.told[-1] == "online 0:3")
        assert peer.standing.host is not None and not peer.standing.host.sessions.draining
        assert peer.standing.host.state == "online"


@pytest.mark.parametrize("error", [OSError("disk"), BrokenCheckpoint("gone"), MemoryError("full")], ids=repr)
async def test_a_failed_move_leaves_a_peer_that_serves(
    folder: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> torch.Tensor:
        raise error

    async with serving(folder) as peer:
        before = peer.model
        with monkeypatch.context() as patch:
            patch.setattr("slicing.loading.read_tensor", fails)
            peer.balance.targets.put_nowait(Span(3, 6))
            await peer.until(lambda: peer.balance.rested == 1 and peer.told[-1] == "online 0:3")
        assert peer.model is before
        assert any("0:3 are served on" in line for line in peer.said)
        assert not any(line.startswith("draining") for line in peer.told), "nobody was sent away for nothing"
        peer.balance.targets.put_nowait(Span(3, 6))
        await peer.until(lambda: peer.told[-1] == "online 3:6")


async def test_without_room_for_both_the_old_blocks_go_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.loading.SpanLoader.fits_beside", lambda *_: False)
    seen: list[bool] = []

    def reads(path: Path, stored: Any) -> torch.Tensor:
        if ".layers." in stored.name:
            seen.append(dropped() is None)
        return read_tensor(path, stored)

    async with serving(folder) as peer:
        dropped, kept = (weakref.ref(next(peer.model.blocks[i].parameters())) for i in (0, 2))
        monkeypatch.setattr("slicing.loading.read_tensor", reads)
        peer.balance.targets.put_nowait(Span(2, 5))
        await peer.until(lambda: peer.told[-1] == "online 2:5")
        assert seen and all(seen), "nothing was read before there was room"
        assert kept() is next(peer.model.blocks[2].parameters())
        assert peer.told[-2:] == ["joining 2:5", "online 2:5"]


@pytest.mark.parametrize(("target", "back_at"), [(Span(2, 5), "0:3"), (Span(3, 6), "0:3")])
async def test_without_room_and_with_a_broken_file_the_old_blocks_come_back(
    folder: Path, target: Span, back_at: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.loading.SpanLoader.fits_beside", lambda *_: False)

    def reads(path: Path, stored: Any) -> torch.Tensor:
        if ".layers.4." in stored.name:
            raise BrokenCheckpoint("block 4 is gone")
        return read_tensor(path, stored)

    async with serving(folder) as peer:
        expected = outputs(peer.model)
        monkeypatch.setattr("slicing.loading.read_tensor", reads)
        peer.balance.targets.put_nowait(target)
        await peer.until(lambda: f"joining {target}" in peer.told and peer.told[-1] == f"online {back_at}")
        for a, b in zip(expected, outputs(peer.model), strict=True):
            assert torch.equal(a, b)


async def test_when_only_the_kept_blocks_can_be_had_they_are_served(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.loading.SpanLoader.fits_beside", lambda *_: False)

    def reads(path: Path, stored: Any) -> torch.Tensor:
        if ".layers." in stored.name:
            raise OSError("the disk is gone")
        return read_tensor(path, stored)

    async with serving(folder) as peer:
        monkeypatch.setattr("slicing.loading.read_tensor", reads)
        peer.balance.targets.put_nowait(Span(1, 4))
        await peer.until(lambda: peer.told[-1] == "online 1:3")


async def test_when_nothing_can_be_read_any_more_the_old_blocks_are_served_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("peer.loading.SpanLoader.fits_beside", lambda *_: False)

    def reads(path: Path, stored: Any) -> torch.Tensor:
        raise OSError("the disk is gone")

    async with serving(folder) as peer:
        monkeypatch.setattr("slicing.loading.read_tensor", reads)
        peer.balance.targets.put_nowait(Span(1, 4))
        await peer.until(lambda: peer.told[-2:] == ["joining 1:4", "online 0:3"])


async def test_who_leaves_in_the_middle_of_a_move_stays_leaving(folder: Path) -> None:
    async with serving(folder) as peer:
        peer.balance.looks = [True, True, False]
        assert peer.standing.host is not None
        host = peer.standing.host
        waits = asyncio.Event()

        async def drained(timeout_s: float) -> int:
            waits.set()
            await asyncio.sleep(0.1)
            return 0

        host.drained = drained  # type: ignore[method-assign]
        peer.balance.targets.put_nowait(Span(3, 6))
        await waits.wait()
        peer.standing.leave()
        await peer.until(lambda: not peer.balance.looks)
        await asyncio.sleep(0.05)
        assert peer.standing.record().state == "draining" and peer.standing.record().moving_to is None
        assert host.sessions.draining
    assert peer.records[-1].state == "offline"


async def test_a_load_stops_when_nobody_waits_for_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = 0
    began = asyncio.Event()
    loop = asyncio.get_running_loop()

    def slowly(path: Path, stored: Any) -> torch.Tensor:
        nonlocal reads
        reads += 1
        loop.call_soon_threadsafe(began.set)
        goes_on.wait()
        return read_tensor(path, stored)

    goes_on = threading.Event()
    async with serving(folder) as peer:
        monkeypatch.setattr("slicing.loading.read_tensor", slowly)
        peer.balance.targets.put_nowait(Span(3, 6))
        await began.wait()
    goes_on.set()
    await loop.shutdown_default_executor()
    assert reads < 15, "each of three blocks has nine tensors"


async def test_the_port_that_others_reach_is_announced(folder: Path) -> None:
    async with serving(folder, announce_port=4711) as peer:
        assert peer.standing.record().addresses == ("127.0.0.1:4711",)
        assert peer.standing.host is not None and peer.standing.host.port != 4711


async def test_sessions_hold_up_a_drain_until_they_rest(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peer.host.HANDED_OVER_S", 0.3)
    async with serving(folder) as peer:
        host = peer.standing.host
        assert host is not None
        open_it = Open(bytes(16), 1, host.served.fingerprint, Span(0, 3), "none", 1, 8)
        session = host.sessions.open(open_it, time.monotonic())
        assert await host.drained(0.1) == 1, "just opened"
        assert await host.drained(PATIENCE_S) == 0
        session.last_used_s = time.monotonic()
        assert host.holding_up == 1


@pytest.mark.parametrize(
    "settings", [{"announce_port": 0}, {"announce_port": 65536}, {"drain_s": -1.0}, {"balance_every_s": 0.0}], ids=str
)
def test_settings_out_of_range(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PeerConfig(**settings)
