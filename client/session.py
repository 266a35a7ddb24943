"""A session: one generation's way through a chain of peers, and what happens when some of them are lost.

The life of a step, top to bottom: `step` sends the input to the first hop; the peers push it from one to the next; the
last one's result ends it. Where something fails, `_give_up` says what is lost, and `_repair` makes the chain whole
again: it fills the gaps with other peers and tells every hop where its outputs go and from which step on, so that each
is told what it lacks by the one before it (see `client.recovery`). Where nothing comes, `_inquire` asks the hops.

Everything that crosses is already encoded: tensors are the caller's business (`client.remote`).
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from client import inquest
from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.deadline import StepTimes
from client.hop import Heard, Hop
from client.recovery import lacking, to_renew
from client.times import Stopwatch, Times
from dht.record import PeerRecord
from protocol.errors import (
    BlocksMissing,
    PeerError,
    PeerFault,
    PeerLost,
    PotluckError,
    SessionLost,
    StaleEpoch,
    WireError,
)
from protocol.journal import Entry, StepLog
from protocol.limits import EDGE_BYTES, SESSION_ID_BYTES
from protocol.messages import HIDDEN, Notice, Open, Opened, Progress, Route, Step, StepResult
from protocol.span import Span, missing_spans

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.25  # between two looks for a chain
REPLAY_TOKENS = 512  # rows x tokens of one replayed step
STUCK_S = 0.25  # between two looks at a step that has left one hop and not reached the next
BUSY_LOOK_S = (0.25, 2.0)  # between two looks at a hop that is at work, shortest and longest


class Peers(Protocol):
    """What a session needs of the swarm."""

    def peers(self) -> Sequence[PeerRecord]:
        """The model's peers, as last seen."""

    async def refresh(self) -> None:
        """Looks again, now."""

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        """A channel to the peer, pinned to its certificate."""

    def cuts(self) -> tuple[int, ...] | None:
        """The blocks before which the model may be cut; None: anywhere."""

    def times(self) -> Times:
        """What this client has measured of the peers."""

    @property
    def stopwatch(self) -> Stopwatch:
        """To be told of their replies."""


@dataclass(frozen=True, slots=True)
class SessionSpec:
    """What a session is opened with: the model, its number of blocks, rows, and tokens per row (0: not known).

    `batch` and `max_tokens` are reserved on each peer.
    """

    fingerprint: str
    n_blocks: int
    codec: str = "none"  # of results; inputs come encoded
    batch: int = 1
    max_tokens: int = 0
    stateless: bool = False


@dataclass(slots=True)
class SessionStats:
    """What happened to a session so far."""

    steps: int = 0
    tokens: int = 0  # rows x tokens sent through the chain, replays not counted
    replayed_tokens: int = 0  # that the client itself sent again
    relayed: int = 0  # steps that the client carried from one hop to the next
    reroutes: int = 0  # hops that were replaced
    busy_s: float = 0.0  # in steps, recoveries counted
    bytes_sent: int = 0
    bytes_received: int = 0


@dataclass(frozen=True, slots=True)
class Loss:
    """A hop that failed. `resumable`: perhaps only the connection did."""

    hop: Hop
    error: PotluckError
    resumable: bool = False


class ChainBroken(Exception):  # what happened, within this module only
    """Hops of the chain failed."""

    def __init__(self, *losses: Loss) -> None:
        super().__init__(str(losses[0].error))
        self.losses = losses


class Patience:
    """How long one step may fail before it is given up.

    Args:
        wait_s: seconds from the first failure on.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._until_s: float | None = None

    async def after(self, failure: PotluckError) -> None:
        """Returns at once after the first failure, after a pause after later ones; raises `failure` in the end."""
        now_s = asyncio.get_running_loop().time()
        if self._until_s is None:
            self._until_s = now_s + self._wait_s
            return
        if now_s >= self._until_s:
            raise failure
        await asyncio.sleep(RETRY_PAUSE_S)


class Session:
    """One session along a chain.

    Args:
        on_event: told, in one sentence, when the chain changes or when the session waits for peers.
    """

    def __init__(
        self,
        spec: SessionSpec,
        peers: Peers,
        blame: Blame,
        config: ClientConfig,
        on_event: Callable[[str], None] = logger.info,
    ) -> None:
        self.spec = spec
        self._peers = peers
        self._blame = blame
        self._config = config
        self._on_event = on_event
        self._secret = secrets.token_bytes(SESSION_ID_BYTES)
        self._epoch = 0
        self._step_id = 0
        self._position = 0  # tokens per row in the caches
        self._hops: list[Hop] = []  # in the order of their blocks; gaps while the chain is broken
        self._is_whole = False
        self._inbox: asyncio.Queue[Heard] = asyncio.Queue()
        self._log = StepLog(keeps_all=not spec.stateless)  # what entered the first block
        self._times = StepTimes()
        self._stepping = asyncio.Lock()  # held while a step that was cancelled still tidies up
        self.stats = SessionStats()

    @property
    def position(self) -> int:
        """Tokens per row in the peers' caches."""
        return self._position

    @property
    def chain(self) -> tuple[Link, ...]:
        """The chain in use, in order; empty before the first step."""
        return tuple(hop.link for hop in self._hops)

    # ------------------------------------------------------------------ the decode path

    async def step(self, entry: Entry) -> StepResult:
        """One pass of `entry` through the whole chain. Lost hops are replaced on the way. Returns the last result.

        Where this raises, or is cancelled, the session stays as it was before the step; the next one replays it.

        Raises:
            BlocksMissing: some blocks had no peer for `wait_s`.
            PotluckError: an error that no other peer could cure.
        """
        started_s = time.perf_counter()
        async with self._stepping:
            entry = replace(entry, step_id=self._step_id)
            self._log.put(entry)
            try:
                result = await self._pass(entry)
            except BaseException:
                self._log.take_back()
                self._forsake(list(self._hops))
                raise
            finally:
                self.stats.busy_s += time.perf_counter() - started_s
            self._commit(entry)
            return result

    async def _pass(self, entry: Entry) -> StepResult:
        patience = Patience(self._config.wait_s)
        await self._consider_leavers()
        while True:
            try:
                if self._is_whole:
                    await self._try_cut_edges(entry)
                    await self._send(self._hops[0], entry.step(self._epoch))
                else:
                    await self._repair(entry, patience)
                return await self._result(entry)
            except ChainBroken as broken:
                await patience.after(self._give_up(broken.losses))

    async def _result(self, entry: Entry) -> StepResult:
        """Waits for the step's result; carries to the next hop what could not be pushed there."""
        started_s = time.monotonic()
        late = _Late()
        timeout_s = self._times.allowance_s(entry.tokens)
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    heard = await self._inbox.get()
            except TimeoutError:
                timeout_s = await self._inquire(entry, late)
                continue
            hop, what = heard.hop, heard.what
            if hop not in self._hops or isinstance(what, Notice):
                continue
            if isinstance(what, StepResult) and what.step.epoch != self._epoch:
                continue  # on its way since before the chain changed; the hop was told from where to send again
            if isinstance(what, PotluckError):
                raise self._failure(hop, what)
            _check(what, entry, hop)
            if hop is not self._hops[-1]:
                await self._relay(hop, what)
            elif what.step.step_id == entry.step_id:
                self._note(entry, what.step, time.monotonic() - started_s)
                return what

    def _note(self, entry: Entry, result: Step, took_s: float) -> None:
        """What a step shows of the times to expect."""
        self._times.note(entry.tokens, took_s)
        by_start = {hop.link.span.start: hop.link for hop in self._hops}
        for cost in result.trace:
            if (link := by_start.get(cost.start)) is not None:
                self._peers.stopwatch.note(
                    link.peer.peer_id,
                    len(link.span),
                    entry.tokens,
                    cost.compute_ms,
                    cost.queue_ms,
                    cost.kv_tokens_left,
                )

    async def _send(self, hop: Hop, step: Step) -> None:
        try:
            await hop.send(step, self._config.step_timeout_s)
        except PeerError as error:
            raise ChainBroken(Loss(hop, error, resumable=True)) from error

    async def _relay(self, hop: Hop, result: StepResult) -> None:
        following = self._hops[self._hops.index(hop) + 1]
        if not hop.relayed:
            self._cut(hop, following, result.undelivered)
        self.stats.relayed += 1
        await self._send(following, replace(result.step, epoch=self._epoch))

    def _commit(self, entry: Entry) -> None:
        if not self.spec.stateless:
            self._position = entry.position + entry.tokens
        self._step_id += 1
        self.stats.steps += 1
        self.stats.tokens += entry.rows * entry.tokens
        self.stats.bytes_sent = sum(hop.bytes_sent for hop in self._hops)
        self.stats.bytes_received = sum(hop.bytes_received for hop in self._hops)

    # ------------------------------------------------------------------ when something is wrong

    def _failure(self, hop: Hop, error: PotluckError) -> ChainBroken | PotluckError:
        """What an error that a hop reported means for the chain."""
        if isinstance(error, StaleEpoch):
            return error
        if isinstance(error, PeerError):
            return ChainBroken(Loss(hop, error, resumable=isinstance(error, PeerLost)))
        index = self._hops.index(hop)
        if index == 0 or not isinstance(error, WireError):
            return error
        # A peer found nonsense in what another one sent. Who is right cannot be told from here.
        return ChainBroken(Loss(self._hops[index - 1], error), Loss(hop, error))

    async def _inquire(self, entry: Entry, late: _Late) -> float:
        """The step is late: asks all hops where it is. Returns after how many seconds to ask again.

        Raises:
            ChainBroken: hops are silent, or have been at it for too long.
        """
        probe_s = self._config.probe_timeout_s
        reports = await asyncio.gather(*(hop.progress(probe_s) for hop in self._hops))
        verdict = inquest.judge(reports, entry.step_id)
        losses = []
        for index in verdict.lost:
            error = reports[index]
            assert isinstance(error, PotluckError)
            losses.append(Loss(self._hops[index], error))
        if losses:
            raise ChainBroken(*losses)
        moved = inquest.arriving(reports), tuple(r.next_step for r in reports if isinstance(r, Progress))
        if late.has_changed(verdict, moved):
            return STUCK_S if verdict.stuck is not None else _between(verdict.expected_s, *BUSY_LOOK_S)
        if verdict.busy is not None:
            hop = self._hops[verdict.busy]
            if late.lasts_s < max(self._config.step_timeout_s, 3 * self._times.allowance_s(entry.tokens)):
                return _between(verdict.expected_s, *BUSY_LOOK_S)
            raise ChainBroken(Loss(hop, PeerLost(f"{hop.name} has been at one step for {late.lasts_s:.0f} s")))
        assert verdict.stuck is not None
        return await self._unblock(verdict.stuck, reports, late)

    async def _unblock(self, stuck: int, reports: Sequence[inquest.Report], late: _Late) -> float:
        """The step has left hop `stuck - 1` and does not reach hop `stuck`, though both answer: finds another way."""
        before = self._hops[stuck - 1] if stuck > 0 else None
        after = self._hops[stuck] if stuck < len(self._hops) else None
        if before is not None and after is not None and not before.relayed:
            report = reports[stuck]
            assert isinstance(report, Progress)
            self._cut(before, after, f"{before.name} does not reach {after.name}")
            try:
                await before.route(Route(self._epoch, report.received))
            except PeerError as error:
                raise ChainBroken(Loss(before, error, resumable=True)) from error
            return self._config.probe_timeout_s
        streams = [hop for hop in (before, after) if hop is not None]
        lost = PeerLost("what is sent does not arrive")
        raise ChainBroken(*(Loss(hop, lost, resumable=late.first_time(hop)) for hop in streams))

    def _cut(self, before: Hop, after: Hop, why: str) -> None:
        """From now on, for a while, this client carries steps over that edge."""
        before.relayed = True
        self._blame.add_edge((before.link.peer.peer_id, after.link.peer.peer_id))
        self._on_event(f"steps from {before.name} to {after.name} go through this client ({why or 'as it asks'})")

    async def _try_cut_edges(self, entry: Entry) -> None:
        """Edges that were cut for long enough are tried again, between two steps."""
        cut = self._blame.cut_edges() if any(hop.relayed for hop in self._hops) else frozenset()
        for before, after in zip(self._hops, self._hops[1:], strict=False):
            if before.relayed and (before.link.peer.peer_id, after.link.peer.peer_id) not in cut:
                before.relayed = False
                await self._route(before, after, entry.step_id)

    def _give_up(self, losses: Iterable[Loss]) -> PotluckError:
        """Takes lost hops out of the chain, or prepares them to be resumed. Returns what to say if that goes on."""
        self._is_whole = False
        missing: PotluckError | None = None
        for hop, error, resumable in ((loss.hop, loss.error, loss.resumable) for loss in losses):
            if hop not in self._hops:
                continue
            missing = missing or _as_missing(error, hop.link.span)
            hop.abandon()
            if resumable and hop.begun:
                continue
            self._hops.remove(hop)
            if not isinstance(error, SessionLost):
                self._blame.add(hop.link.peer.peer_id, error.retry_after_s)
            if hop.begun:
                self.stats.reroutes += 1
                self._on_event(f"{hop.name} is lost ({error.message}); looking for others")
        return missing or BlocksMissing("the chain broke")

    async def _consider_leavers(self) -> None:
        """Peers that said that they leave are replaced while they still answer, if there are others."""
        leaving = [hop for hop in self._hops if hop.leaving]
        for hop in leaving:
            try:
                self._choose(hop.link.span)
            except BlocksMissing:
                return  # better one that will leave than none
        for hop in leaving:
            self._on_event(f"{hop.name} is leaving; looking for others")
            self.stats.reroutes += 1
        if leaving:
            async with asyncio.TaskGroup() as tasks:
                for hop in leaving:
                    tasks.create_task(hop.close())
            self._forsake(leaving)

    def _forsake(self, hops: Sequence[Hop]) -> None:
        """The sessions of these hops are of no more use."""
        for hop in hops:
            hop.abandon()
        self._hops = [hop for hop in self._hops if hop not in hops]
        self._is_whole = self._is_whole and not hops

    # ------------------------------------------------------------------ making the chain whole

    async def _repair(self, entry: Entry, patience: Patience) -> None:
        """Makes the chain whole and sends what the first hop lacks; waits for peers as long as `patience` lasts.

        Raises:
            BlocksMissing: named blocks had no peer, or none that answered, for too long.
            ChainBroken: a hop failed after all had answered.
        """
        waiting = ""
        while True:
            self._epoch += 1
            try:
                self._fill_gaps()
            except BlocksMissing as missing:
                if missing.message != waiting:
                    waiting = missing.message
                    self._on_event(f"waiting: {waiting}")
                await patience.after(missing)
                await self._peers.refresh()
                continue
            states = await asyncio.gather(*(self._attach(hop) for hop in self._hops))
            losses = [
                Loss(hop, state)
                for hop, state in zip(self._hops, states, strict=True)
                if isinstance(state, PotluckError)
            ]
            if losses:
                failure = self._give_up(losses)
                if failure.message != waiting:
                    waiting = failure.message
                    self._on_event(f"waiting: {waiting}")
                await patience.after(failure)
                await self._peers.refresh()
                continue
            opened = [state for state in states if isinstance(state, Opened)]
            renewed = to_renew(opened, entry.step_id, stateless=self.spec.stateless)
            if not renewed:
                break
            for index in renewed:
                self._hops[index].begun = False
        if self.stats.reroutes or waiting:
            self._on_event("the chain is now " + " -> ".join(hop.name for hop in self._hops))
        self._times.prior_s = self._expected_s()
        await self._connect(opened, entry)

    def _fill_gaps(self) -> None:
        """Chooses peers for the blocks that no hop of the chain has.

        Raises:
            BlocksMissing: some have none.
        """
        links = [self._choose(gap) for gap in missing_spans([h.link.span for h in self._hops], self.spec.n_blocks)]
        for link in itertools.chain(*links):
            self._hops.append(Hop(link, self._peers.channel(link.peer), self._secret, self._inbox))
        self._hops.sort(key=lambda hop: hop.link.span)

    def _choose(self, gap: Span) -> tuple[Link, ...]:
        """Peers for the blocks `gap`, of those that this session can use."""
        leaving = {hop.link.peer.peer_id for hop in self._hops if hop.leaving}
        able = [p for p in self._peers.peers() if self.spec.codec in p.codecs and p.peer_id not in leaving]
        at_start = {hop.link.span.start: hop.link.peer.peer_id for hop in self._hops}
        at_stop = {hop.link.span.stop: hop.link.peer.peer_id for hop in self._hops}
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
            kv_tokens=self.spec.batch * self.spec.max_tokens,
        )

    def _expected_s(self) -> float:
        """Seconds that a step of one token should take along the chain, by what is known of its peers."""
        times, total_ms = self._peers.times(), 0.0
        for hop in self._hops:
            peer, blocks = hop.link.peer, len(hop.link.span)
            said_ms = (peer.step_ms or 0.0) * blocks / len(peer.span) + (peer.queue_ms or 0.0)
            total_ms += times.expected_ms(peer.peer_id, blocks, 1) or said_ms
            total_ms += times.rtts_ms.get(peer.peer_id, 0.0)
        return total_ms / 1e3

    async def _attach(self, hop: Hop) -> Opened | PotluckError:
        """Opens the session on the hop's peer, or takes it up there, under the present epoch. An error is a value, so
        that all of them are heard."""
        hop.edge, hop.relayed = secrets.token_bytes(EDGE_BYTES), False
        spec = self.spec
        request = Open(
            hop.session_id,
            self._epoch,
            spec.fingerprint,
            hop.link.span,
            spec.codec,
            spec.batch,
            spec.max_tokens,
            resume=hop.begun,
            stateless=spec.stateless,
            edge=hop.edge,
        )
        try:
            timeout_s = self._config.probe_timeout_s if hop.begun else self._config.open_timeout_s
            return await hop.attach(request, timeout_s, self._config.step_timeout_s)
        except PotluckError as error:
            return error

    async def _connect(self, opened: Sequence[Opened], entry: Entry) -> None:
        """Tells each hop where its outputs go, and the first one what it lacks."""
        cut = self._blame.cut_edges()
        lacks = [lacking(state, entry.step_id, stateless=self.spec.stateless) for state in opened]
        following: list[Hop | None] = [*self._hops[1:], None]
        for hop, after, next_step in zip(self._hops, following, [*lacks[1:], entry.step_id], strict=True):
            hop.relayed = after is not None and (hop.link.peer.peer_id, after.link.peer.peer_id) in cut
            await self._route(hop, after, next_step)
        self._is_whole = True
        for again in self._log.since(lacks[0], REPLAY_TOKENS):
            if again.step_id != entry.step_id:
                self.stats.replayed_tokens += again.rows * again.tokens
            await self._send(self._hops[0], again.step(self._epoch))

    async def _route(self, hop: Hop, after: Hop | None, next_step: int) -> None:
        if after is None or hop.relayed:
            route = Route(self._epoch, next_step)
        else:
            route = Route(self._epoch, next_step, after.link.peer.peer_id, after.edge)
        try:
            await hop.route(route)
        except PeerError as error:
            raise ChainBroken(Loss(hop, error, resumable=True)) from error

    async def close(self) -> None:
        """Frees the session on all its peers."""
        hops, self._hops, self._is_whole = self._hops, [], False
        async with asyncio.TaskGroup() as tasks:
            for hop in hops:
                tasks.create_task(hop.close())


class _Late:
    """What inquests about one step found so far."""

    def __init__(self) -> None:
        self._seen: object = None
        self._since_s = 0.0
        self._resumed: set[Hop] = set()

    def has_changed(self, verdict: inquest.Verdict, moved: object) -> bool:
        """Is anything different from the last time?"""
        seen = (verdict.busy, verdict.stuck, moved)
        if seen == self._seen:
            return False
        self._seen, self._since_s = seen, time.monotonic()
        return True

    @property
    def lasts_s(self) -> float:
        """For how long nothing has changed."""
        return time.monotonic() - self._since_s

    def first_time(self, hop: Hop) -> bool:
        """Was that hop's stream not yet opened anew for this step?"""
        is_first = hop not in self._resumed
        self._resumed.add(hop)
        return is_first


def _between(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def _as_missing(error: PotluckError, wanted: Span) -> PotluckError:
    if isinstance(error, WireError | BlocksMissing):
        return error
    return BlocksMissing(
        f"blocks {wanted} have no peer that serves them now ({error.message})",
        missing=[str(wanted)],
        retry_after_s=error.retry_after_s,
    )


def _check(result: StepResult, entry: Entry, hop: Hop) -> None:
    """Raises unless a hop gave back hidden states, as many rows and tokens as it was given where that is known."""
    step = result.step
    shapes = [spec.shape for spec in step.tensors if spec.name == HIDDEN]
    is_this = step.step_id == entry.step_id  # else it is replayed, perhaps several in one
    if not shapes or (is_this and [shape[-3:-1] for shape in shapes] != [(entry.rows, entry.tokens)]):
        error = PeerFault(
            f"{hop.name} gave {shapes or 'nothing'} for {entry.rows} x {entry.tokens} tokens",
            peer_id=hop.link.peer.peer_id,
        )
        raise ChainBroken(Loss(hop, error))
