"""Where tensors become bytes: the blocks of a model as the head sees them, the swarm behind.

Implements `slicing.Remote`. Encoding and decoding happen here, in the caller's thread, never on the event loop.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from client.batches import Portion, plan
from client.chain import Link, agreed_codec
from client.chunks import LEAST_TOKENS, HopCost, chunk_tokens
from client.config import ClientConfig
from client.encoding import chunk_of, decoded, entry_of, row_axis, rows_of, wire_ops
from client.own_blocks import OwnBlocks
from client.peers import ModelPeers
from client.recorder import Recorder
from client.session import Lingering, Session
from client.spec import SessionSpec
from client.stats import SessionStats
from client.swarm import Swarm
from client.times import Times
from dht.record import PeerRecord
from protocol.errors import BlocksMissing, Doubted, Implausible
from protocol.journal import Entry
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, StepResult
from protocol.span import Span
from slicing import CacheOp, RemoteCache
from slicing.plausible import check_plausible
from tensor_codecs import names

logger = logging.getLogger(__name__)

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Reservation:
    """What a cache's handle is before its session begins: tokens per row that it will hold, 0 if not known."""

    max_tokens: int = 0


_INTERRUPTED = object()
"""The handle of a cache whose session shall not begin any more."""


def _ignore(thread: int) -> None:
    """Told of results, and does nothing."""


class RemoteBlocks:
    """All blocks of one model, served by a swarm. For any number of threads, each with caches of its own.

    Args:
        on_event: told when a session's chain changes or waits.
        own: blocks that this client has itself, for audits.
        is_routed: do the model's tokens choose among experts?

    Attributes:
        fingerprint, n_blocks: of the model.
        on_results: told, in the swarm's loop, that a pass is through which this thread waits for.
        last_chain, last_stats: of the session that was used last.
    """

    def __init__(
        self,
        swarm: Swarm,
        fingerprint: str,
        n_blocks: int,
        config: ClientConfig,
        on_event: Callable[[str], None] = logger.info,
        own: OwnBlocks | None = None,
        *,
        is_routed: bool = False,
    ) -> None:
        self._swarm = swarm
        self._own = own
        self._is_routed = is_routed
        self.fingerprint = fingerprint
        self.n_blocks = n_blocks
        self._config = config
        self.on_event = on_event
        self.on_results: Callable[[int], None] = _ignore
        self.last_chain: tuple[Link, ...] = ()
        self.last_stats = SessionStats()
        self.last_record = Recorder(n_blocks, self.last_stats)

    def run(
        self,
        hidden: Tensor,
        *,
        cache: RemoteCache | None,
        ops: tuple[CacheOp, ...],
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        extras: dict[str, Tensor],
    ) -> Tensor:
        """Passes q tokens of B rows through every block; see `slicing.Remote`.

        Raises:
            BlocksMissing: some blocks have no peer.
            Doubted: what came out of this step, or of earlier ones, is wrong; the cache is of no more use.
            PotluckError: see the error tree.
        """
        tensors = {HIDDEN: hidden, ATTENTION_MASK: attention_mask, POSITION_IDS: position_ids, **extras}
        whole = {name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
        if cache is None:
            return self._run_stateless(whole)
        session = self._session(cache, rows=hidden.shape[-3])
        try:
            entries = list(self._entries(whole, cache.n_tokens, ops, session))
            results = self._swarm.call(self._pass(session, entries, threading.get_ident()))
        finally:
            self._last(session)
        cache.pending.clear()
        outputs = [self._plausible(session, decoded(result, hidden)) for result in results]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-2)

    def _plausible(self, session: Session, output: Tensor) -> Tensor:
        """What came out of a session.

        Raises:
            Doubted: no model makes that.
        """
        try:
            check_plausible(output)
        except Implausible as why:
            raise self._swarm.call(_distrusted(session, why)) from why
        return output

    async def _pass(self, session: Session, entries: Sequence[Entry], thread: int) -> list[StepResult]:
        results = await session.run(entries)
        self.on_results(thread)
        return results

    def _run_stateless(self, whole: dict[str, Tensor]) -> Tensor:
        """One pass without memory; where blocks have replicas, the rows of a batch go over several chains at once."""
        hidden = whole[HIDDEN]
        peers = self._swarm.peers_of(self.fingerprint)
        codec_name = self._codec(peers)
        portions = self._portions(peers, whole, codec_name)
        sessions: list[Session] = []
        steps: list[Callable[[], Coroutine[Any, Any, StepResult]]] = []
        for portion in portions:
            seen = peers.planned({link.peer.peer_id for link in portion.chain})
            session = self._new_session(
                seen, codec_name, rows=portion.stop - portion.start, stateless=True, auditors=peers
            )
            sessions.append(session)
            steps.append(partial(session.step, entry_of(rows_of(whole, portion), 0, (), codec_name)))
        try:
            results = self._swarm.call(_all_of(steps))
            outputs = [self._plausible(s, decoded(r, hidden)) for s, r in zip(sessions, results, strict=True)]
        finally:
            self._last(max(sessions, key=lambda session: session.spec.batch))
            self._close_settled(sessions)
        return torch.cat(outputs, dim=-3)

    def _close_settled(self, sessions: Sequence[Session]) -> None:
        """Frees sessions on their peers: now, but for those that are still audited."""
        settled = []
        for session in sessions:
            if session.auditor.is_settled:
                settled.append(session)
            else:
                self._swarm.close_later(Lingering(session))
        self._swarm.call(_all_of([session.close for session in settled]))

    def _portions(self, peers: ModelPeers, whole: dict[str, Tensor], codec_name: str) -> tuple[Portion, ...]:
        """Which rows take which chain; all of them an open one, where they cannot be split or no chain is there yet."""
        rows, tokens = whole[HIDDEN].shape[-3:-1]
        together = (Portion(0, rows, ()),)
        if any(tensor.shape[row_axis(name)] not in (1, rows) for name, tensor in whole.items()):
            return together
        records, times, avoid = self._swarm.call(_survey(peers, self._swarm))
        try:
            return plan(
                [peer for peer in records if codec_name in peer.codecs],
                Span(0, self.n_blocks),
                rows,
                tokens,
                times=times,
                avoid=avoid,
                rules=self._config.rules,
                cuts=peers.cuts(),
            )
        except BlocksMissing:
            return together  # the session waits for peers

    def session_of(self, cache: RemoteCache) -> Session | None:
        """The session behind a cache, if it has begun."""
        return cache.handle if isinstance(cache.handle, Session) else None

    def release(self, cache: RemoteCache) -> None:
        """Frees the cache's session on its peers now, rather than when the cache is forgotten."""
        session, cache.handle = self.session_of(cache), None
        if session is not None:
            self._swarm.call(session.close())

    def settle(self, cache: RemoteCache) -> None:
        """Waits, for a while, for audits of the cache's session that are under way.

        Raises:
            Doubted: what came out of its steps is wrong.
        """
        session = self.session_of(cache)
        if session is not None and not session.auditor.is_settled:
            self._swarm.call(session.settle())

    def interrupt(self, cache: RemoteCache) -> None:
        """Ends the cache's session, from another thread: its step under way and any later one raise CancelledError."""
        session = self.session_of(cache)
        if session is None:
            cache.handle = _INTERRUPTED
        else:
            self._swarm.call_soon(session.interrupt)

    def summary(self) -> str:
        """One sentence on the session that was used last."""
        stats = self.last_stats
        chain = " -> ".join(f"{link.span} at {link.peer.peer_id[-8:]}" for link in self.last_chain) or "no chain"
        per_step_ms = stats.busy_s / max(1, stats.steps) * 1e3
        carried = f", {stats.relayed} carried from peer to peer" if stats.relayed else ""
        return f"{chain}; {stats.steps} steps, {per_step_ms:.1f} ms per step, {stats.reroutes} reroutes{carried}"

    def _last(self, session: Session) -> None:
        self.last_chain, self.last_stats, self.last_record = session.chain, session.stats, session.record

    def _session(self, cache: RemoteCache, rows: int) -> Session:
        if isinstance(cache.handle, Session):
            return cache.handle
        peers = self._swarm.peers_of(self.fingerprint)
        max_tokens = cache.handle.max_tokens if isinstance(cache.handle, Reservation) else 0
        session = self._new_session(peers, self._codec(peers), rows, max_tokens=max_tokens)
        if cache.handle is _INTERRUPTED:
            raise CancelledError
        cache.handle = session
        # The peers' memory is freed as soon as nobody can continue the session.
        weakref.finalize(cache, self._swarm.close_later, session).atexit = False
        return session

    def _new_session(
        self,
        peers: ModelPeers,
        codec_name: str,
        rows: int,
        *,
        max_tokens: int = 0,
        stateless: bool = False,
        auditors: ModelPeers | None = None,
    ) -> Session:
        spec = SessionSpec(
            self.fingerprint,
            self.n_blocks,
            codec=codec_name,
            batch=rows,
            max_tokens=max_tokens,
            stateless=stateless,
            is_routed=self._is_routed,
        )
        return Session(spec, peers, self._swarm.blame, self._config, self._event, self._own, auditors)

    def _codec(self, peers: ModelPeers) -> str:
        usable = [peer for peer in peers.peers() if self._config.rules.allows(peer)]
        return agreed_codec(usable, self.n_blocks, (self._config.codec, *names()))

    def _event(self, text: str) -> None:
        self.on_event(text)

    def _entries(
        self, whole: dict[str, Tensor], start: int, ops: tuple[CacheOp, ...], session: Session
    ) -> Iterator[Entry]:
        """A pass as it travels: a long prompt in chunks, of which the first brings the operations."""
        total, size = whole[HIDDEN].shape[-2], self._chunk_tokens(whole[HIDDEN], session)
        left = wire_ops(ops, session.position, start)
        for offset in range(0, total, size):
            chunk = whole if size >= total else chunk_of(whole, start, offset, min(size, total - offset))
            yield entry_of(chunk, start + offset, left, session.spec.codec)
            left = ()

    def _chunk_tokens(self, hidden: Tensor, session: Session) -> int:
        """Tokens per row of one chunk. Chains are opened first, for prompts of which it is worth to know."""
        rows, tokens = hidden.shape[-3:-1]
        if rows * tokens < 2 * LEAST_TOKENS:
            hops: tuple[HopCost, ...] = ()
        else:
            hops = self._swarm.call(session.open())
        return chunk_tokens(tokens, rows, hops, self._config.prefill_tokens)


async def _distrusted(session: Session, why: Implausible) -> Doubted:
    """In the swarm's loop: the last hop of a session gave what cannot be. Returns what to raise."""
    return session.auditor.distrust_last(why)


async def _survey(peers: ModelPeers, swarm: Swarm) -> tuple[Sequence[PeerRecord], Times, frozenset[str]]:
    """What a plan needs, taken in the swarm's loop: the peers, their times, and those that failed lately."""
    return peers.peers(), peers.times(), swarm.blame.avoided()


async def _all_of(work: Sequence[Callable[[], Coroutine[Any, Any, Result]]]) -> list[Result]:
    """Runs all at once; the first error ends the others, and is raised as itself."""
    try:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(part()) for part in work]
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from None
    return [task.result() for task in running]
