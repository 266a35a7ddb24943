"""A session: one generation's way through a chain of peers, and what happens when one of them is lost.

The life of a step, top to bottom: `step` sends the input through each hop in turn; a hop that fails is replaced by
`_replace`, which chooses other peers for the lost blocks and replays the journal of what went into them; then the same
input goes on. Everything that crosses is already encoded: tensors are the caller's business (`client.remote`).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import grpc

from client.blame import Blame
from client.chain import Link, choose_chain
from client.config import ClientConfig
from client.hop import Hop
from client.journal import Entry, Journal, Part
from dht.record import PeerRecord
from protocol.errors import BlocksMissing, PeerError, PeerFault, PeerFull, PeerLost, SessionLost, StaleEpoch
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import HIDDEN, Open, Step, StepResult
from protocol.span import Span

logger = logging.getLogger(__name__)

RETRY_PAUSE_S = 0.25  # between two looks for a chain
REPLAY_TOKENS = 512  # rows x tokens of one replayed step


class Peers(Protocol):
    """What a session needs of the swarm."""

    def peers(self) -> Sequence[PeerRecord]:
        """The model's peers, as last seen."""

    async def refresh(self) -> None:
        """Looks again, now."""

    def channel(self, peer: PeerRecord) -> grpc.aio.Channel:
        """A channel to the peer, pinned to its certificate."""


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
    replayed_tokens: int = 0
    reroutes: int = 0
    busy_s: float = 0.0  # in steps, recoveries counted


class Patience:
    """How long one step may fail before it is given up.

    Args:
        wait_s: seconds from the first failure on.
    """

    def __init__(self, wait_s: float) -> None:
        self._wait_s = wait_s
        self._until_s: float | None = None

    async def after(self, failure: BlocksMissing) -> None:
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
        self._id = secrets.token_bytes(SESSION_ID_BYTES)
        self._epoch = 0
        self._step_id = 0
        self._position = 0  # tokens per row in the caches
        self._hops: dict[int, Hop] = {}  # by first block
        self._journals: dict[int, Journal] = {0: Journal()}  # by block boundary; missing where evicted
        self._stepping = asyncio.Lock()  # held while a step that was cancelled still tidies up
        self.stats = SessionStats()

    @property
    def position(self) -> int:
        """Tokens per row in the peers' caches."""
        return self._position

    @property
    def chain(self) -> tuple[Link, ...]:
        """The chain in use, in order; empty before the first step."""
        return tuple(self._hops[block].link for block in sorted(self._hops))

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
            try:
                return await self._pass(entry)
            except BaseException:
                for hop in self._hops.values():
                    hop.abandon()
                self._hops.clear()
                raise
            finally:
                self.stats.busy_s += time.perf_counter() - started_s

    async def _pass(self, entry: Entry) -> StepResult:
        inputs = {0: entry}  # what enters each hop in this step, by block boundary
        block = 0
        result = StepResult(0, 0, (), b"")
        patience = Patience(self._config.wait_s)
        while block < self.spec.n_blocks:
            try:
                hop = self._hops.get(block) or await self._route(Span(block, self.spec.n_blocks), patience)
                result = await hop.step(self._step(inputs[block]))
                _check(result, entry, hop)
            except StaleEpoch:
                raise
            except PeerError as error:
                block = await self._replace(block, error, patience)
                continue
            block = hop.link.span.stop
            inputs[block] = _onward(entry, result)
        self._commit(inputs)
        return result

    def _step(self, entry: Entry) -> Step:
        specs = tuple(part.spec for part in entry.parts)
        payload = b"".join(part.payload for part in entry.parts)
        return Step(self._epoch, self._step_id, self._position, specs, payload, entry.ops)

    def _commit(self, inputs: dict[int, Entry]) -> None:
        """The step is through: every boundary's journal remembers what entered there."""
        entry = inputs[0]
        if not self.spec.stateless:
            self._journals = {block: j for block, j in self._journals.items() if block in self._hops}
            for block, journal in self._journals.items():
                journal.append(inputs[block])
            self._evict()
            self._position = entry.position + entry.tokens
        self._step_id += 1
        self.stats.steps += 1
        self.stats.tokens += entry.rows * entry.tokens

    def _evict(self) -> None:
        """Keeps the journals within their budget. The first boundary's stays: from it all others can be made again."""
        budget = self._config.journal_mib << 20
        while len(self._journals) > 1 and sum(j.nbytes for j in self._journals.values()) > budget:
            largest = max((b for b in self._journals if b), key=lambda b: self._journals[b].nbytes)
            del self._journals[largest]

    # ------------------------------------------------------------------ recovery

    async def _replace(self, block: int, error: PeerError, patience: Patience) -> int:
        """After `error` at the hop from `block` on: resumes or re-routes it. Returns the block to go on from."""
        hop = self._hops[block]
        if isinstance(error, PeerLost) and await self._resumed(hop):
            return block
        if isinstance(error, PeerFull):
            await hop.close()  # what it holds of this session is of no more use
        if not isinstance(error, SessionLost):
            self._blame.add(hop.link.peer.peer_id, error.retry_after_s)
        self.stats.reroutes += 1
        self._on_event(f"{hop.name} is lost ({error.message}); looking for others")
        start = block if block in self._journals else 0
        for first in [b for b in self._hops if start <= b <= block]:
            self._hops.pop(first).abandon()
        lost = Span(start, hop.link.span.stop)
        await patience.after(_as_missing(error, lost))
        await self._route(lost, patience)
        return start

    async def _resumed(self, hop: Hop) -> bool:
        """The peer may have lost the connection only: is the session still there?"""
        try:
            opened = await hop.open(self._open_request(hop.link, resume=True))
        except PeerError:
            return False
        return opened.next_step in (hop.next_step, self._step_id + 1)

    async def _route(self, wanted: Span, patience: Patience) -> Hop:
        """Opens hops for the blocks `wanted` and replays their journal. Waits for peers as long as `patience` lasts.

        Raises:
            BlocksMissing: named blocks had no peer, or none that answered, for too long.
        """
        waiting = ""
        while True:
            try:
                await self._open_chain(wanted)
                break
            except StaleEpoch:
                raise
            except (BlocksMissing, PeerError) as error:
                missing = _as_missing(error, wanted)
                if missing.message != waiting:
                    waiting = missing.message
                    self._on_event(f"waiting: {waiting}")
                await patience.after(missing)
                await self._peers.refresh()
        if wanted.start or self.stats.reroutes:
            self._on_event("the chain is now " + " -> ".join(hop.name for _, hop in sorted(self._hops.items())))
        return self._hops[wanted.start]

    async def _open_chain(self, wanted: Span) -> None:
        """One attempt: choose, open all hops at once, replay. On an error nothing of the attempt remains."""
        self._epoch += 1  # of each attempt: a peer that an earlier one opened would not open the session again
        able = [peer for peer in self._peers.peers() if self.spec.codec in peer.codecs]
        links = choose_chain(able, wanted, avoid=self._blame.avoided())
        hops = [self._hop(link) for link in links]
        try:
            refusals = await asyncio.gather(*(self._refusal(hop) for hop in hops))
            for refusal in refusals:
                if refusal is not None:
                    raise refusal
            made = await self._replay(hops)
        except BaseException:
            for hop in hops:
                hop.abandon()
            raise
        self._hops.update((hop.link.span.start, hop) for hop in hops)
        self._journals.update(made)

    async def _refusal(self, hop: Hop) -> PeerError | None:
        """Opens the session on the hop's peer. Returns why it would not, so that all refusals are heard."""
        try:
            await hop.open(self._open_request(hop.link, resume=False))
        except PeerError as error:
            self._blame.add(hop.link.peer.peer_id, error.retry_after_s)
            return error
        return None

    async def _replay(self, hops: Sequence[Hop]) -> dict[int, Journal]:
        """Sends the first hop's journal through the new hops. Returns the new boundaries' journals."""
        made = {hop.link.span.start: Journal() for hop in hops[1:]}
        source = self._journals.get(hops[0].link.span.start, Journal())
        for step_id, entry in enumerate(source.batches(REPLAY_TOKENS)):
            current = entry
            for hop in hops:
                step = replace(self._step(current), step_id=step_id, position=entry.position)
                step = replace(step, want_result=hop is not hops[-1])
                try:
                    result = await hop.step(step)
                    if step.want_result:
                        _check(result, entry, hop)
                except PeerError as error:
                    self._blame.add(hop.link.peer.peer_id, error.retry_after_s)
                    raise
                if hop is not hops[-1]:
                    current = _onward(entry, result)
                    made[hop.link.span.stop].append(current)
            self.stats.replayed_tokens += entry.rows * entry.tokens
        return made

    def _hop(self, link: Link) -> Hop:
        return Hop(
            link,
            self._peers.channel(link.peer),
            open_timeout_s=self._config.open_timeout_s,
            step_timeout_s=self._config.step_timeout_s,
        )

    def _open_request(self, link: Link, *, resume: bool) -> Open:
        spec = self.spec
        return Open(
            self._id,
            self._epoch,
            spec.fingerprint,
            link.span,
            spec.codec,
            spec.batch,
            spec.max_tokens,
            resume=resume,
            stateless=spec.stateless,
        )

    async def close(self) -> None:
        """Frees the session on all its peers."""
        hops, self._hops = list(self._hops.values()), {}
        async with asyncio.TaskGroup() as tasks:
            for hop in hops:
                tasks.create_task(hop.close())


def _as_missing(error: BlocksMissing | PeerError, wanted: Span) -> BlocksMissing:
    if isinstance(error, BlocksMissing):
        return error
    return BlocksMissing(
        f"blocks {wanted} have no peer that serves them now ({error.message})",
        missing=[str(wanted)],
        retry_after_s=error.retry_after_s,
    )


def _check(result: StepResult, entry: Entry, hop: Hop) -> None:
    """Raises PeerFault unless a hop gave back as many rows and tokens as it was given."""
    shapes = [spec.shape for spec in result.tensors if spec.name == HIDDEN]
    if len(result.tensors) != 1 or len(shapes) != 1 or shapes[0][-3:-1] != (entry.rows, entry.tokens):
        raise PeerFault(
            f"{hop.name} gave {shapes or 'nothing'} for {entry.rows} x {entry.tokens} tokens",
            peer_id=hop.link.peer.peer_id,
        )


def _onward(entry: Entry, result: StepResult) -> Entry:
    """What enters the next hop: the result's hidden states, with the step's other inputs and operations."""
    hidden = tuple(Part(spec, bytes(payload)) for spec, payload in result.parts())
    others = tuple(part for part in entry.parts if part.spec.name != HIDDEN)
    return replace(entry, parts=hidden + others)
