"""What peers publish: `PeerRecord` (who serves which span of a model, and how) and `ModelRecord` (that a model exists).

    potluck/1/<model fingerprint>/<shard>   subkey = peer id   PeerRecord
    potluck/1/models                        subkey = peer id   ModelRecord

The span is inside the value: one key per model and shard, not one per block, costs ~50 times less traffic (transport.md
section 5). A listing of a model counts only while its signer also serves that model (see `dht.view`), so that nobody
can fill the list with names. Pure: nothing here knows a clock or a network.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import msgpack

from dht.envelope import Envelope, check_expiry, seal, unpack, unseal
from dht.fields import Fields
from protocol.errors import BadRecord
from protocol.identity import certificate_name, common_name, load_certificate
from protocol.limits import MAX_PEER_ID_CHARS, WIRE_VERSION
from protocol.span import Span

if TYPE_CHECKING:
    from protocol.identity import Identity

State = Literal["joining", "online", "draining", "offline"]
STATES: tuple[State, ...] = ("joining", "online", "draining", "offline")
"""`offline` is the tombstone of a peer that left: it hides the record that other nodes still hold until it expires."""

MODELS_KEY = "potluck/1/models"
MAX_BLOCKS = 4096
MAX_SHARDS = 64
MAX_ADDRESSES = 8
MAX_MADDR_CHARS = 200
MAX_NAME_CHARS = 120
MAX_FINGERPRINT_CHARS = 64
MAX_LABEL_CHARS = 40
MAX_CODECS = 16
MAX_DIGEST_BYTES = 32
MAX_CERTIFICATE_BYTES = 1024
MAX_KV_TOKENS = 2**48
MAX_TOKENS_SERVED = 2**53
MAX_STEP_MS = 3.6e6
MAX_TOKENS_PER_S = 1e9
MAX_TIME_S = 1e11
"""Around the year 5138: only there to keep arithmetic on times finite."""
MAX_WIRE_VERSION = 1 << 16
MAX_RELAY_PLACES = 1 << 16
MAX_RTTS = 8
MAX_RTT_MS = 6e4


@dataclass(frozen=True)
class PeerRecord:
    """What one peer says about itself. `sequence` and `expires_at` are set by whoever announces it.

    Attributes:
        fingerprint: digest of the model (design section 5).
        n_blocks: blocks of the whole model.
        addresses: where its gRPC server is reached, `host:port` or `[v6]:port`, best first.
        relayed: so many of them, the last ones, are relays': who dials there reaches this peer through another one.
        maddrs: where its DHT node listens, so that readers can come back without a bootstrap node.
        certificate_der: its TLS certificate, to which channels are pinned.
        block_digests: digests of the weights that it loaded, one for each block of the span in order; or empty.
        step_ms: milliseconds for one token through the whole span; None: not measured yet.
        queue_ms: milliseconds that a step lately waited before it was computed; None: not measured yet.
        tokens_per_s: throughput of its whole span over all sessions; None: not measured yet.
        rtts_ms: round-trip times to likely next peers, (peer id, milliseconds), nearest first.
        moving_to: the span that it will serve next, while it gives up its present one (a claim, so that no two peers
            fill the same gap); None: it stays.
        pinned: its user named the blocks, so that it never moves.
        unbatched: it computes sessions one by one, since its model does not batch, or it was told so.
        device: says of peers where it is the same that they share a processor, and nothing else; empty: not said.
        relay_port: where it relays for peers that nobody can dial, at the hosts of its own addresses; 0: it does not.
        relay_places: how many more of them it takes.
        kv_tokens_left, kv_tokens_total: free and declared room for cached tokens.
        tokens_served: tokens that it has computed for others since it started, through whatever span; None: it does not
            say.
        public_name, contact: what its operator wants to be called, and how to be reached: shown on health pages.
        started_at: seconds since 1970.
        sequence: nanosecond of issue, growing.
        expires_at: seconds since 1970.
    """

    peer_id: str
    fingerprint: str
    n_blocks: int
    span: Span
    state: State
    addresses: tuple[str, ...]
    certificate_der: bytes
    relayed: int = 0
    relay_port: int = 0
    relay_places: int = 0
    maddrs: tuple[str, ...] = ()
    block_digests: tuple[bytes, ...] = ()
    step_ms: float | None = None
    queue_ms: float | None = None
    tokens_per_s: float | None = None
    rtts_ms: tuple[tuple[str, float], ...] = ()
    moving_to: Span | None = None
    pinned: bool = False
    unbatched: bool = False
    kv_tokens_left: int = 0
    kv_tokens_total: int = 0
    tokens_served: int | None = None
    codecs: tuple[str, ...] = ()
    dtype: str = ""
    quantization: str = ""
    device: str = ""
    software: str = ""
    wire_version: int = WIRE_VERSION
    public_name: str = ""
    contact: str = ""
    started_at: float = 0.0
    sequence: int = 0
    expires_at: float = 0.0

    @property
    def direct(self) -> tuple[str, ...]:
        """Those of the addresses that lead to it without a relay."""
        return self.addresses[: len(self.addresses) - self.relayed]

    @property
    def relays(self) -> tuple[str, ...]:
        """Those that are relays'."""
        return self.addresses[len(self.addresses) - self.relayed :]

    def key(self, shards: int) -> str:
        """The DHT key that holds this record when its model has `shards` shards."""
        return peer_key(self.fingerprint, shard_of(self.peer_id, shards))

    def encode(self, identity: Identity, shards: int = 1) -> bytes:
        """The signed record, as `decode` reads it. About 1 ms.

        Raises:
            BadRecord: readers would refuse it.
            ValueError: `identity` is another peer's.
        """
        if identity.peer_id != self.peer_id:
            raise ValueError("a peer signs only its own record")
        payload = msgpack.packb(_peer_payload(self))
        _peer_from_payload(payload, self.peer_id, self.sequence, self.expires_at)
        return seal(
            identity,
            kind="peer",
            key=self.key(shards),
            sequence=self.sequence,
            expires_at=self.expires_at,
            payload=payload,
        )

    @classmethod
    def decode(cls, raw: object, *, now: float, key: str | None = None) -> PeerRecord:
        """Verify and read a record that was found in the DHT, under `key` where that is known.

        Raises:
            BadRecord: it is forged, expired, malformed, of another kind, or found under a key that it does not name.
        """
        return cls.from_envelope(unseal(raw), now=now, key=key)

    @classmethod
    def from_envelope(cls, envelope: Envelope, *, now: float, key: str | None = None) -> PeerRecord:
        """As `decode`, for an envelope whose signature was checked before."""
        _check_place(envelope, "peer", key, now)
        record = _peer_from_payload(envelope.payload, envelope.signer, envelope.sequence, envelope.expires_at)
        prefix = f"{_PREFIX}/{record.fingerprint}/"
        if not envelope.key.startswith(prefix) or not _is_shard(envelope.key.removeprefix(prefix)):
            raise BadRecord("the record lies under another model's key")
        return record


@dataclass(frozen=True)
class ModelRecord:
    """That a model is served, as one of its peers says.

    Attributes:
        name: what people call it: a hub id, a folder's name, `potluck-demo`.
        cuts: blocks before which the model may be cut, 0 and n_blocks left out; empty: anywhere.
        shards: over how many keys its peers' records are spread, a power of two.
    """

    signer: str
    name: str
    fingerprint: str
    n_blocks: int
    cuts: tuple[int, ...] = ()
    shards: int = 1
    sequence: int = 0
    expires_at: float = 0.0

    def encode(self, identity: Identity) -> bytes:
        """The signed record, as `decode` reads it.

        Raises:
            BadRecord: readers would refuse it.
            ValueError: `identity` is another peer's.
        """
        if identity.peer_id != self.signer:
            raise ValueError("a peer signs only its own record")
        payload = msgpack.packb(
            {
                "name": self.name,
                "fingerprint": self.fingerprint,
                "n_blocks": self.n_blocks,
                "cuts": list(self.cuts),
                "shards": self.shards,
            }
        )
        _model_from_payload(payload, self.signer, self.sequence, self.expires_at)
        return seal(
            identity,
            kind="model",
            key=MODELS_KEY,
            sequence=self.sequence,
            expires_at=self.expires_at,
            payload=payload,
        )

    @classmethod
    def decode(cls, raw: object, *, now: float) -> ModelRecord:
        """Verify and read a listing.

        Raises:
            BadRecord: it is forged, expired, malformed or of another kind.
        """
        return cls.from_envelope(unseal(raw), now=now)

    @classmethod
    def from_envelope(cls, envelope: Envelope, *, now: float) -> ModelRecord:
        """As `decode`, for an envelope whose signature was checked before."""
        _check_place(envelope, "model", MODELS_KEY, now)
        return _model_from_payload(envelope.payload, envelope.signer, envelope.sequence, envelope.expires_at)


_PREFIX = "potluck/1"


def peer_key(fingerprint: str, shard: int) -> str:
    """The DHT key of one shard of a model's peers."""
    return f"{_PREFIX}/{fingerprint}/{shard}"


def peer_keys(fingerprint: str, shards: int) -> tuple[str, ...]:
    """The DHT keys of all shards of a model's peers."""
    return tuple(peer_key(fingerprint, shard) for shard in range(shards))


def shard_of(peer_id: str, shards: int) -> int:
    """The shard of `shards` (a power of two) that holds a peer's record."""
    return hashlib.sha256(peer_id.encode()).digest()[0] % shards


def _is_shard(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 2 and int(text) < MAX_SHARDS and str(int(text)) == text


def _check_place(envelope: Envelope, kind: str, key: str | None, now: float) -> None:
    if envelope.kind != kind:
        raise BadRecord(f"the record is not a {kind}'s")
    if key is not None and envelope.key != key:
        raise BadRecord("the record lies under another key than it names")
    check_expiry(envelope.expires_at, now)


def _peer_payload(record: PeerRecord) -> dict[str, Any]:
    return {
        "fingerprint": record.fingerprint,
        "n_blocks": record.n_blocks,
        "start": record.span.start,
        "stop": record.span.stop,
        "state": record.state,
        "addresses": list(record.addresses),
        "relayed": record.relayed,
        "relay_port": record.relay_port,
        "relay_places": record.relay_places,
        "maddrs": list(record.maddrs),
        "certificate": record.certificate_der,
        "digests": list(record.block_digests),
        "step_ms": record.step_ms,
        "queue_ms": record.queue_ms,
        "tokens_per_s": record.tokens_per_s,
        "rtts_ms": dict(record.rtts_ms),
        "moving_to": [] if record.moving_to is None else [record.moving_to.start, record.moving_to.stop],
        "pinned": record.pinned,
        "unbatched": record.unbatched,
        "kv_left": record.kv_tokens_left,
        "kv_total": record.kv_tokens_total,
        "tokens_served": record.tokens_served,
        "codecs": list(record.codecs),
        "dtype": record.dtype,
        "quantization": record.quantization,
        "device": record.device,
        "software": record.software,
        "wire": record.wire_version,
        "public_name": record.public_name,
        "contact": record.contact,
        "started_at": record.started_at,
    }


def _peer_from_payload(payload: bytes, signer: str, sequence: int, expires_at: float) -> PeerRecord:
    fields = Fields(unpack(payload))
    n_blocks = fields.whole("n_blocks", 1, MAX_BLOCKS)
    start = fields.whole("start", 0, n_blocks - 1)
    span = Span(start, fields.whole("stop", start + 1, n_blocks))
    digests = fields.raws("digests", len(span), MAX_DIGEST_BYTES)
    if len(digests) not in (0, len(span)):
        raise BadRecord("digests are neither none nor one for each block")
    kv_total = fields.whole("kv_total", 0, MAX_KV_TOKENS)
    addresses = fields.addresses("addresses", MAX_ADDRESSES)
    certificate = fields.raw("certificate", MAX_CERTIFICATE_BYTES)
    if common_name(load_certificate(certificate)) != certificate_name(signer):
        raise BadRecord("the certificate names another peer")
    return PeerRecord(
        peer_id=signer,
        fingerprint=_fingerprint(fields),
        n_blocks=n_blocks,
        span=span,
        state=cast("State", fields.one_of("state", STATES)),
        addresses=addresses,
        certificate_der=certificate,
        relayed=_whole_or_zero(fields, "relayed", len(addresses)),
        relay_port=_whole_or_zero(fields, "relay_port", 65535),
        relay_places=_whole_or_zero(fields, "relay_places", MAX_RELAY_PLACES),
        maddrs=fields.tokens("maddrs", MAX_ADDRESSES, MAX_MADDR_CHARS),
        block_digests=digests,
        step_ms=fields.number_or_none("step_ms", 0, MAX_STEP_MS),
        queue_ms=fields.number_or_none("queue_ms", 0, MAX_STEP_MS),
        tokens_per_s=fields.number_or_none("tokens_per_s", 0, MAX_TOKENS_PER_S),
        rtts_ms=fields.numbers_by_name("rtts_ms", MAX_RTTS, MAX_PEER_ID_CHARS, MAX_RTT_MS),
        moving_to=_span_or_none(fields, "moving_to", n_blocks),
        pinned=fields.flag("pinned"),
        unbatched=fields.flag("unbatched"),
        kv_tokens_left=fields.whole("kv_left", 0, kv_total),
        kv_tokens_total=kv_total,
        tokens_served=_tokens_served(fields),
        codecs=fields.tokens("codecs", MAX_CODECS, MAX_LABEL_CHARS),
        dtype=fields.token("dtype", MAX_LABEL_CHARS, empty=True),
        quantization=fields.token("quantization", MAX_LABEL_CHARS, empty=True),
        device=fields.token("device", MAX_LABEL_CHARS, empty=True) if "device" in fields else "",
        software=fields.token("software", MAX_LABEL_CHARS, empty=True),
        wire_version=fields.whole("wire", 0, MAX_WIRE_VERSION),
        public_name=fields.text("public_name", MAX_NAME_CHARS),
        contact=fields.text("contact", MAX_NAME_CHARS) if "contact" in fields else "",  # older software has none
        started_at=fields.number("started_at", 0, MAX_TIME_S),
        sequence=sequence,
        expires_at=expires_at,
    )


def _model_from_payload(payload: bytes, signer: str, sequence: int, expires_at: float) -> ModelRecord:
    fields = Fields(unpack(payload))
    n_blocks = fields.whole("n_blocks", 1, MAX_BLOCKS)
    cuts = fields.wholes("cuts", n_blocks, 1, n_blocks - 1)
    if list(cuts) != sorted(set(cuts)):
        raise BadRecord("cuts are not in order")
    shards = fields.whole("shards", 1, MAX_SHARDS)
    if shards & (shards - 1):
        raise BadRecord("shards is not a power of two")
    return ModelRecord(
        signer=signer,
        name=fields.text("name", MAX_NAME_CHARS),
        fingerprint=_fingerprint(fields),
        n_blocks=n_blocks,
        cuts=cuts,
        shards=shards,
        sequence=sequence,
        expires_at=expires_at,
    )


def _tokens_served(fields: Fields) -> int | None:
    number = fields.number_or_none("tokens_served", 0, MAX_TOKENS_SERVED) if "tokens_served" in fields else None
    return None if number is None else int(number)


def _whole_or_zero(fields: Fields, name: str, high: int) -> int:
    """A number that older software does not write."""
    return fields.whole(name, 0, high) if name in fields else 0


def _span_or_none(fields: Fields, name: str, n_blocks: int) -> Span | None:
    edges = fields.wholes(name, 2, 0, n_blocks)
    if not edges:
        return None
    if len(edges) != 2 or edges[0] >= edges[1]:
        raise BadRecord(f"{name} is not a span")
    return Span(*edges)


def _fingerprint(fields: Fields) -> str:
    fingerprint = fields.token("fingerprint", MAX_FINGERPRINT_CHARS)
    if "/" in fingerprint or fingerprint == "models":
        raise BadRecord("fingerprint is not usable in a key")
    return fingerprint
