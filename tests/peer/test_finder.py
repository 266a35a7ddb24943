"""Records of peers that others name: looked for when they are not at hand, together, and not all the time."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from dht.record import PeerRecord
from dht.view import Findings, SwarmReader, SwarmView, make_view
from peer.finder import LOOK_AGAIN_S, Finder
from protocol.errors import SwarmNotFound
from tests.dht.support import peer

AT_ONCE = 50


class Swarm(SwarmReader):
    """A view that a test fills, and how often it was read."""

    def __init__(self, *records: PeerRecord) -> None:
        self.records = list(records)
        self.read_at_s: list[float] = []
        self.answers = True
        self.view = self._seen()

    def _seen(self) -> SwarmView:
        return make_view(Findings({record.peer_id: record for record in self.records}), time.time())

    async def refresh(self) -> SwarmView:
        self.read_at_s.append(time.monotonic())
        await asyncio.sleep(0)
        if not self.answers:
            raise SwarmNotFound("nobody answers")
        self.view = self._seen()
        return self.view


async def test_who_is_in_the_view_is_not_looked_for() -> None:
    known = peer(0, "0:3")
    swarm = Swarm(known)
    assert await Finder(swarm).find(known.peer_id) == known
    assert swarm.read_at_s == []


async def test_who_came_since_is_found() -> None:
    swarm, new = Swarm(), peer(0, "0:3")
    swarm.records.append(new)
    assert await Finder(swarm).find(new.peer_id) == new


async def test_a_record_that_was_of_no_use_is_read_again() -> None:
    old = peer(0, "0:3")
    swarm, new = Swarm(old), replace(old, addresses=("127.0.0.1:99",), sequence=old.sequence + 1)
    finder = Finder(swarm)
    assert await finder.find(old.peer_id, old) == old
    swarm.records = [new]
    assert await finder.find(old.peer_id, old) == new


async def test_however_many_are_named_that_do_not_exist_the_swarm_is_read_now_and_then() -> None:
    swarm = Swarm()
    finder, began_s = Finder(swarm), time.monotonic()
    for _ in range(2):
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(finder.find(f"nobody {i}")) for i in range(AT_ONCE)]
        assert {task.result() for task in asking} == {None}
    assert len(swarm.read_at_s) == 2
    assert swarm.read_at_s[-1] - began_s >= 1.9 * LOOK_AGAIN_S


async def test_who_asks_while_a_look_is_under_way_gets_another_one() -> None:
    swarm, new = Swarm(), peer(0, "0:3")
    finder = Finder(swarm)
    first = asyncio.ensure_future(finder.find(new.peer_id))
    while not swarm.read_at_s:
        await asyncio.sleep(0)
    swarm.records.append(new)
    assert await finder.find(new.peer_id) == new
    await first


async def test_a_swarm_that_does_not_answer_has_no_record() -> None:
    swarm = Swarm()
    swarm.answers = False
    assert await Finder(swarm).find("nobody") is None
