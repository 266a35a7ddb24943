"""What this peer is at the moment, as its record says it: joining, online, moving, leaving."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from dht.record import MAX_ADDRESSES, PeerRecord, State
from peer import device
from peer.config import PeerConfig
from peer.host import SOFTWARE, Served, SpanHost
from peer.reach.places import Place
from peer.reach.relay import Relay
from protocol.hosts import address
from protocol.identity import Identity
from protocol.limits import WIRE_VERSION
from protocol.span import Span
from tensor_codecs import dtype_name, names


class Standing:
    """The peer's present state. Whoever changes it has it announced.

    Args:
        span: the blocks that it is about to serve.
        hosts: names or addresses under which others reach it, best first; asked anew for each record.

    Attributes:
        state: of the record.
        span: served, or while joining: claimed.
        moving_to: claimed instead of `span`.
        host: what serves; None while it loads.
        moves: so often it went to other blocks, since it started.
        leaving: from then on `state` stays "draining", whatever else happens.
        rtts_ms: round-trip times for the record.
        place: where others reach a port of this machine, instead of at `hosts`.
        relay: through which others are reached; None: it does not relay, or not yet.
    """

    def __init__(
        self, identity: Identity, served: Served, span: Span, config: PeerConfig, hosts: Callable[[], list[str]]
    ) -> None:
        self.served = served
        self.started_at = time.time()
        self.state: State = "joining"
        self.span = span
        self.moving_to: Span | None = None
        self.host: SpanHost | None = None
        self.moves = 0
        self.leaving = False
        self.rtts_ms: Callable[[], tuple[tuple[str, float], ...]] = tuple
        self.place: Callable[[int], Place] | None = None
        self.relay: Relay | None = None
        self._digests: tuple[bytes, ...] = ()
        self._hosts = hosts
        self._announce_port = config.announce_port
        self._port = 0
        self._served_before = 0  # tokens, by hosts that are closed
        self._template = PeerRecord(
            peer_id=identity.peer_id,
            fingerprint=served.fingerprint,
            n_blocks=served.n_blocks,
            span=span,
            state="joining",
            addresses=(),
            certificate_der=identity.certificate_der,
            pinned=config.span is not None,
            codecs=names(),
            software=SOFTWARE,
            wire_version=WIRE_VERSION,
            public_name=config.public_name or "",
            contact=config.contact or "",
            started_at=self.started_at,
        )

    @property
    def peer_id(self) -> str:
        return self._template.peer_id

    def claim(self, span: Span) -> None:
        """It is about to load `span`, and serves nothing meanwhile."""
        self.closed()
        self._digests, self.moving_to = (), None
        self.span = span
        self._set("joining")

    def serve(self, host: SpanHost, digests: dict[int, str]) -> None:
        """It serves what `host` serves."""
        self.closed()
        self.span = host.model.span
        self.host, self._port = host, host.port
        self._digests = tuple(bytes.fromhex(digests[block]) for block in sorted(digests))
        self._template = replace(
            self._template,
            dtype=dtype_name(host.model.dtype),
            quantization=host.model.quantization,
            device=device.mark(host.model.device),
        )
        self.resume()

    def closed(self) -> None:
        """Nothing is served for a moment, and nobody here refers to what was."""
        if self.host is not None:
            self._served_before += self.host.meter.tokens
        self.host = None

    def resume(self) -> None:
        """It takes sessions, and stays where it is."""
        self.moving_to = None
        self._set("online")

    def drain(self) -> None:
        """It takes no new sessions."""
        self._set("draining")

    def leave(self) -> None:
        """As `drain`, for good."""
        self.leaving = True
        self.moving_to = None
        self._set("draining")

    def _set(self, state: State) -> None:
        self.state = "draining" if self.leaving else state

    def record(self) -> PeerRecord:
        """The present record; cheap."""
        place = self._place()
        record = replace(
            self._template,
            span=self.span,
            state=self.state,
            moving_to=None if self.leaving else self.moving_to,
            addresses=place.addresses,
            relayed=place.relayed,
            relay_port=place.relay_port,
            relay_places=place.relay_places,
            block_digests=self._digests,
            rtts_ms=self.rtts_ms(),
            tokens_served=self._served_before,
        )
        if self.host is None:
            return record
        host, meter = self.host, self.host.meter
        return replace(
            record,
            unbatched=not host.batches,
            step_ms=meter.step_ms,
            queue_ms=meter.queue_ms(time.monotonic()),
            tokens_per_s=meter.tokens_per_s,
            tokens_served=self._served_before + meter.tokens,
            kv_tokens_left=host.sessions.tokens_left,
            kv_tokens_total=host.budget.tokens_total,
        )

    @property
    def port(self) -> int:
        """At which clients reach it; 0 before it is open."""
        return (self._announce_port or self._port) if self._port else 0

    def _place(self) -> Place:
        """Where clients reach the gRPC port; nowhere before it is open."""
        if not self.port:
            return Place()
        if self.place is not None:
            return self.place(self.port)
        return Place(tuple(address(host, self.port) for host in self._hosts()[:MAX_ADDRESSES]))
