"""Who serves which blocks of which model, as of when.

`SwarmView` is a frozen snapshot, made by pure functions from records; `SwarmReader` keeps one up to date from the DHT.
Bad records are dropped and counted by reason, never raised.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import TYPE_CHECKING, TypeVar

from dht.background import background
from dht.record import MAX_SHARDS, MODELS_KEY, ModelRecord, PeerRecord, peer_keys
from protocol.errors import BadRecord, SwarmNotFound
from protocol.span import Span, missing_spans

if TYPE_CHECKING:
    from dht.node import SwarmNode
    from dht.validator import Verifier

log = logging.getLogger(__name__)
R = TypeVar("R", PeerRecord, ModelRecord)

MIN_PAUSE_S = 0.02

MAX_MODELS = 256
"""Read per refresh; each model costs at least one search."""


@dataclass(frozen=True)
class SwarmView:
    """A snapshot of the swarm. Peers that left (tombstones) are not in it.

    Attributes:
        as_of: seconds since 1970 at which the swarm was read.
        models: the models that at least one peer serves, by name.
        dropped: how many records the last read dropped and our node refused since the read before, by reason.
    """

    as_of: float = 0.0
    models: tuple[ModelRecord, ...] = ()
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    peers_by_model: Mapping[str, tuple[PeerRecord, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def model(self, fingerprint: str) -> ModelRecord | None:
        """The listing of a model; None: no peer of this swarm serves it."""
        return next((model for model in self.models if model.fingerprint == fingerprint), None)

    def named(self, name: str) -> tuple[ModelRecord, ...]:
        """The models that go by a name: several, if peers serve different ones under it."""
        return tuple(model for model in self.models if model.name == name)

    def peers(self, fingerprint: str) -> tuple[PeerRecord, ...]:
        """The peers of a model, in order of their spans: joining, online and draining ones."""
        return self.peers_by_model.get(fingerprint, ())

    def online(self, fingerprint: str) -> tuple[PeerRecord, ...]:
        """The peers that take new sessions."""
        return tuple(peer for peer in self.peers(fingerprint) if peer.state == "online")

    def peer(self, peer_id: str) -> PeerRecord | None:
        """The record of one peer, of whatever model."""
        return next((peer for peers in self.peers_by_model.values() for peer in peers if peer.peer_id == peer_id), None)

    def missing(self, fingerprint: str) -> tuple[Span, ...]:
        """The blocks for which no peer takes new sessions; () also if the swarm does not know the model."""
        model = self.model(fingerprint)
        if model is None:
            return ()
        return missing_spans((peer.span for peer in self.online(fingerprint)), model.n_blocks)

    def is_whole(self, fingerprint: str) -> bool:
        """Does every block of the model have a peer that takes new sessions?"""
        return self.model(fingerprint) is not None and not self.missing(fingerprint)

    def coverage(self, fingerprint: str) -> tuple[int, ...]:
        """For each block of the model, how many peers take new sessions for it; () if the model is not known."""
        model = self.model(fingerprint)
        counts = [0] * (model.n_blocks if model is not None else 0)
        for peer in self.online(fingerprint):
            for block in range(peer.span.start, min(peer.span.stop, len(counts))):
                counts[block] += 1
        return tuple(counts)


@dataclass(frozen=True)
class Findings:
    """Verified records that a read brought, newest of each signer, and what was dropped."""

    peers: Mapping[str, PeerRecord] = field(default_factory=lambda: MappingProxyType({}))
    models: Mapping[str, ModelRecord] = field(default_factory=lambda: MappingProxyType({}))
    dropped: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))


def sift(found: Mapping[str, Mapping[str, bytes]], verifier: Verifier, now: float) -> Findings:
    """Verify raw records, by key and subkey, as the DHT gave them. Slow for many new ones: call it in a thread."""
    peers: dict[str, PeerRecord] = {}
    models: dict[str, ModelRecord] = {}
    dropped: Counter[str] = Counter()
    for key, by_subkey in found.items():
        for subkey, raw in by_subkey.items():
            try:
                envelope = verifier.unseal(raw)
                if envelope.signer != subkey:
                    raise BadRecord("the subkey is not the signer")
                if key == MODELS_KEY:
                    _keep_newest(models, subkey, ModelRecord.from_envelope(envelope, now=now))
                else:
                    _keep_newest(peers, subkey, PeerRecord.from_envelope(envelope, now=now, key=key))
            except BadRecord as error:
                dropped[error.message] += 1
    return Findings(peers, models, MappingProxyType(dict(dropped)))


def merge(known: Findings, fresh: Findings, now: float) -> Findings:
    """What is known after a read: the newest record of each signer, for as long as it has not expired.

    A record that a read missed stays until it expires, since the nodes that hold it come and go; and an older one than
    known never comes back, since a node that still holds it may have missed the tombstone.
    """
    peers = {peer_id: peer for peer_id, peer in known.peers.items() if peer.expires_at > now}
    models = {signer: model for signer, model in known.models.items() if model.expires_at > now}
    for peer_id, peer in fresh.peers.items():
        _keep_newest(peers, peer_id, peer)
    for signer, model in fresh.models.items():
        _keep_newest(models, signer, model)
    return Findings(peers, models, fresh.dropped)


def make_view(findings: Findings, as_of: float) -> SwarmView:
    """The snapshot that verified records add up to.

    A listing counts only while its signer serves that model, with the same number of blocks. Where listings of one
    fingerprint differ, most signers win, then the smaller one: all readers see the same.
    """
    living = [peer for peer in findings.peers.values() if peer.state != "offline"]
    votes: dict[str, Counter[tuple[str, int, tuple[int, ...]]]] = {}
    shards: dict[str, int] = {}
    for model in findings.models.values():
        server = findings.peers.get(model.signer)
        if server is None or server.state == "offline" or server.fingerprint != model.fingerprint:
            continue
        if server.n_blocks == model.n_blocks:
            votes.setdefault(model.fingerprint, Counter())[(model.name, model.n_blocks, model.cuts)] += 1
            shards[model.fingerprint] = max(shards.get(model.fingerprint, 1), model.shards)
    models = []
    for fingerprint, counts in votes.items():
        name, n_blocks, cuts = min(counts, key=lambda choice: (-counts[choice], choice))
        models.append(ModelRecord("", name, fingerprint, n_blocks, cuts, shards[fingerprint]))
    models.sort(key=lambda model: (model.name, model.fingerprint))
    blocks = {model.fingerprint: model.n_blocks for model in models}
    by_model: dict[str, list[PeerRecord]] = {}
    dropped = Counter(findings.dropped)
    for peer in sorted(living, key=lambda peer: (peer.span.start, peer.span.stop, peer.peer_id)):
        if blocks.get(peer.fingerprint, peer.n_blocks) == peer.n_blocks:
            by_model.setdefault(peer.fingerprint, []).append(peer)
        else:
            dropped["the number of blocks is not the model's"] += 1
    return SwarmView(
        as_of=as_of,
        models=tuple(models),
        dropped=MappingProxyType(dict(dropped)),
        peers_by_model=MappingProxyType({fingerprint: tuple(peers) for fingerprint, peers in by_model.items()}),
    )


def _keep_newest(records: dict[str, R], signer: str, record: R) -> None:
    if signer not in records or records[signer].sequence < record.sequence:
        records[signer] = record


class SwarmReader:
    """Keeps a `SwarmView` up to date. `view` is always the latest; it is never None and never waits.

    Args:
        node: through which to read.
        fingerprints: models that are read even if no listing names them (a client that knows its model saves a search).
    """

    def __init__(self, node: SwarmNode, fingerprints: Iterable[str] = ()) -> None:
        self.view = SwarmView()
        self._node = node
        self._wanted = set(fingerprints)
        self._findings = Findings()
        self._refreshing = asyncio.Lock()
        self._changed = asyncio.Condition()

    def watch(self, fingerprint: str) -> None:
        """Read this model's peers too from the next refresh on, whether it is listed or not."""
        self._wanted.add(fingerprint)

    async def refresh(self) -> SwarmView:
        """Read the swarm now. Typically 10-50 ms on one machine.

        Raises:
            SwarmNotFound: the DHT did not answer within `read_timeout_s`.
        """
        async with self._refreshing:
            keys = self._keys()
            dropped = await self._take(keys)
            more = self._keys() - keys  # of models that the first read made known
            if more:
                dropped += await self._take(more)
            dropped += self._node.refused
            self._node.refused.clear()
            self._findings = replace(self._findings, dropped=MappingProxyType(dict(dropped)))
            self.view = make_view(self._findings, self._node.now())
            for peer in self._findings.peers.values():
                self._node.learn(peer.peer_id, peer.maddrs)
        async with self._changed:
            self._changed.notify_all()
        return self.view

    async def wait_until(self, holds: Callable[[SwarmView], bool], timeout_s: float) -> SwarmView:
        """The first view for which `holds` is true, the present one included. Needs `run` or someone's `refresh`.

        Raises:
            TimeoutError: there was none in time.
        """
        async with asyncio.timeout(timeout_s), self._changed:
            await self._changed.wait_for(lambda: holds(self.view))
        return self.view

    async def run(self) -> None:
        """Refresh every `refresh_every_s`, and when a record expires, for ever.

        A read that fails is logged; the view then only loses what expires.
        """
        failing = False
        while True:
            try:
                await self.refresh()
                failing = False
            except SwarmNotFound as error:
                log.log(logging.DEBUG if failing else logging.WARNING, "%s; trying again", error)
                failing = True
                await self._forget_expired()
            await asyncio.sleep(self._pause_s())

    def _pause_s(self) -> float:
        """Until the next refresh: sooner if a peer's record expires before, so that it is not shown for longer."""
        next_expiry = min((peer.expires_at for peer in self._findings.peers.values()), default=math.inf)
        pause_s = self._node.config.refresh_every_s
        return min(pause_s, max(next_expiry - self._node.now(), MIN_PAUSE_S))

    async def _take(self, keys: set[str]) -> Counter[str]:
        """Read these keys into `_findings`; what was dropped, by reason."""
        found = await self._node.read(sorted(keys))
        now = self._node.now()
        fresh = await asyncio.to_thread(sift, found, self._node.verifier, now)
        self._findings = merge(self._findings, fresh, now)
        return Counter(fresh.dropped)

    async def _forget_expired(self) -> None:
        self._findings = merge(self._findings, Findings(), self._node.now())
        self.view = make_view(self._findings, self.view.as_of)
        async with self._changed:
            self._changed.notify_all()

    def _keys(self) -> set[str]:
        listed: dict[str, int] = dict.fromkeys(self._wanted, 1)
        for model in self._findings.models.values():
            if model.fingerprint in listed or len(listed) < MAX_MODELS:
                listed[model.fingerprint] = max(listed.get(model.fingerprint, 1), min(model.shards, MAX_SHARDS))
        return {MODELS_KEY}.union(*(peer_keys(fingerprint, shards) for fingerprint, shards in listed.items()))


@contextlib.asynccontextmanager
async def reading(node: SwarmNode, fingerprints: Iterable[str] = ()) -> AsyncIterator[SwarmReader]:
    """A reader that has read once and refreshes itself while the body runs.

    Raises:
        SwarmNotFound: the first read failed.
    """
    reader = SwarmReader(node, fingerprints)
    await reader.refresh()
    async with background(reader.run(), "swarm-reader"):
        yield reader
