"""A session: one generation's way through a chain of peers.

The life of a step, top to bottom: `run` sends the input to the first hop; the peers push it from one to the next; the
last one's result ends it. The chunks of a prompt follow one another without waiting for results. Where a hop fails, the
chain is mended and goes on with the same steps (`client.mender`). Where nothing comes in time, the hops are asked where
the step is (`client.inquiry`).

Everything that crosses is already encoded: tensors are the caller's business (`client.remote`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field, replace

from client.audit import Auditor
from client.blame import Blame
from client.chain import Link
from client.chunks import HopCost
from client.config import ClientConfig
from client.deadline import LEAST_S, StepTimes
from client.forecast import expected_s, hop_costs, learn
from client.hop import Hop
from client.inquiry import ASK_AGAIN_S, Inquiry
from client.ledger import broken_edge
from client.loss import ChainBroken, Loss
from client.mender import Mender
from client.open_chain import OpenChain
from client.own_blocks import OwnBlocks
from client.peers import Peers
from client.recorder import Recorder
from client.spec import SessionSpec
from client.stats import SessionStats
from client.trial import Patience, Trial
from protocol.errors import Doubted, PeerFault, PotluckError, WireError
from protocol.journal import Entry, StepLog
from protocol.limits import IN_FLIGHT
from protocol.messages import HIDDEN, Notice, Step, StepResult
from protocol.receipts import digest
from tensor_codecs import codec, dtype_of

logger = logging.getLogger(__name__)


class Session:
    """One session along a chain.

    Args:
        on_event: told, in one sentence, when the chain changes or when the session waits for peers.
        own: blocks that the client has itself, for audits.
        auditors: the peers that audits may ask; None: the same.

    Attributes:
        record: what became of its steps, hop by hop; see `client.trace.trace_of`.
        auditor: has some of its steps computed again by others.
    """

    def __init__(
        self,
        spec: SessionSpec,
        peers: Peers,
        blame: Blame,
        config: ClientConfig,
        on_event: Callable[[str], None] = logger.info,
        own: OwnBlocks | None = None,
        auditors: Peers | None = None,
    ) -> None:
        self.spec = spec
        self.stats = SessionStats()
        self.record = Recorder(spec.n_blocks, self.stats)
        self._peers = peers
        self._on_event = on_event
        self._config = config
        self._chain = OpenChain(peers, blame, self.stats, self.record, self._tell)
        self._log = StepLog(keeps_all=not spec.stateless)  # what entered the first block
        self._mender = Mender(self._chain, self._log, spec, peers, blame, config, self.stats, self._tell)
        self.auditor = Auditor(spec, auditors or peers, blame, config, self._log, self._chain, self._tell, own=own)
        self._times = StepTimes()
        self._step_id = 0
        self._position = 0  # tokens per row in the caches
        self._wary = False  # was the chain mended in the step before?
        self._stepping = asyncio.Lock()  # held while a step that was cancelled still tidies up
        self._passing: asyncio.Task[object] | None = None  # the task of the pass under way
        self._interrupted = False
        self._carried: dict[tuple[int, int], bytes] = {}  # digests of what this client relayed: step, block before it

    @property
    def position(self) -> int:
        """Tokens per row in the peers' caches."""
        return self._position

    @property
    def chain(self) -> tuple[Link, ...]:
        """The chain in use, in order; empty before the first step."""
        return self._chain.links

    async def step(self, entry: Entry) -> StepResult:
        """A pass of one step; see `run`."""
        (result,) = await self.run([entry])
        return result

    async def run(self, entries: Sequence[Entry]) -> list[StepResult]:
        """One pass of `entries`, in order, through the whole chain: as many at once as may be on their way, so that its
        peers work at the same time. Lost hops are replaced on the way. Returns the last hop's results.

        Where this raises, or is cancelled, the session stays as it was before the pass; the next one replays it.

        Raises:
            BlocksMissing: some blocks had no peer for `wait_s`.
            Doubted: what came out of earlier steps was wrong.
            PotluckError: an error that no other peer could cure.
        """
        started_s = time.perf_counter()
        async with self._turn():
            flight = _Flight([replace(entry, step_id=self._step_id + i) for i, entry in enumerate(entries)])
            self._mender.release_leavers()
            try:
                results = [await self._next_result(flight) for _ in entries]
            except BaseException:
                self._log.take_back(self._step_id)
                self._chain.forsake()
                raise
            finally:
                self._carried.clear()
                self.stats.busy_s += time.perf_counter() - started_s
            self._commit(flight.steps, results)
            return results

    async def open(self) -> tuple[HopCost, ...]:
        """Opens the chain now rather than with the first step. Returns what its hops are expected to take.

        Raises: as `run`.
        """
        async with self._turn():
            trial = Trial(Patience(self._config.wait_s))
            try:
                while not self._chain.is_whole:
                    try:
                        await self._mend(self._step_id, trial)
                    except ChainBroken as broken:
                        await trial.again(self._mender.give_up(broken.losses, trial))
            except BaseException:
                self._chain.forsake()
                raise
            return hop_costs(self._chain.links, self._peers.times())

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One pass at a time, which `interrupt` can cancel."""
        async with self._stepping:
            if self._interrupted:
                raise asyncio.CancelledError
            self.auditor.check()
            self._passing = asyncio.current_task()
            try:
                yield
            finally:
                self._passing = None

    async def _next_result(self, flight: _Flight) -> StepResult:
        """The result of the first step that has none; sends those after it as far ahead as may be."""
        chain, trial, first = self._chain, Trial(Patience(self._config.wait_s)), flight.first
        is_alone = flight.on_their_way == 0
        while True:
            started_s = time.monotonic()
            try:
                if not chain.is_whole:
                    await self._mend(first.step_id, trial)
                elif is_alone:
                    chain.try_cut_edges(first.step_id)
                sent_s = time.monotonic()
                while (ahead := flight.next()) is not None:
                    self._log.put(ahead, keep=max(IN_FLIGHT, flight.sent))
                    await chain.send(chain.hops[0], ahead.step(chain.epoch))
                result = await self._result(first, trial)
            except ChainBroken as broken:
                await trial.again(self._mender.give_up(broken.losses, trial))
                continue
            flight.done += 1
            self._wary = trial.mended
            is_timed = is_alone and not trial.disturbed
            took_s = time.monotonic() - (sent_s if is_timed else flight.began_s)
            self.record.step(chain.links, result.step.trace, took_s, is_timed=is_timed)
            if is_alone:  # others wait for those before them, which says nothing of the chain
                self._learn(first, result.step)
                if not trial.disturbed:
                    self._times.note(first.tokens, time.monotonic() - started_s)
            return result

    def _learn(self, entry: Entry, result: Step) -> None:
        self.stats.compute_s += sum(cost.compute_ms for cost in result.trace) / 1e3
        learn(self._chain.links, entry.tokens, result.trace, self._peers.stopwatch)

    def _tell(self, what: str) -> None:
        self.record.event(what)
        self._on_event(what)

    async def _mend(self, step_id: int, trial: Trial) -> None:
        await self._mender.mend(step_id, trial)
        self._times.prior_s = expected_s(self._chain.links, self._peers.times())

    async def _result(self, entry: Entry, trial: Trial) -> StepResult:
        """Waits for the step's result; carries to the next hop what could not be pushed there."""
        chain, inquiry = self._chain, Inquiry(entry, trial, self._chain, self._peers, self._config)
        # Trouble seldom comes alone, and to ask costs little.
        timeout_s = self._times.allowance_s(entry.tokens, ASK_AGAIN_S if self._wary else LEAST_S)
        if trial.disturbed:
            timeout_s = min(timeout_s, ASK_AGAIN_S)
        while True:
            try:
                async with asyncio.timeout(timeout_s):
                    heard = await chain.inbox.get()
            except TimeoutError:
                trial.disturbed = True
                timeout_s = await inquiry.look()
                continue
            hop, what = heard.hop, heard.what
            if hop not in chain.hops or isinstance(what, Notice):
                continue
            if isinstance(what, PotluckError):
                raise self._mender.diagnose(hop, what, trial)
            if what.step.epoch != chain.epoch:
                continue
            if hop is not chain.hops[-1]:
                self._carried[what.step.step_id, hop.link.span.stop] = digest(what.step.position, what.step.parts())
                await chain.relay(hop, what.step, what.undelivered)
            elif what.step.step_id == entry.step_id:
                self._check(what, entry, hop)
                return what

    def _commit(self, steps: Sequence[Entry], results: Sequence[StepResult]) -> None:
        for step, result in zip(steps, results, strict=True):
            self.auditor.note(step, result)
        if not self.spec.stateless and steps:
            self._position = steps[-1].position + steps[-1].tokens
        self._step_id += len(steps)
        self.stats.steps += len(steps)
        self.stats.tokens += sum(entry.rows * entry.tokens for entry in steps)
        self.stats.bytes_sent = sum(hop.bytes_sent for hop in self._chain.hops)
        self.stats.bytes_received = sum(hop.bytes_received for hop in self._chain.hops)

    # ------------------------------------------------------------------ is the result what it should be

    def _check(self, result: StepResult, entry: Entry, hop: Hop) -> None:
        """Raises ChainBroken unless the last hop gave back hidden states as large as it was given, encoded as asked,
        and each hop says that it received what the one before it says that it sent."""
        given = [part.spec.shape for part in entry.parts if part.spec.name == HIDDEN]
        try:
            (spec,) = result.step.tensors
            size = codec(self.spec.codec).nbytes(spec.shape, dtype_of(spec.dtype))
            is_good = [spec.shape] == given and spec.codec == self.spec.codec and spec.nbytes == size
        except (ValueError, WireError):
            is_good = False
        if not is_good:
            found = [(spec.name, spec.shape, spec.codec) for spec in result.step.tensors]
            raise ChainBroken(Loss(hop, PeerFault(f"{hop.name} gave {found or 'nothing'} for {given}")))
        trace = result.step.trace
        edge = broken_edge(entry.digest(), trace, digest(result.step.position, result.step.parts()))
        if edge is not None:
            raise self._mender.distrust(self._suspects(result.step, edge))

    def _suspects(self, step: Step, edge: int) -> list[int]:
        """Where those hops begin one of which lies about what went over the edge after `edge` hops."""
        before, after = step.trace[:edge][-1:], step.trace[edge:][:1]
        if before and after and (carried := self._carried.get((step.step_id, after[0].start))) is not None:
            return [after[0].start if carried == before[0].sent else before[0].start]  # this client has seen it itself
        return [said.start for said in (*before, *after)] or [self._chain.hops[-1].link.span.start]

    # ------------------------------------------------------------------ its end

    def interrupt(self) -> None:
        """Cancels the pass under way, and any later one: nobody waits for their results any more."""
        self._interrupted = True
        if self._passing is not None:
            self._passing.cancel()

    async def close(self) -> None:
        """Frees the session on all its peers."""
        async with self._stepping:
            await self.auditor.close()
            await self._chain.close()

    async def settle(self) -> None:
        """Waits for audits that are under way, for a while.

        Raises:
            Doubted: what came out of earlier steps was wrong.
        """
        await self.auditor.settle(self._config.audit_wait_s)
        self.auditor.check()


@dataclass(frozen=True, slots=True)
class Lingering:
    """A session that nobody needs any more but its audits, for a while: whoever it was for has its results already, and
    is told of what they find."""

    session: Session

    async def close(self) -> None:
        """Frees it once they are through."""
        try:
            with suppress(Doubted):  # of which the session has told
                await self.session.settle()
        finally:
            await self.session.close()


@dataclass(slots=True)
class _Flight:
    """The steps of one pass, how many of them were sent, and how many have come out."""

    steps: list[Entry]
    sent: int = 0
    done: int = 0
    began_s: float = field(default_factory=time.monotonic)

    @property
    def first(self) -> Entry:
        """The first one that has not come out."""
        return self.steps[self.done]

    @property
    def on_their_way(self) -> int:
        return self.sent - self.done

    def next(self) -> Entry | None:
        """The next one to be sent, if there is one and it may be."""
        if self.sent == len(self.steps) or self.on_their_way == IN_FLIGHT:
            return None
        self.sent += 1
        return self.steps[self.sent - 1]
