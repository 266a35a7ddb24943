"""The step loop: what waits -> `Scheduler.step` -> one pass in the compute thread -> what is through.

Pump.execute ─► Engine.execute ─► waiting ─► Scheduler.step ─► Worker.run ─► Session.outputs ─► Pump
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence

from peer.compute import ComputeThread
from peer.delivery import Delivery
from peer.meter import Meter
from peer.scheduler import CostModel, Due, Piece, Scheduler
from peer.session import Session
from peer.table import SessionTable
from peer.tally import Tally
from peer.work import Work, shape_of
from peer.worker import Worker
from protocol.errors import PeerFull
from protocol.messages import HopTrace

logger = logging.getLogger(__name__)

DECODING_S = 1.0
"""A session that made a decode step within so many seconds is in the middle of an answer."""


class Engine:
    """Computes the steps of all sessions. Belongs to the event loop; `run` is its one task.

    Args:
        meter: told of each pass.
        tally: counts steps and passes.
    """

    def __init__(
        self,
        worker: Worker,
        compute: ComputeThread,
        sessions: SessionTable,
        scheduler: Scheduler,
        meter: Meter,
        tally: Tally,
    ) -> None:
        self.passes = 0
        self._worker = worker
        self._compute = compute
        self._sessions = sessions
        self._scheduler = scheduler
        self._meter = meter
        self._tally = tally
        self._costs = CostModel()
        self._waiting: dict[int, Work] = {}
        self._in_pass: frozenset[int] = frozenset()
        self._numbers = 0
        self._came = asyncio.Event()

    @property
    def queued(self) -> int:
        """Steps that wait or run."""
        return len(self._waiting)

    @property
    def expected_ms(self) -> float:
        """Milliseconds until what waits now is through, at a guess. For any thread: a copy, since steps come and go."""
        tokens = sum(work.rows * (work.tokens - work.computed) for work in list(self._waiting.values()))
        return self._costs.now(self._meter.step_ms).of(tokens) if tokens else 0.0

    async def execute(self, session: Session, delivery: Delivery) -> HopTrace | None:
        """Has a step of a session computed, and its output kept in the session. Returns what it cost; None if it was
        applied before.

        Who is cancelled here leaves: what has not begun then is not computed any more.

        Raises:
            PotluckError: the step was refused, or failed; see `Worker.admit`.
            PeerFull: there is no room for its keys and values.
        """
        step = delivery.step
        if not self._worker.admit(session, step):
            return None
        rows, tokens = shape_of(step)
        self._make_room(session, rows, step.position + tokens)
        self._tally.tokens_in += rows * tokens
        self._tally.bytes_in += len(step.payload)
        self._numbers += 1
        work = Work(
            self._numbers,
            session,
            step,
            delivery.arrived_s,
            rows,
            tokens,
            self._worker.packs(session, step),
            asyncio.get_running_loop().create_future(),
            session.cache,
        )
        if work.decodes:
            session.came_back(time.monotonic())
        self._waiting[work.number] = work
        session.running = work.done
        self._came.set()
        try:
            return await asyncio.shield(work.done)
        except asyncio.CancelledError:
            self._withdraw(work)
            raise

    async def run(self) -> None:
        """Makes passes, as long as something waits."""
        while True:
            await self._came.wait()
            self._came.clear()
            while self._waiting:
                await self._gather()
                await self._pass()

    async def _gather(self) -> None:
        """Waits for more steps, as long as that pays."""
        began_s = time.monotonic()
        while (patience_s := self._patience_s(began_s)) > 0:
            self._came.clear()
            try:
                async with asyncio.timeout(patience_s):
                    await self._came.wait()
            except TimeoutError:
                return

    def _patience_s(self, began_s: float) -> float:
        """For how long a pass may wait for more steps, that began to wait at `began_s`."""
        now_s, costs = time.monotonic(), self._costs.now(self._meter.step_ms)
        here = {id(work.session) for work in self._waiting.values() if work.decodes}
        due = [
            Due(session.client, (session.due_s - now_s) * 1e3)
            for session in self._decoding(now_s)
            if id(session) not in here
        ]
        waiting = [work.waiting() for work in self._waiting.values()]
        return self._scheduler.patience_ms(waiting, (now_s - began_s) * 1e3, due, costs) / 1e3

    async def _pass(self) -> None:
        costs = self._costs.now(self._meter.step_ms)
        waiting = [work.waiting() for work in self._waiting.values()]
        decoding = list(self._decoding(time.monotonic()))
        pieces = self._scheduler.step(waiting, costs, len(decoding), {session.client for session in decoding})
        chosen = [(self._waiting[piece.number], self._tokens(piece)) for piece in pieces]
        if not chosen:
            return
        self._in_pass = frozenset(piece.number for piece in pieces)
        started_s = time.perf_counter()
        try:
            await self._compute.run(self._worker.run, chosen)
        except Exception as error:
            logger.exception("a pass failed before its steps could")
            for work, _ in chosen:
                work.error = work.error or error
        finally:
            self._in_pass = frozenset()
        self.passes += 1
        self._note(chosen, (time.perf_counter() - started_s) * 1e3)
        for work, _ in chosen:
            self._settle(work)

    def _tokens(self, piece: Piece) -> int:
        """Tokens per row of a piece."""
        return piece.tokens // self._waiting[piece.number].rows

    def _note(self, chosen: Sequence[tuple[Work, int]], took_ms: float) -> None:
        """What a pass took, for the passes to come and for this peer's record."""
        now_s = time.monotonic()
        blocks = len(chosen[0][0].session.span)
        tokens = sum(work.rows * tokens for work, tokens in chosen)
        self._costs.note(tokens, took_ms * self._meter.n_blocks / blocks)
        queue_ms = sum(max(0.0, work.began_s - work.arrived_s) for work, _ in chosen) / len(chosen) * 1e3
        single = all(count == 1 for _, count in chosen)
        rows = sum(work.rows for work, _ in chosen)
        self._meter.note(blocks, 1 if single else tokens, rows if single else 1, queue_ms, took_ms, now_s)
        self._tally.pass_s.add(took_ms / 1e3)
        self._tally.pass_steps.add(len(chosen))
        self._tally.pass_tokens.add(tokens)
        for work, count in chosen:
            self._tally.computed[work.kind] += work.rows * count
            work.session.last_used_s = now_s
            if work.decodes and work.step.position:
                work.session.decoded_s = now_s

    def _settle(self, work: Work) -> None:
        """Tells who waits for a step that is through, or that nobody waits for any more."""
        if work.error is None and work.cost is None and not work.withdrawn:
            return
        self._waiting.pop(work.number, None)
        if work.done.done():
            return
        if work.error is not None:
            work.done.set_exception(work.error)
            work.done.exception()  # if nobody asks, that is no fault of this one
        elif work.cost is not None:
            self._tally.step_s[work.kind].add((work.cost.queue_ms + work.cost.compute_ms) / 1e3)
            self._tally.queued_s.add(work.cost.queue_ms / 1e3)
            work.done.set_result(work.cost)
        else:
            work.done.cancel()

    def _withdraw(self, work: Work) -> None:
        """Nobody waits for the step any more. A pass that is under way ends first."""
        work.withdrawn = True
        if work.number not in self._in_pass:
            self._settle(work)

    def _decoding(self, now_s: float) -> Iterator[Session]:
        """The sessions in the middle of an answer, their next steps here or elsewhere in their chains."""
        return (session for session in self._sessions if now_s - session.decoded_s < DECODING_S)

    # ------------------------------------------------------------------ room for keys and values

    def _make_room(self, session: Session, rows: int, tokens: int) -> None:
        """Room for `rows` x `tokens` of the session. Should there be none, the newest sessions give theirs up: they are
        replayed elsewhere, or later, so that the older ones can end and nobody waits for ever.

        Raises:
            PeerFull: only older ones hold it.
        """
        while True:
            try:
                self._sessions.ensure_room(session, rows, tokens)
                return
            except PeerFull as full:
                busy = {self._waiting[number].session.session_id for number in self._in_pass}
                newest = self._sessions.newest(after=session, without=busy)
                if newest is None:
                    raise
                logger.info("a session gives its room up for an older one")
                self._preempt(newest, full)

    def _preempt(self, session: Session, full: PeerFull) -> None:
        for work in [work for work in self._waiting.values() if work.session is session]:
            work.error = PeerFull(full.message, retry_after_s=full.retry_after_s)
            self._settle(work)
        self._sessions.close(session)
        self._sessions.preempted += 1
