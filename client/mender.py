"""Recovery: a chain that is broken is made whole again, and goes on where it was.

Read from top to bottom it is the drawing in ARCHITECTURE.md: `diagnose` says which hops are lost, `give_up` takes them
out, `mend` fills the gaps with other peers, and `_connect` tells every hop where its outputs go and from which step on,
so that each is told what it lacks by the one before it. Who that is, `client.recovery` says.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from functools import partial

from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.hop import Hop
from client.loss import ChainBroken, Loss
from client.open_chain import OpenChain, edge_of
from client.peers import Peers
from client.recovery import lacking, to_renew
from client.spec import SessionSpec
from client.stats import SessionStats
from client.trial import Trial
from protocol.errors import (
    BlocksMissing,
    PeerError,
    PeerFault,
    PeerFull,
    PeerLost,
    PotluckError,
    SessionLost,
    StaleEpoch,
    WireError,
)
from protocol.journal import StepLog
from protocol.messages import Opened
from protocol.span import Span, missing_spans


class Mender:
    """Mends one session's chain.

    Args:
        inputs: what entered the first block.
        on_event: told, in one sentence, when the chain changes or when the session waits for peers.
    """

    def __init__(
        self,
        chain: OpenChain,
        inputs: StepLog,
        spec: SessionSpec,
        peers: Peers,
        blame: Blame,
        config: ClientConfig,
        stats: SessionStats,
        on_event: Callable[[str], None],
    ) -> None:
        self._chain = chain
        self._inputs = inputs
        self._spec = spec
        self._peers = peers
        self._blame = blame
        self._config = config
        self._stats = stats
        self._on_event = on_event

    # ------------------------------------------------------------------ which hops are lost

    def diagnose(self, hop: Hop, error: PotluckError, trial: Trial) -> ChainBroken | PotluckError:
        """What an error that a hop reported means: hops are lost, or no other peer could cure it."""
        if isinstance(error, StaleEpoch):
            return ChainBroken(Loss(hop, error, resumable=True))
        if isinstance(error, PeerError):
            return ChainBroken(Loss(hop, error, resumable=isinstance(error, PeerLost)))
        if not isinstance(error, WireError):
            return ChainBroken(Loss(hop, PeerFault(f"the peer said what none should: {error.message}")))
        trial.nonsense += 1
        if trial.nonsense > 1:
            return error
        # A peer found nonsense in what it was sent. Whether it, the one before it, or this client is to blame cannot be
        # told from one case.
        hops = self._chain.hops
        index = hops.index(hop)
        return ChainBroken(*(Loss(suspect, error) for suspect in hops[max(0, index - 1) : index + 1]))

    def distrust(self, starts: Collection[int]) -> ChainBroken:
        """Of the hops that begin at these blocks, one lies about what it sent or received. Whatever was told to those
        after them is in doubt: they begin anew."""
        hops = self._chain.hops
        suspects = [hop for hop in hops if any(start in hop.link.span for start in starts)] or hops[-1:]
        for hop in hops[hops.index(suspects[-1]) + 1 :]:
            hop.begun = False
        for before, after in itertools.pairwise(suspects):
            self._blame.add_edge(edge_of(before, after))
        names = " and ".join(hop.name for hop in suspects)
        error = f"what was sent and what came differ: {names} do not agree"
        return ChainBroken(*(Loss(hop, PeerFault(error)) for hop in suspects))

    # ------------------------------------------------------------------ they leave the chain

    def give_up(self, losses: Iterable[Loss], trial: Trial) -> PotluckError:
        """Takes lost hops out of the chain, or prepares them to be resumed. Returns what to say if that goes on."""
        self._chain.is_whole = False
        trial.disturbed = trial.mended = True
        failure: PotluckError | None = None
        for loss in losses:
            hop, error = loss.hop, loss.error
            if hop not in self._chain.hops:
                continue
            failure = failure or _as_missing(error, hop.link.span)
            hop.abandon()
            if loss.resumable and hop.begun and hop.session_id not in trial.resumed:
                trial.resumed.add(hop.session_id)
            else:
                self._take_out(hop, error, trial)
        self._chain.show()
        return failure or BlocksMissing("the chain broke")

    def _take_out(self, hop: Hop, error: PotluckError, trial: Trial) -> None:
        self._chain.hops.remove(hop)
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

    def release_leavers(self) -> None:
        """Peers that said that they leave are replaced while they still answer, if there are others."""
        leaving = [hop for hop in self._chain.hops if hop.leaving]
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
            self._chain.let_leave(hop)

    # ------------------------------------------------------------------ others take their places

    async def mend(self, step_id: int, trial: Trial) -> None:
        """Makes the chain whole and sends what the first hop lacks; waits for peers as long as patience lasts.

        Args:
            step_id: the first step whose result the client lacks.

        Raises:
            BlocksMissing: named blocks had no peer, or none that answered, for too long.
            ChainBroken: a hop failed after all had answered.
        """
        chain, said = self._chain, ""
        while True:
            chain.epoch += 1
            try:
                await self._fill_gaps(trial)
                opened = await self._open()
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
                chain.hops[index].begun = False
        if self._stats.reroutes or said:
            self._on_event("the chain is now " + " -> ".join(hop.name for hop in chain.hops))
        await self._connect(opened, step_id)
        chain.dismiss_leavers()

    async def _fill_gaps(self, trial: Trial) -> None:
        """Raises BlocksMissing where blocks have no peer."""
        gaps = missing_spans([hop.link.span for hop in self._chain.hops], self._spec.n_blocks)
        try:
            links = [self._choose(gap, without=trial.lost) for gap in gaps]
        except BlocksMissing:
            trial.lost.clear()
            trial.exhausted = True
            links = [self._choose(gap) for gap in gaps]
        if self._chain.epoch == 1:  # later others wait for an answer
            await self._peers.approach([link.peer for link in itertools.chain(*links)])
        self._chain.add(itertools.chain(*links))

    def _choose(self, gap: Span, without: Collection[str] = ()) -> tuple[Link, ...]:
        """Peers for the blocks `gap`, of those that this session can use, `without` those of these ids.

        Raises:
            BlocksMissing: some have none.
        """
        chain = self._chain
        leaving = {hop.link.peer.peer_id for hop in [*chain.hops, *chain.leavers] if hop.leaving}
        leaving.update(without)
        able = [p for p in self._peers.peers() if self._spec.codec in p.codecs and p.peer_id not in leaving]
        at_start = {hop.link.span.start: hop.link.peer.peer_id for hop in chain.hops}
        at_stop = {hop.link.span.stop: hop.link.peer.peer_id for hop in chain.hops}
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

    async def _open(self) -> list[Opened]:
        """Opens all hops at once under the present epoch.

        Raises:
            ChainBroken: hops did not open.
        """
        chain = self._chain
        states = await asyncio.gather(*(self._attach(hop) for hop in chain.hops))
        chain.inbox.clear()  # of older epochs, all of it
        outcomes = list(zip(chain.hops, states, strict=True))
        losses = [Loss(hop, state) for hop, state in outcomes if isinstance(state, PotluckError)]
        losses += [
            Loss(hop, PeerLost(f"the stream to {hop.name} has ended"), resumable=True)
            for hop, state in outcomes
            if isinstance(state, Opened) and not hop.is_open
        ]
        if losses:
            raise ChainBroken(*losses)
        for hop in chain.hops:
            self._blame.forgive(hop.link.peer.peer_id)
        return [state for state in states if isinstance(state, Opened)]

    async def _attach(self, hop: Hop) -> Opened | PotluckError:
        """Opens the session on the hop's peer, or takes it up there. An error is a value, so that all are heard."""
        request, hop.relayed = hop.opening(self._spec, self._chain.epoch), False
        patience_s = self._config.step_timeout_s if hop.begun else self._config.open_timeout_s
        try:
            signed = self._peers.signed(request, hop.link.peer)
            channel = partial(self._peers.channel, hop.link.peer)
            return await hop.attach(signed, self._config.probe_timeout_s, patience_s, channel)
        except PotluckError as error:
            return error

    async def _connect(self, opened: Sequence[Opened], step_id: int) -> None:
        """Tells each hop where its outputs go, and the first one what it lacks."""
        chain, cut = self._chain, self._blame.cut_edges()
        lacks = [lacking(state, step_id, stateless=self._spec.stateless) for state in opened]
        for (before, after), next_step in zip(itertools.pairwise(chain.hops), lacks[1:], strict=True):
            before.relayed = edge_of(before, after) in cut
            chain.route(before, after, next_step)
        chain.route(chain.hops[-1], None, step_id)
        chain.is_whole = True
        chain.show()
        for entry in self._inputs.since(lacks[0]):
            if entry.step_id < step_id:
                self._stats.replayed_tokens += entry.rows * entry.tokens
            await chain.send(chain.hops[0], entry.step(chain.epoch))


def _as_missing(error: PotluckError, wanted: Span) -> PotluckError:
    if isinstance(error, WireError | BlocksMissing):
        return error
    return BlocksMissing(
        f"blocks {wanted} have no peer that serves them now ({error.message})",
        missing=[str(wanted)],
        retry_after_s=error.retry_after_s,
    )
