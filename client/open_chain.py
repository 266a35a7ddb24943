"""The open chain of a session: its hops, in the order of their blocks, and the edges between them.

Broken now and then, and made whole again by `client.mender`. Where an edge is cut, though both its peers answer, the
client carries steps over it.
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from client.blame import Blame, Edge
from client.chain import Link
from client.costs import ways_ms
from client.hop import Hop
from client.inbox import Inbox
from client.inquest import Report
from client.loss import ChainBroken, Loss
from client.peers import Peers
from client.recorder import Recorder
from client.stats import SessionStats
from protocol.errors import PeerError, PeerLost
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import Progress, Route, Step


class OpenChain:
    """The hops of one session. What they say comes to `inbox`.

    Args:
        record: told which hops answer.
        on_event: told, in one sentence, when an edge is cut.

    Attributes:
        hops: in the order of their blocks; with gaps while the chain is not whole.
        leavers: no more of the chain, since their peers leave; dismissed when others are in their place.
        is_whole: every block has a hop, and each of them knows where its outputs go.
        epoch: of the session; grows with each attempt to mend the chain.
    """

    def __init__(
        self, peers: Peers, blame: Blame, stats: SessionStats, record: Recorder, on_event: Callable[[str], None]
    ) -> None:
        self.hops: list[Hop] = []
        self.leavers: list[Hop] = []
        self.is_whole = False
        self.epoch = 0
        self.inbox = Inbox()
        self._peers = peers
        self._blame = blame
        self._stats = stats
        self._record = record
        self._on_event = on_event
        self._secret = secrets.token_bytes(SESSION_ID_BYTES)

    @property
    def links(self) -> tuple[Link, ...]:
        """Which peer runs which blocks, in order."""
        return tuple(hop.link for hop in self.hops)

    async def send(self, hop: Hop, step: Step) -> None:
        """Hands a step to the stream to a hop.

        Raises:
            ChainBroken: there is none any more.
        """
        try:
            hop.send(step)
        except PeerError as error:
            raise ChainBroken(Loss(hop, error, resumable=True)) from error

    async def relay(self, hop: Hop, step: Step, why: str) -> None:
        """Carries a step from `hop` to the one after it. `why`: the hop could not push it there.

        Raises:
            ChainBroken: there is no stream to that one any more.
        """
        following = self.hops[self.hops.index(hop) + 1]
        if not hop.relayed:
            self._cut(hop, following, why)
        self._stats.relayed += 1
        await self.send(following, replace(step, epoch=self.epoch))

    # ------------------------------------------------------------------ edges

    def route(self, hop: Hop, after: Hop | None, next_step: int) -> None:
        """Tells a hop where its outputs go, from `next_step` on: to the hop `after` it (None: there is none), or, where
        that edge is cut, to the client.

        Raises:
            ChainBroken: there is no stream to it any more.
        """
        if after is None or hop.relayed:
            route = Route(self.epoch, next_step)
        else:
            route = Route(self.epoch, next_step, after.link.peer.peer_id, after.edge)
        try:
            hop.route(route)
        except PeerError as error:
            raise ChainBroken(Loss(hop, error, resumable=True)) from error

    def unblock(self, stuck: int, reports: Sequence[Report]) -> None:
        """A step has left hop `stuck - 1` and does not reach hop `stuck`, though both answer: finds another way.

        Raises:
            ChainBroken: the client's own line to one of them is what is blocked.
        """
        before = self.hops[stuck - 1] if stuck > 0 else None
        after = self.hops[stuck] if stuck < len(self.hops) else None
        report = reports[stuck] if after is not None else None
        if before is None or after is None or before.relayed or not isinstance(report, Progress):
            lost = PeerLost("what is sent does not arrive")
            raise ChainBroken(*(Loss(hop, lost, resumable=True) for hop in (before, after) if hop is not None))
        self._cut(before, after, f"{before.name} does not reach {after.name}")
        self.route(before, after, report.received)

    def try_cut_edges(self, next_step: int) -> None:
        """Edges that were cut for long enough are tried again, between two steps.

        Raises:
            ChainBroken: there is no stream any more to a hop before such an edge.
        """
        if not any(hop.relayed for hop in self.hops):
            return
        cut = self._blame.cut_edges()
        for before, after in itertools.pairwise(self.hops):
            if before.relayed and edge_of(before, after) not in cut:
                before.relayed = False
                self.route(before, after, next_step)
                self.show()

    def _cut(self, before: Hop, after: Hop, why: str) -> None:
        """From now on, for a while, this client carries steps over that edge."""
        before.relayed = True
        self._blame.add_edge(edge_of(before, after))
        self.show()
        self._on_event(f"steps from {before.name} to {after.name} go through this client ({why or 'as it asks'})")

    # ------------------------------------------------------------------ hops come and go

    def add(self, links: Iterable[Link]) -> None:
        """Makes hops for these links, which are not open yet."""
        self.hops += [Hop(link, self._peers.channel(link.peer), self._secret, self.inbox) for link in links]
        self.hops.sort(key=lambda hop: hop.link.span)

    def let_leave(self, hop: Hop) -> None:
        """The hop's peer leaves: it is no more of the chain, but keeps its session until others are in its place."""
        self.is_whole = False
        self.hops.remove(hop)
        self.leavers.append(hop)

    def dismiss_leavers(self) -> None:
        """Others are in the place of those that leave."""
        for hop in self.leavers:
            hop.dismiss()
        self.leavers.clear()

    def show(self) -> None:
        """Tells the record which hops answer now."""
        peers = [hop.link.peer for hop in self.hops]
        ways = ways_ms(peers, self._peers.times(), self._blame.cut_edges())
        self._record.chain(self.links, ways, [hop.relayed for hop in self.hops])

    def forsake(self) -> None:
        """Whatever the peers hold of the session is of no more use."""
        for hop in self._emptied():
            hop.dismiss()

    async def close(self) -> None:
        """Frees the session on all its peers."""
        async with asyncio.TaskGroup() as tasks:
            for hop in self._emptied():
                tasks.create_task(hop.close())

    def _emptied(self) -> list[Hop]:
        """The chain has no hops any more. Returns those it had."""
        hops, self.hops, self.leavers = [*self.hops, *self.leavers], [], []
        self.is_whole = False
        return hops


def edge_of(before: Hop, after: Hop) -> Edge:
    """What blame calls the edge between two hops."""
    return before.link.peer.peer_id, after.link.peer.peer_id
