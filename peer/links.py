"""Links: this peer's streams to the peers after it, one to each, shared by all sessions."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from dht.background import task_group
from peer.link import Link, Parcel, Refused, Resolve
from protocol.errors import PeerLost
from protocol.messages import Step

MAX_LINKS = 256


class Links:
    """All streams to next peers. Made by `open_links`.

    Args:
        resolve: finds a peer's verified record; may look again in the swarm.
        refused: told when a next peer did not take a step: the edge's token, why, and the step's id.
        tasks: in which the streams live.
        direct: seek ways to hidden peers that go round their relays.
    """

    def __init__(self, resolve: Resolve, refused: Refused, tasks: asyncio.TaskGroup, *, direct: bool = True) -> None:
        self._direct = direct
        self._resolve = resolve
        self._refused = refused
        self._tasks = tasks
        self._links: dict[str, tuple[Link, asyncio.Task[None]]] = {}

    def __len__(self) -> int:
        """Streams that there are now."""
        return len(self._links)

    def push(self, peer_id: str, edge: bytes, step: Step) -> asyncio.Future[None]:
        """Hands `step` to the stream to `peer_id`. The future is done when it was written; it fails with a `PeerLost`.
        Whoever does not want it any more may fail the future itself."""
        written: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        written.add_done_callback(_seen)
        if peer_id not in self._links:
            if len(self._links) >= MAX_LINKS:
                written.set_exception(PeerLost("this peer pushes to as many others as it can", peer_id=peer_id))
                return written
            link = Link(peer_id, self._resolve, self._refused, direct=self._direct)
            task = self._tasks.create_task(link.run(), name=f"link-{peer_id[-8:]}")
            task.add_done_callback(lambda _: self._ended(peer_id, link))
            self._links[peer_id] = link, task
        self._links[peer_id][0].parcels.put_nowait(Parcel(edge, step, written))
        return written

    def close(self) -> None:
        """Ends all streams."""
        for _, task in self._links.values():
            task.cancel()

    def _ended(self, peer_id: str, link: Link) -> None:
        if peer_id in self._links and self._links[peer_id][0] is link:
            del self._links[peer_id]
        while not link.parcels.empty():
            link.parcels.get_nowait().fail(link.ending)


def _seen(written: asyncio.Future[None]) -> None:
    """Nobody may be waiting for a failure any more; asyncio would complain."""
    if not written.cancelled():
        written.exception()


@contextlib.asynccontextmanager
async def open_links(resolve: Resolve, refused: Refused, *, direct: bool = True) -> AsyncIterator[Links]:
    """Links that live as long as the body runs."""
    async with task_group() as tasks:
        links = Links(resolve, refused, tasks, direct=direct)
        try:
            yield links
        finally:
            links.close()
