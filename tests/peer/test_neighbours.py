"""Round trips that peers measure to those that are likely to come next."""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from dht.record import MAX_RTTS, PeerRecord
from peer.neighbours import FORGET_S, NEAREST, Neighbours, likely_next
from protocol.span import Span
from tests.harness import open_host, record_of

BLANK = PeerRecord(
    peer_id="", fingerprint="f", n_blocks=12, span=Span(0, 1), state="online", addresses=("127.0.0.1:1",),
    certificate_der=b"",
)  # fmt: skip


def peers(*spans: str) -> list[PeerRecord]:
    return [replace(BLANK, peer_id=f"peer-{i}", span=Span.parse(span)) for i, span in enumerate(spans)]


@pytest.fixture(scope="module")
def checkpoint(tiny_llama: Callable[[int], Path]) -> Path:
    return tiny_llama(4)


def test_those_that_can_go_on_are_likely() -> None:
    known = peers("0:4", "4:8", "2:6", "5:8", "0:12", "3:4")
    chosen = likely_next(known, Span(0, 4), {}, random.Random(0))
    assert {peer.peer_id for peer in chosen} == {"peer-1", "peer-2", "peer-4"}
    assert likely_next(known, Span(4, 12), {}, random.Random(0)) == [], "nobody comes after the last block"


def test_old_wire_versions_and_peers_without_an_address_are_left_out() -> None:
    old, hidden, fine = peers("4:8", "4:8", "4:8")
    known = [replace(old, wire_version=0), replace(hidden, addresses=()), fine]
    assert likely_next(known, Span(0, 4), {}, random.Random(0)) == [fine]


def test_the_nearest_are_kept_and_newcomers_get_their_turn() -> None:
    known = peers(*["4:8"] * 40)
    measured = {f"peer-{i}": float(i) for i in range(10)}
    nearest = {f"peer-{i}" for i in range(NEAREST)}
    seen: set[str] = set()
    for seed in range(200):
        chosen = [peer.peer_id for peer in likely_next(known, Span(0, 4), measured, random.Random(seed))]
        assert len(set(chosen)) == len(chosen) == MAX_RTTS
        assert nearest <= set(chosen)
        seen |= set(chosen)
    assert seen == {peer.peer_id for peer in known}


async def test_real_peers_are_measured_until_they_are_gone_for_long(checkpoint: Path) -> None:
    now_s = 100.0
    online: list[PeerRecord] = []
    async with AsyncExitStack() as stack:
        for index, span in enumerate(("0:2", "2:4", "1:4")):
            host = await stack.enter_async_context(open_host(checkpoint, Span.parse(span), index))
            online.append(record_of(host))
        neighbours = Neighbours(online[0].peer_id, lambda: Span(0, 2), lambda: online, clock=lambda: now_s)
        assert neighbours.rtts_ms() == ()
        await neighbours.measure()
        found = neighbours.rtts_ms()
        assert {peer_id for peer_id, _ in found} == {online[1].peer_id, online[2].peer_id}
        assert [ms for _, ms in found] == sorted(ms for _, ms in found)
        assert all(ms > 0 for _, ms in found)
    now_s += FORGET_S
    assert neighbours.rtts_ms() == found
    now_s += 1.0
    assert neighbours.rtts_ms() == ()
    online.clear()
    await neighbours.measure()
    assert neighbours.rtts_ms() == ()
