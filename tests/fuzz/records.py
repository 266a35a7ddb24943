"""What strangers put into the DHT: sealed records, their payloads, certificates and addresses, and what nodes store.

Allowed: `BadRecord`. Signatures cannot be guessed, so payloads are also tried as if theirs were right. Whatever is
taken for a record can be written again and shown, and the view that it makes answers all questions.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import replace
from functools import cache

import msgpack

from dht.envelope import Envelope, unseal
from dht.fields import check_address
from dht.kademlia import DHTID, DHTRecord
from dht.maddr import Maddr, best_first
from dht.record import MODELS_KEY, ModelRecord, PeerRecord, _peer_from_payload, _peer_payload, peer_key
from dht.validator import PotluckValidator, Verifier
from dht.view import Findings, make_view, merge, sift
from protocol.errors import BadRecord
from protocol.identity import Identity, _new_certificate, common_name, load_certificate
from protocol.span import Span
from tests.fuzz.source import Source
from tests.fuzz.target import Target

NOW = 1_800_000_000.0
SIGNER = "QmYyQSo1c1Ym7orWxLYvCrM2EmxFTANf8wXmmE7DWjhx5N"
FINGERPRINT = "f" * 32
KEY = peer_key(FINGERPRINT, 0)


def run(data: bytes) -> None:
    """One thing from the DHT: its kind by the first byte."""
    if not data:
        return
    kinds = (_sealed, _peer, _model, _certificate, _address, _stored)
    try:
        kinds[data[0] % len(kinds)](data[1:])
    except BadRecord as error:
        assert error.message.isprintable() and len(error.message) < 200  # readers count by it


def _sealed(data: bytes) -> None:
    """As another node hands it over: the same by all ways."""
    verifier = Verifier()
    found = sift({KEY: {SIGNER: data}, MODELS_KEY: {SIGNER: data}}, verifier, NOW)
    try:
        envelope = unseal(data)
    except BadRecord:
        assert not found.peers and not found.models
        raise
    assert verifier.unseal(data) == envelope


def _envelope(kind: str, key: str, payload: bytes) -> Envelope:
    return Envelope(SIGNER, kind, key, 5, NOW + 60, payload)


def _peer(payload: bytes) -> None:
    record = PeerRecord.from_envelope(_envelope("peer", KEY, payload), now=NOW, key=KEY)
    again = msgpack.packb(_peer_payload(record))
    assert _peer_from_payload(again, SIGNER, record.sequence, record.expires_at) == record
    listing = ModelRecord(SIGNER, "m", record.fingerprint, record.n_blocks, sequence=1, expires_at=NOW + 9)
    newer = replace(record, sequence=record.sequence + 1, state="offline")
    known = merge(Findings(), Findings({SIGNER: record}, {SIGNER: listing}), NOW)
    view = make_view(known, NOW)
    assert len(view.peers(FINGERPRINT)) == (record.state != "offline")
    view.missing(FINGERPRINT)
    assert len(view.coverage(FINGERPRINT)) in (0, record.n_blocks)
    left = merge(merge(known, Findings({SIGNER: newer}), NOW), Findings({SIGNER: record}), NOW)
    assert not make_view(left, NOW).peers(FINGERPRINT), "a tombstone was undone"


def _model(payload: bytes) -> None:
    record = ModelRecord.from_envelope(_envelope("model", MODELS_KEY, payload), now=NOW)
    assert record.name.isprintable() and 1 <= record.shards <= 64
    make_view(Findings({}, {SIGNER: record}), NOW)


def _certificate(data: bytes) -> None:
    common_name(load_certificate(data))


def _address(data: bytes) -> None:
    text = data.decode(errors="replace")
    maddr = Maddr.parse(text)
    if maddr is not None:
        assert Maddr.parse(str(maddr)) == maddr
        assert best_first([text, text])
    address = check_address(text)
    assert address.isascii() and address.isprintable()


def _stored(data: bytes) -> None:
    """What a node is asked to store."""
    source = Source(data)
    refused: Counter[str] = Counter()
    validator = PotluckValidator(Verifier(), lambda: NOW, refused)
    subkey = msgpack.packb(SIGNER) if source.flag() else source.raw(source.byte())
    key = DHTID.generate(source=KEY).to_bytes()
    expires_at = float(NOW + source.number())
    record = DHTRecord(key, subkey, source.rest(), expires_at)
    assert validator.validate(record) is False
    assert sum(refused.values()) == 1


@cache
def _certificate_der() -> bytes:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    _, pem = _new_certificate(SIGNER)
    return x509.load_pem_x509_certificate(pem).public_bytes(Encoding.DER)


def seeds() -> list[bytes]:
    """Right records of all kinds."""
    peer = PeerRecord(
        SIGNER,
        FINGERPRINT,
        4,
        Span(0, 2),
        "online",
        ("192.0.2.7:31331", "[2001:db8::7]:31331"),
        _certificate_der(),
        maddrs=(f"/ip4/192.0.2.7/tcp/31330/p2p/{SIGNER}",),
        block_digests=(hashlib.sha256(b"0").digest(), hashlib.sha256(b"1").digest()),
        step_ms=1.5,
        rtts_ms=(("QmOther", 3.0),),
        moving_to=Span(2, 4),
        codecs=("int8", "none"),
        dtype="float32",
        public_name="a name",
        sequence=5,
        expires_at=NOW + 60,
    )
    model = {"name": "m", "fingerprint": FINGERPRINT, "n_blocks": 4, "cuts": [1, 2], "shards": 2}
    identity = Identity.ephemeral()
    own = replace(peer, peer_id=identity.peer_id, certificate_der=identity.certificate_der)
    return [
        b"\0" + own.encode(identity),
        b"\1" + msgpack.packb(_peer_payload(peer)),
        b"\2" + msgpack.packb(model),
        b"\3" + _certificate_der(),
        b"\4" + peer.maddrs[0].encode(),
        b"\4[2001:db8::7]:31331",
        b"\5\1\0" + msgpack.packb(own.encode(identity)),
    ]


TARGET = Target(
    "records",
    run,
    seeds,
    modules=("dht.envelope", "dht.fields", "dht.record", "dht.validator", "dht.maddr"),
    short=2500,
)
