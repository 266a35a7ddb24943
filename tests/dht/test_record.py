"""Records: what is written is read; whatever else arrives is a BadRecord and nothing worse."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dht import record as module
from dht.envelope import CONTEXT, FORMAT, MAX_RAW_BYTES, seal, unpack, unseal
from dht.record import (
    MAX_BLOCKS,
    MODELS_KEY,
    STATES,
    ModelRecord,
    PeerRecord,
    peer_key,
    peer_keys,
    shard_of,
)
from protocol.errors import BadRecord
from protocol.span import Span
from tests.dht.support import MODEL, NOW, OTHER_MODEL, identity, listing, peer

RAW = peer().encode(identity(0))


def read(raw: object, now: float = NOW) -> PeerRecord:
    return PeerRecord.decode(raw, now=now)


def payload_of(raw: bytes) -> dict[str, Any]:
    values = unpack(unseal(raw).payload)
    assert isinstance(values, dict)
    return values


def sealed(values: object, index: int = 0, **place: Any) -> bytes:
    """A rightly signed record with any payload."""
    where = {"kind": "peer", "key": peer_key(MODEL, 0), "sequence": 1, "expires_at": NOW + 60, **place}
    return seal(identity(index), payload=msgpack.packb(values), **where)


def altered(**values: Any) -> bytes:
    return sealed({**payload_of(RAW), **values})


@given(
    st.sampled_from(STATES),
    st.integers(1, MAX_BLOCKS).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n - 1))),
    st.none() | st.floats(0, 1e6),
    st.integers(0, 2**40),
    st.text(max_size=module.MAX_NAME_CHARS).filter(str.isprintable),
)
def test_what_is_written_is_read(
    state: module.State, blocks: tuple[int, int], number: float | None, tokens: int, name: str
) -> None:
    record = peer(
        n_blocks=blocks[0],
        span=f"{blocks[1]}:{blocks[0]}",
        state=state,
        step_ms=number,
        tokens_per_s=number,
        kv_tokens_left=tokens,
        kv_tokens_total=2 * tokens,
        public_name=name,
        contact=name,
        tokens_served=None if number is None else tokens,
        queue_ms=number,
        moving_to=None if number is None else Span(0, blocks[0]),
        pinned=number is None,
        unbatched=number is None,
    )
    assert read(record.encode(identity(0))) == record


def test_a_record_of_older_software_is_read() -> None:
    """It says neither a contact, nor what was served, nor on which device."""
    values = payload_of(peer(contact="zoe@example.org", tokens_served=7, device="0f3c").encode(identity(0)))
    del values["contact"], values["tokens_served"], values["device"]
    found = read(sealed(values))
    assert (found.contact, found.tokens_served, found.device) == ("", None, "")


def test_a_large_honest_record_fits() -> None:
    record = peer(
        span="0:126",
        n_blocks=126,
        block_digests=tuple(bytes([block] * 16) for block in range(126)),
        maddrs=tuple(f"/ip4/203.0.113.{index}/tcp/4201/p2p/{'Q' * 46}" for index in range(4)),
        quantization="int8",
        device="0f3c",
        codecs=("none", "fp16", "bf16", "int8", "blockwise8"),
    )
    raw = record.encode(identity(0))
    assert read(raw) == record
    assert len(raw) < MAX_RAW_BYTES * 3 / 4


def test_a_listing_is_read() -> None:
    assert ModelRecord.decode(listing().encode(identity(0)), now=NOW) == listing()


def test_a_peer_signs_for_itself_only() -> None:
    with pytest.raises(ValueError):
        peer(0).encode(identity(1))
    with pytest.raises(ValueError):
        listing(0).encode(identity(1))


@pytest.mark.parametrize(
    "record",
    [
        peer(addresses=("no port",)),
        peer(addresses=("127.0.0.1:70000",)),
        peer(addresses=("unix:/tmp/x:1",)),
        peer(addresses=("127.0.0.1:0",)),
        peer(addresses=("[zz]:1",)),
        peer(addresses=("a..b:1",)),
        peer(addresses=("x" * 64 + ":1",)),
        peer(addresses=("xn--\N{SNOWMAN}:1",)),
        peer(addresses=("127.0.0.1:\N{ARABIC-INDIC DIGIT ONE}",)),
        peer(addresses=tuple(f"h{n}:1" for n in range(9))),
        peer(span="0:25"),
        peer(n_blocks=0),
        peer(n_blocks=5000, span="0:1"),
        peer(state="sleeping"),  # type: ignore[arg-type]
        peer(step_ms=math.nan),
        peer(step_ms=math.inf),
        peer(step_ms=-1.0),
        peer(tokens_per_s=1e30),
        peer(queue_ms=-1.0),
        peer(rtts_ms=tuple((f"Qm{i}", 1.0) for i in range(9))),
        peer(rtts_ms=(("Qm 1", 1.0),)),
        peer(rtts_ms=(("Qm1", float("nan")),)),
        peer(moving_to=Span(0, 10**6)),
        peer(pinned=1),
        peer(unbatched=1),
        peer(kv_tokens_left=-1),
        peer(kv_tokens_left=5000),
        peer(kv_tokens_total=2**60, kv_tokens_left=0),
        peer(public_name="x" * 1000),
        peer(contact="x" * 1000),
        peer(contact="\N{RIGHT-TO-LEFT OVERRIDE}gro.elpmaxe@eoz"),
        peer(tokens_served=-1),
        peer(tokens_served=2**60),
        peer(tokens_served="many"),  # type: ignore[arg-type]
        peer(public_name="\x1b[31mred"),
        peer(public_name="two\nlines"),
        peer(codecs=("a b",)),
        peer(codecs=tuple("c" * 17)),
        peer(dtype="float32; rm"),
        peer(block_digests=(b"1",)),
        peer(block_digests=tuple(b"x" * 33 for _ in range(24))),
        peer(fingerprint=""),
        peer(fingerprint="a/b"),
        peer(fingerprint="x" * 65),
        peer(started_at=math.inf),
        peer(started_at=-1.0),
        peer(maddrs=("x" * 201,)),
        peer(wire_version=-1),
        replace(peer(), certificate_der=b""),
        replace(peer(), certificate_der=identity(1).certificate_der),
        peer(span="0:300", n_blocks=300, block_digests=tuple(b"x" * 32 for _ in range(300))),  # too large altogether
    ],
    ids=lambda record: None,
)
def test_what_readers_would_refuse_is_not_written(record: PeerRecord) -> None:
    with pytest.raises(BadRecord):
        record.encode(identity(0))


@pytest.mark.parametrize(
    "record",
    [
        listing(n_blocks=0),
        listing(cuts=(0,)),
        listing(cuts=(24,)),
        listing(cuts=(8, 4)),
        listing(cuts=(4, 4)),
        listing(shards=3),
        listing(shards=128),
        listing(shards=0),
        listing(name="x" * 200),
        listing(fingerprint="models"),
    ],
    ids=lambda record: None,
)
def test_what_readers_would_refuse_is_not_listed(record: ModelRecord) -> None:
    with pytest.raises(BadRecord):
        record.encode(identity(0))


def test_an_expired_record_is_refused() -> None:
    assert read(RAW, NOW + 59.9)
    with pytest.raises(BadRecord, match="expired"):
        read(RAW, NOW + 60)


def test_a_record_that_would_live_too_long_is_refused() -> None:
    assert read(peer(expires_at=NOW + 90).encode(identity(0)))
    with pytest.raises(BadRecord, match="longer"):
        read(peer(expires_at=NOW + 91).encode(identity(0)))


def test_a_record_counts_under_its_own_key_only() -> None:
    assert PeerRecord.decode(RAW, now=NOW, key=peer_key(MODEL, 0))
    with pytest.raises(BadRecord, match="key"):
        PeerRecord.decode(RAW, now=NOW, key=peer_key(OTHER_MODEL, 0))
    for key in (
        peer_key(OTHER_MODEL, 0),
        f"potluck/1/{MODEL}/",
        f"potluck/1/{MODEL}/64",
        f"potluck/1/{MODEL}/00",
        MODELS_KEY,
    ):
        with pytest.raises(BadRecord, match="key"):
            read(sealed(payload_of(RAW), key=key))


def test_kinds_are_not_mixed_up() -> None:
    with pytest.raises(BadRecord):
        ModelRecord.decode(RAW, now=NOW)
    with pytest.raises(BadRecord):
        read(listing().encode(identity(0)))


def test_another_peers_payload_is_refused() -> None:
    with pytest.raises(BadRecord, match="another peer"):
        read(sealed(payload_of(RAW), index=1))


def test_a_forged_signature_is_refused() -> None:
    statement, public_key, signature = msgpack.unpackb(RAW)
    mine = msgpack.unpackb(peer(1).encode(identity(1)))
    for forged in (
        [statement, mine[1], signature],
        [statement, public_key, mine[2]],
        [mine[0], public_key, signature],
        [statement, public_key, identity(0).sign(b"another context", statement)],
    ):
        with pytest.raises(BadRecord):
            read(msgpack.packb(forged))


def test_unknown_fields_are_left_alone() -> None:
    assert read(altered(from_the_future={"x": [1]})) == read(RAW)


def test_another_format_is_refused() -> None:
    statement = msgpack.packb([FORMAT + 1, "peer", peer_key(MODEL, 0), 1, NOW + 60, b""])
    who = identity(0)
    with pytest.raises(BadRecord, match="format"):
        unseal(msgpack.packb([statement, who.public_key_der, who.sign(CONTEXT, statement)]))


def test_an_oversized_record_is_refused_unread() -> None:
    with pytest.raises(BadRecord, match="larger"):
        read(b"\x00" * (MAX_RAW_BYTES + 1))
    with pytest.raises(BadRecord, match="larger"):
        sealed({"x": "y" * MAX_RAW_BYTES})


@given(st.data())
def test_mutated_bytes_are_a_bad_record(data: st.DataObject) -> None:
    raw = bytearray(RAW)
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(raw)))
        match data.draw(st.sampled_from(["flip", "insert", "delete", "cut"])):
            case "flip" if position < len(raw):
                raw[position] ^= data.draw(st.integers(1, 255))
            case "insert":
                raw[position:position] = data.draw(st.binary(min_size=1, max_size=9))
            case "delete":
                del raw[position : position + data.draw(st.integers(1, 9))]
            case "cut":
                del raw[position:]
    if bytes(raw) != RAW:
        with pytest.raises(BadRecord):
            read(bytes(raw))


@given(st.binary(max_size=300) | st.text() | st.integers() | st.none())
def test_any_bytes_are_a_bad_record(raw: object) -> None:
    with pytest.raises(BadRecord):
        read(raw)


def test_deep_nesting_is_a_bad_record() -> None:
    with pytest.raises(BadRecord):
        read(b"\x91" * 5000 + b"\xc0")


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=50)
    | st.binary(max_size=50),
    lambda inner: (
        st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=8) | st.integers(0, 9), inner, max_size=4)
    ),
    max_leaves=10,
)


@given(st.sampled_from(sorted(payload_of(RAW))), ANYTHING, st.booleans())
def test_a_signed_payload_with_any_field_is_a_record_or_a_bad_one(name: str, value: object, missing: bool) -> None:
    values = {**payload_of(RAW), name: value}
    if missing:
        del values[name]
    _record_or_bad(lambda: module._peer_from_payload(msgpack.packb(values), identity(0).peer_id, 1, NOW + 60))


@given(ANYTHING)
def test_any_signed_payload_is_a_record_or_a_bad_one(value: object) -> None:
    packed = msgpack.packb(value)
    _record_or_bad(lambda: module._peer_from_payload(packed, identity(0).peer_id, 1, NOW + 60))
    _record_or_bad(lambda: module._model_from_payload(packed, identity(0).peer_id, 1, NOW + 60))


@given(ANYTHING)
def test_any_signed_statement_is_an_envelope_or_a_bad_record(value: object) -> None:
    statement, who = msgpack.packb(value), identity(0)
    _record_or_bad(lambda: unseal(msgpack.packb([statement, who.public_key_der, who.sign(CONTEXT, statement)])))


def _record_or_bad(read: Callable[[], object]) -> None:
    """Nothing but a BadRecord is raised, and what is read can be written again."""
    try:
        record = read()
    except BadRecord:
        return
    if isinstance(record, PeerRecord):
        assert len(record.span) <= record.n_blocks <= MAX_BLOCKS
        assert record.encode(identity(0))


def test_shards_spread_peers_evenly() -> None:
    counts = [0] * 8
    for index in range(4000):
        counts[shard_of(f"Qm{index}", 8)] += 1
    assert min(counts) > 400
    assert peer(0).key(1) == peer_key(MODEL, 0)
    assert peer(0).key(8) in peer_keys(MODEL, 8)


def test_spans_of_records_are_spans() -> None:
    assert read(RAW).span == Span(0, 24)


def test_reading_records_needs_neither_torch_nor_hivemind() -> None:
    script = (
        "import sys, dht.record, dht.view, dht.announcer, dht.locate, dht.cli\n"
        "sys.exit(bool({'torch', 'hivemind'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], timeout=60, check=False).returncode == 0
