"""The open chain of a session: its hops, in the order of their blocks; broken now and then, and made whole again.

`give_up` takes out what is lost. `mend` fills the gaps with other peers and tells every hop where its outputs go and
from which step on, so that each is told what it lacks by the one before it (see `client.recovery`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import replace

from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.costs import ways_ms
from client.hop import Hop, Inbox
from client.inquest import Report
from client.loss import ChainBroken, Loss
from client.peers import Peers
from client.recovery import lacking, to_renew
from client.spec import SessionSpec
from client.stats import SessionStats
from client.trace import Recorder
from client.trial import Trial
from protocol.errors import (
    BlocksMissing,
    PeerError,
    PeerFault,
    PeerFull,
    PeerLost,
    PotluckError,
    SessionLost,
    WireError,
)
from protocol.journal import StepLog
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import Opened, Progress, Route, Step
from protocol.span import Span, missing_spans

logger = logging.getLogger(__name__)


class OpenChain:
    """The hops of one session. What they say comes to `inbox`.

    Args:
        record: told which hops answer.
        on_event: told, in one sentence, when the chain changes or when the session waits for peers.

    Attributes:
        hops: in the order of their blocks; with gaps while the chain is not whole.
        epoch: of the session; grows with each attempt to mend the chain.
    """

    def __init__(
        self,
        spec: SessionSpec,
        peers: Peers,
        blame: Blame,
        config: ClientConfig,
        stats: SessionStats,
        record: Recorder,
        on_event: Callable[[str], None],
    ) -> None:
        self.hops: list[Hop] = []
        self.is_whole = False
        self.epoch = 0
        self.inbox = Inbox()
        self._spec = spec
        self._peers = peers
        self._blame = blame
        self._config = config
        self._stats = stats
        self._record = record
        self._on_event = on_event
        self._secret = secrets.token_bytes(SESSION_ID_BYTES)
        self._left: list[Hop] = []  # leave the swarm, and are released when others are in their place

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
        """Carries a step from `hop` to the one after it. `why`: the hop could not push it there."""
        following = self.hops[self.hops.index(hop) + 1]
        if not hop.relayed:
            self._cut(hop, following, why)
        self._stats.relayed += 1
        await self.send(following, replace(step, epoch=self.epoch))

    # ------------------------------------------------------------------ edges that are cut

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
        self._route(before, after, report.received)

    def try_cut_edges(self, next_step: int) -> None:
        """Edges that were cut for long enough are tried again, between two steps."""
        if not any(hop.relayed for hop in self.hops):
            return
        cut = self._blame.cut_edges()
        for before, after in itertools.pairwise(self.hops):
            if before.relayed and (before.link.peer.peer_id, after.link.peer.peer_id) not in cut:
                before.relayed = False
                self._route(before, after, next_step)
                self._show()

    def _cut(self, before: Hop, after: Hop, why: str) -> None:
        """From now on, for a while, this client carries steps over that edge."""
        before.relayed = True
        self._blame.add_edge((before.link.peer.peer_id, after.link.peer.peer_id))
        self._show()
        self._on_event(f"steps from {before.name} to {after.name} go through this client ({why or 'as it asks'})")

    def distrust(self, starts: Collection[int]) -> list[Loss]:
        """Of the hops that begin at these blocks, one lies about what it sent or received. Whatever was told to those
        after them is in doubt: they begin anew."""
        suspects = [hop for hop in self.hops if any(start in hop.link.span for start in starts)] or self.hops[-1:]
        for hop in self.hops[self.hops.index(suspects[-1]) + 1 :]:
            hop.begun = False
        for before, after in itertools.pairwise(suspects):
            self._blame.add_edge((before.link.peer.peer_id, after.link.peer.peer_id))
        names = " and ".join(hop.name for hop in suspects)
        return [Loss(hop, PeerFault(f"what was sent and what came differ: {names} do not agree")) for hop in suspects]

    # ------------------------------------------------------------------ losses

    def give_up(self, losses: Iterable[Loss], trial: Trial) -> PotluckError:
        """Takes lost hops out of the chain, or prepares them to be resumed. Returns what to say if that goes on."""
        self.is_whole = False
        trial.disturbed = True
        failure: PotluckError | None = None
        for loss in losses:
            hop, error = loss.hop, loss.error
            if hop not in self.hops:
                continue
            failure = failure or _as_missing(error, hop.link.span)
            hop.abandon()
            if loss.resumable and hop.begun and hop.session_id not in trial.resumed:
                trial.resumed.add(hop.session_id)
                continue
            self.hops.remove(hop)
            peer_id = hop.link.peer.peer_id
            if not isinstance(error, SessionLost) or peer_id in trial.forgot:
                self._blame.add(peer_id, error.retry_after_s if isinstance(error, PeerFull) else None)
                trial.lost.add(peer_id)
            trial.forgot.add(peer_id)
            if hop.begun:
                self._stats.reroutes += 1
                self._on_event(f"{hop.name} is lost ({error.message}); looking for others")
            else:
                self._on_event(f"{hop.name} is passed over ({error.message})")
        self._show()
        return failure or BlocksMissing("the chain broke")

    def release_leavers(self) -> None:
        """Peers that said that they leave are replaced while they still answer, if there are others."""
        leaving = [hop for hop in self.hops if hop.leaving]
        for hop in leaving:
            try:
                links = self._choose(hop.link.span)
            except BlocksMissing:
                return  # better one that will leave than none
            if not self._blame.avoided().isdisjoint(link.peer.peer_id for link in links):
                return
        for hop in leaving:
            self._on_event(f"{hop.name} is leaving; looking for others")
            self._stats.reroutes += 1
            self.is_whole = False
            self.hops.remove(hop)
            self._left.append(hop)

    def forsake(self) -> None:
        """Whatever the peers hold of the session is of no more use."""
        hops, self.hops, self._left = [*self.hops, *self._left], [], []
        self.is_whole = False
        for hop in hops:
            hop.dismiss()

    async def close(self) -> None:
        """Frees the session on all its peers."""
        hops, self.hops, self._left = [*self.hops, *self._left], [], []
        self.is_whole = False
        async with asyncio.TaskGroup() as tasks:
            for hop in hops:
                tasks.create_task(hop.close())

    # ------------------------------------------------------------------ making it whole

    async def mend(self, log: StepLog, step_id: int, trial: Trial) -> None:
        """Makes the chain whole and sends what the first hop lacks; waits for peers as long as patience lasts.

        Args:
            log: what entered the first block.
            step_id: the first step whose result the client lacks.

        Raises:
            BlocksMissing: named blocks had no peer, or none that answered, for too long.
            ChainBroken: a hop failed after all had answered.
        """
        said = ""
        while True:
            self.epoch += 1
            try:
                opened = await self._open(trial)
            except (BlocksMissing, ChainBroken) as broken:
                failure = broken if isinstance(broken, BlocksMissing) else self.give_up(broken.losses, trial)
                if trial.exhausted:
                    if failure.message != said:
                        said = failure.message
                        self._on_event(f"waiting: {said}")
                    await self._peers.refresh()
                await trial.again(failure)
                continue
            renewed = to_renew(opened, step_id, stateless=self._spec.stateless)
            if not renewed:
                break
            for index in renewed:
                self.hops[index].begun = False
        if self._stats.reroutes or said:
            self._on_event("the chain is now " + " -> ".join(hop.name for hop in self.hops))
        await self._connect(opened, log, step_id)
        for hop in self._left:
            hop.dismiss()
        self._left.clear()

    async def _open(self, trial: Trial) -> list[Opened]:
        """Fills the gaps and opens all hops at once under the present epoch.

        Raises:
            BlocksMissing: blocks have no peer.
            ChainBroken: hops did not open.
        """
        gaps = missing_spans([hop.link.span for hop in self.hops], self._spec.n_blocks)
        try:
            links = [self._choose(gap, without=trial.lost) for gap in gaps]
        except BlocksMissing:
            trial.lost.clear()
            trial.exhausted = True
            links = [self._choose(gap) for gap in gaps]
        for link in itertools.chain(*links):
            self.hops.append(Hop(link, self._peers.channel(link.peer), self._secret, self.inbox))
        self.hops.sort(key=lambda hop: hop.link.span)
        states = await asyncio.gather(*(self._attach(hop) for hop in self.hops))
        while not self.inbox.empty():  # of older epochs, all of it
            self.inbox.get_nowait()
        outcomes = list(zip(self.hops, states, strict=True))
        losses = [Loss(hop, state) for hop, state in outcomes if isinstance(state, PotluckError)]
        losses += [
            Loss(hop, PeerLost(f"the stream to {hop.name} has ended"), resumable=True)
            for hop, state in outcomes
            if isinstance(state, Opened) and not hop.is_open
        ]
        if losses:
            raise ChainBroken(*losses)
        for hop in self.hops:
            self._blame.forgive(hop.link.peer.peer_id)
        return [state for state in states if isinstance(state, Opened)]

    def _choose(self, gap: Span, without: Collection[str] = ()) -> tuple[Link, ...]:
        """Peers for the blocks `gap`, of those that this session can use, `without` those of these ids.

        Raises:
            BlocksMissing: some have none.
        """
        leaving = {hop.link.peer.peer_id for hop in [*self.hops, *self._left] if hop.leaving}
        leaving.update(without)
        able = [p for p in self._peers.peers() if self._spec.codec in p.codecs and p.peer_id not in leaving]
        at_start = {hop.link.span.start: hop.link.peer.peer_id for hop in self.hops}
        at_stop = {hop.link.span.stop: hop.link.peer.peer_id for hop in self.hops}
        return choose_chain(
            able,
            gap,
            times=self._peers.times(),
            avoid=self._blame.avoided(),
            relayed=self._blame.cut_edges(),
            rules=self._config.rules,
            previous=at_stop.get(gap.start),
            following=at_start.get(gap.stop),
            cuts=self._peers.cuts(),
            kv_tokens=self._spec.batch * self._spec.max_tokens,
        )

    async def _attach(self, hop: Hop) -> Opened | PotluckError:
        """Opens the session on the hop's peer, or takes it up there. An error is a value, so that all are heard."""
        request = hop.opening(self._spec, self.epoch)
        hop.relayed = False
        patience_s = self._config.step_timeout_s if hop.begun else self._config.open_timeout_s
        try:
            signed = self._peers.signed(request, hop.link.peer)
            return await hop.attach(signed, self._config.probe_timeout_s, patience_s)
        except PotluckError as error:
            return error

    async def _connect(self, opened: Sequence[Opened], log: StepLog, step_id: int) -> None:
        """Tells each hop where its outputs go, and the first one what it lacks."""
        cut = self._blame.cut_edges()
        lacks = [lacking(state, step_id, stateless=self._spec.stateless) for state in opened]
        for (before, after), next_step in zip(itertools.pairwise(self.hops), lacks[1:], strict=True):
            before.relayed = (before.link.peer.peer_id, after.link.peer.peer_id) in cut
            self._route(before, after, next_step)
        self._route(self.hops[-1], None, step_id)
        self.is_whole = True
        self._show()
        for entry in log.since(lacks[0]):
            if entry.step_id < step_id:
                self._stats.replayed_tokens += entry.rows * entry.tokens
            await self.send(self.hops[0], entry.step(self.epoch))

    def _route(self, hop: Hop, after: Hop | None, next_step: int) -> None:
        if after is None or hop.relayed:
            route = Route(self.epoch, next_step)
        else:
            route = Route(self.epoch, next_step, after.link.peer.peer_id, after.edge)
        try:
            hop.route(route)
        except PeerError as error:
            raise ChainBroken(Loss(hop, error, resumable=True)) from error

    def _show(self) -> None:
        """Which hops answer now, for the record."""
        peers = [hop.link.peer for hop in self.hops]
        ways = ways_ms(peers, self._peers.times(), self._blame.cut_edges())
        self._record.chain(self.links, ways, [hop.relayed for hop in self.hops])


def _as_missing(error: PotluckError, wanted: Span) -> PotluckError:
    if isinstance(error, WireError | BlocksMissing):
        return error
    return BlocksMissing(
        f"blocks {wanted} have no peer that serves them now ({error.message})",
        missing=[str(wanted)],
        retry_after_s=error.retry_after_s,
    )
