"""A shadow: others that compute again what one hop of a session computed, from the same inputs.

Where these are peers, it is an ordinary session as far as they can tell. It is kept, so that a later look needs only
what is new. Nothing is mended here: where a peer of it fails, the shadow is given up, and the session itself never
notices.
"""

from __future__ import annotations

import abc
import asyncio
import itertools
import secrets
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from client.chain import Link
from client.hop import Hop
from client.inbox import Inbox
from client.moves import Moves
from client.peers import Peers
from client.spec import SessionSpec
from client.tolerance import Kind, kind_of
from protocol.errors import PeerFault, PeerLost, PotluckError, SessionLost, WireError
from protocol.journal import Entry, Journal
from protocol.limits import SESSION_ID_BYTES
from protocol.messages import HIDDEN, CacheOp, Route, StepResult
from tensor_codecs import codec, dtype_of

EPOCH = 1  # a shadow has no other
PASS_TOKENS = 512  # rows x tokens that are computed at once


class Recomputation(abc.ABC):
    """Whoever computes in the place of one hop.

    Attributes:
        next_step: the first step of the session that it has not computed.
        n_hops: how many compute one after the other, and encode what comes out.
    """

    n_hops = 1

    def __init__(self) -> None:
        self.next_step = 0
        self._sent = 0  # steps
        self._tokens = 0  # per row

    @property
    @abc.abstractmethod
    def peer_ids(self) -> frozenset[str]:
        """Who computes; nobody: this client."""

    @property
    @abc.abstractmethod
    def kinds(self) -> frozenset[Kind]:
        """What they compute with."""

    @property
    @abc.abstractmethod
    def name(self) -> str:
        """How logs name it."""

    @abc.abstractmethod
    async def _compute(self, entry: Entry, timeout_s: float) -> Tensor:
        """What comes out of one step, [..., rows, tokens, H]."""

    @abc.abstractmethod
    def dismiss(self) -> None:
        """It is not needed any more."""

    async def run(self, entries: Sequence[Entry], moves: Moves, timeout_s: float) -> list[Tensor]:
        """Computes steps, many at once where nothing was done to rows between them. Returns the hidden states that came
        out of each, [..., rows, tokens, H].

        Args:
            moves: what was done to rows.

        Raises:
            SessionLost: they do not go on where it is.
            PotluckError: one of its peers failed.
        """
        journal, found = Journal([self._following(entry, moves) for entry in entries]), list[Tensor]()
        for batch in journal.batches(PASS_TOKENS):
            output = await self._compute(replace(batch, step_id=self._sent, trace=()), timeout_s)
            self._sent += 1
            start = 0
            while start < batch.tokens:
                tokens = entries[len(found)].tokens
                found.append(output.narrow(-2, start, tokens))
                start += tokens
        return found

    def _following(self, entry: Entry, moves: Moves) -> Entry:
        """The entry as it goes on where this is. Where it comes is in its digest, operations are not: the crop that
        follows from that is made, and what the client knows itself was done to rows."""
        rows = moves.before(entry, self.next_step, is_empty=not self._tokens)
        crops = [op for op in entry.ops if op.kind == "crop" and op.values == (entry.position,)]
        if entry.position > self._tokens:
            raise SessionLost(f"it has {self._tokens} tokens, and what follows starts at {entry.position}")
        if entry.position < self._tokens and not crops:  # it was done to the log since, and rides on no step
            crops = [CacheOp("crop", (entry.position,))]
        self._tokens = entry.position + entry.tokens
        self.next_step = entry.step_id + 1
        return replace(entry, ops=(*(op for op in entry.ops if op.kind == "record_past"), *rows, *crops))


class Shadow(Recomputation):
    """Peers in the place of one hop.

    Args:
        links: that cover the hop's blocks.
    """

    def __init__(self, links: Sequence[Link], peers: Peers, spec: SessionSpec) -> None:
        super().__init__()
        self._peers = peers
        self._spec = spec
        self._inbox = Inbox()
        secret = secrets.token_bytes(SESSION_ID_BYTES)
        self._hops = [Hop(link, peers.channel(link.peer), secret, self._inbox) for link in links]
        self.n_hops = len(self._hops)

    @property
    def peer_ids(self) -> frozenset[str]:
        """Who computes."""
        return frozenset(hop.link.peer.peer_id for hop in self._hops)

    @property
    def kinds(self) -> frozenset[Kind]:
        """What they compute with."""
        return frozenset(kind_of(hop.link.peer) for hop in self._hops)

    @property
    def name(self) -> str:
        """How logs name it."""
        return " and ".join(hop.name for hop in self._hops)

    async def open(self, timeout_s: float, patience_s: float) -> None:
        """Opens the session on all its peers; see `Hop.attach`.

        Raises:
            PotluckError: one of them does not.
        """
        requests = [self._peers.signed(hop.opening(self._spec, EPOCH), hop.link.peer) for hop in self._hops]
        attaching = (hop.attach(r, timeout_s, patience_s) for hop, r in zip(self._hops, requests, strict=True))
        for outcome in await asyncio.gather(*attaching, return_exceptions=True):  # so that all are heard
            if isinstance(outcome, BaseException):
                raise outcome
        for before, after in itertools.pairwise(self._hops):
            before.route(Route(EPOCH, 0, after.link.peer.peer_id, after.edge))
        self._hops[-1].route(Route(EPOCH, 0))

    async def _compute(self, entry: Entry, timeout_s: float) -> Tensor:
        result = await self._step(entry, timeout_s)
        return await asyncio.to_thread(hidden_of, Entry.of(result.step))

    async def _step(self, entry: Entry, timeout_s: float) -> StepResult:
        first, last = self._hops[0], self._hops[-1]
        first.send(entry.step(EPOCH))
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    heard = await self._inbox.get()
                    if isinstance(heard.what, PotluckError):
                        raise heard.what
                    if not isinstance(heard.what, StepResult):
                        continue  # it will leave, but has not yet
                    if heard.hop is not last or heard.what.step.step_id != entry.step_id:
                        raise PeerLost(f"{heard.hop.name} does not reach the one after it")
                    self._check(heard.what, entry)
                    return heard.what
        except TimeoutError:
            raise PeerLost(f"{self.name} took more than {timeout_s:g} s for one step") from None

    def _check(self, result: StepResult, entry: Entry) -> None:
        """Raises PeerFault unless the last peer gave hidden states as large as it was given, encoded as asked."""
        found = [spec for spec in result.step.tensors if spec.name == HIDDEN]  # before the last block: masks besides
        given = [part.spec.shape for part in entry.parts if part.spec.name == HIDDEN]
        wanted = (*given[0][:-2], entry.tokens, given[0][-1]) if given else ()  # a joined step has several parts
        try:
            (spec,) = found
            size = codec(self._spec.codec).nbytes(spec.shape, dtype_of(spec.dtype))
            is_good = (spec.shape, spec.codec, spec.nbytes, spec.keep) == (wanted, self._spec.codec, size, 0)
        except (ValueError, WireError):
            is_good = False
        if not is_good or result.step.position != entry.position:
            last = self._hops[-1]
            raise last.blamed(PeerFault(f"{last.name} gave {[spec.shape for spec in found]} for {wanted}"))

    def dismiss(self) -> None:
        """Its peers may forget it."""
        for hop in self._hops:
            hop.dismiss()


def hidden_of(entry: Entry) -> Tensor:
    """The hidden states of an entry, decoded: [..., rows, tokens, H]. Not for an event loop.

    Raises:
        PeerFault: there are none, or they cannot be read.
    """
    try:
        tensors = [
            codec(part.spec.codec).decode(part.payload, part.spec.shape, dtype_of(part.spec.dtype))
            for part in entry.parts
            if part.spec.name == HIDDEN
        ]
        return torch.cat(tensors, dim=-2).narrow(-2, 0, entry.tokens)
    except (ValueError, RuntimeError, LookupError, WireError) as error:
        raise PeerFault(f"hidden states that cannot be read: {error}") from error
