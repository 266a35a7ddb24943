"""What a relay decides without a socket: whose connection it is, who may come, how fast."""

from __future__ import annotations

import contextlib
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peer.bucket import Bucket
from peer.reach.hello import MAX_HELLO_BYTES, HelloReader, server_name
from peer.reach.switchboard import Call, RelayLimits, Switchboard
from protocol.errors import BadMessage, BadRecord, PeerFull, PeerLost, WireError
from protocol.hosts import address, block, connection_of, host_of, is_global, is_loopback, seen_end, seen_host
from protocol.identity import certificate_name
from protocol.relay_frames import MAX_BODY_BYTES, NONCE_BYTES, TOKEN_BYTES, Frame, FrameReader, Kind, proof, proven
from tests.harness import identity
from tests.reach.support import hello_of

NAME = "qmyyqso1c1ym7orwxlyvcrm2emxfktanf8wxmme7dwjhx5n"

HELLO = hello_of(NAME)

# ---------------------------------------------------------------------------- the hello


def test_the_name_is_found_once_the_hello_is_whole() -> None:
    for nbytes in range(len(HELLO)):
        assert server_name(HELLO[:nbytes]) is None
    assert server_name(HELLO) == NAME
    assert server_name(HELLO + b"more") == NAME


@pytest.mark.parametrize("piece", [1, 4, 100, 511])
def test_a_hello_may_be_spread_over_records(piece: int) -> None:
    body = HELLO[5:]
    parts = [body[at : at + piece] for at in range(0, len(body), piece)]
    spread = b"".join(HELLO[:3] + len(part).to_bytes(2) + part for part in parts)
    if len(spread) < MAX_HELLO_BYTES:
        assert server_name(spread) == NAME


def test_a_hello_of_tiny_records_that_comes_byte_by_byte_is_read_once() -> None:
    """It took 2.4 s of the peer's event loop for each such connection, when it was read anew with each byte."""
    message = b"\1\0\x1f\0" + bytes(1400)
    spread = b"".join(HELLO[:3] + b"\0\1" + bytes([byte]) for byte in message)[: MAX_HELLO_BYTES - 1]
    reader, began_s = HelloReader(), time.process_time()
    assert all(reader.name(spread[: arrived + 1]) is None for arrived in range(len(spread)))
    assert time.process_time() - began_s < 0.5


@pytest.mark.parametrize(
    "received",
    [
        b"GET / HTTP/1.1\r\n",
        HELLO[:5] + b"\x02" + HELLO[6:],  # a server's hello
        HELLO[:3] + b"\0\0" + HELLO[5:],
        HELLO[:6] + b"\xff\xff\xff" + HELLO[9:],
        HELLO[:9] + bytes(len(HELLO) - 9),
        HELLO.replace(NAME.encode(), b"\xff" * len(NAME)),
        HELLO[:3] + b"\x40\0" + HELLO[5:6] + b"\0\x20\0" + bytes(MAX_HELLO_BYTES),
    ],
)
def test_what_is_no_hello_is_refused(received: bytes) -> None:
    with pytest.raises(BadMessage):
        server_name(received)


def test_a_hello_without_a_name_is_refused() -> None:
    at = HELLO.index(NAME.encode()) - 9
    assert HELLO[at : at + 2] == b"\0\0", "the extension's kind"
    with pytest.raises(BadMessage, match="names no server"):
        server_name(HELLO[:at] + b"\xff\xfe" + HELLO[at + 2 :])


@given(st.binary(max_size=600) | st.binary(max_size=600).map(lambda tail: HELLO[:50] + tail))
def test_whatever_comes_is_a_name_nothing_or_refused(received: bytes) -> None:
    with contextlib.suppress(BadMessage):
        assert server_name(received) in (None, NAME)


@given(st.integers(0, len(HELLO) - 1), st.integers(0, 255))
def test_a_hello_with_a_wrong_byte(at: int, byte: int) -> None:
    with contextlib.suppress(BadMessage):
        found = server_name(HELLO[:at] + bytes([byte]) + HELLO[at + 1 :])
        assert found is None or len(found) <= 255


# ---------------------------------------------------------------------------- frames


def test_frames_come_out_as_they_went_in_however_they_are_cut() -> None:
    sent = [Frame(Kind.REGISTER), Frame(Kind.WELCOME, b"192.0.2.1"), Frame(Kind.DIAL, bytes(TOKEN_BYTES))]
    raw, rng = b"".join(frame.encode() for frame in sent), random.Random(1)
    for _ in range(20):
        reader, got, at = FrameReader(), [], 0
        while at < len(raw):
            step = rng.randint(1, 9)
            reader.feed(raw[at : at + step])
            got += reader.frames()
            at += step
        assert got == sent and reader.rest == b""


def test_what_follows_a_frame_that_was_taken_is_the_rest() -> None:
    reader = FrameReader()
    reader.feed(Frame(Kind.DATA, bytes(TOKEN_BYTES)).encode() + b"\x16bytes of somebody else")
    assert next(reader.frames()).kind is Kind.DATA
    assert reader.rest == b"\x16bytes of somebody else"


@pytest.mark.parametrize("raw", [b"\0\0\0", b"\x16\0\0", bytes([Kind.DIAL, 0, 3]), bytes([Kind.PROOF, 255, 255])])
def test_what_is_no_frame_is_refused(raw: bytes) -> None:
    reader = FrameReader()
    reader.feed(raw)
    with pytest.raises(BadMessage):
        list(reader.frames())


@given(st.binary(max_size=4 * MAX_BODY_BYTES))
def test_any_bytes_are_frames_or_refused(raw: bytes) -> None:
    reader = FrameReader()
    reader.feed(raw)
    with contextlib.suppress(BadMessage):
        for frame in reader.frames():
            assert len(frame.body) <= MAX_BODY_BYTES and frame.text.isprintable()


def test_a_proof_shows_who_registers_with_whom_and_only_once() -> None:
    me, nonce = identity(0), bytes(NONCE_BYTES)
    shown = proof(me, "the relay", nonce)
    assert proven(shown, "the relay", nonce) == me.peer_id
    with pytest.raises(BadRecord, match="wrong"):
        proven(shown, "another relay", nonce)
    with pytest.raises(BadRecord, match="wrong"):
        proven(shown, "the relay", nonce[:-1] + b"\1")
    with pytest.raises(BadMessage):
        proven(Frame(Kind.PING), "the relay", nonce)


@given(st.binary(max_size=700))
def test_other_bytes_prove_nothing(body: bytes) -> None:
    with pytest.raises(WireError):
        proven(Frame(Kind.PROOF, body), "the relay", bytes(NONCE_BYTES))


# ---------------------------------------------------------------------------- who may come


def test_a_call_is_answered_once_by_whoever_has_the_token() -> None:
    board: Switchboard[str] = Switchboard(RelayLimits())
    assert board.register("a", "line", "block") is None
    token, line = board.call("a", "client", "there")
    assert line == "line" and board.calls == 1
    assert board.answer(bytes(TOKEN_BYTES)) is None
    call = board.answer(token)
    assert call == Call("a", "there", "client")
    assert board.answer(token) is None
    board.hang_up(call)
    assert board.calls == 0
    with pytest.raises(PeerLost):
        board.call("b", "client", "there")


def test_a_peer_that_comes_again_takes_its_own_place() -> None:
    board: Switchboard[str] = Switchboard(RelayLimits(providers=1))
    board.register("a", "old", "block")
    with pytest.raises(PeerFull):
        board.register("b", "line", "elsewhere")
    assert board.register("a", "new", "block") == "old"
    board.unregister("a", "old")
    assert board.call("a", "client", "there")[1] == "new"
    board.unregister("a", "new")
    assert board.places_left == 1


def test_nobody_takes_all_places() -> None:
    board: Switchboard[str] = Switchboard(
        RelayLimits(providers_per_block=2, calls=4, calls_per_provider=3, waiting_per_provider=2)
    )
    for name in ("a", "b"):
        board.register(name, name, "block")
    with pytest.raises(PeerFull):
        board.register("c", "c", "block")
    board.register("c", "c", "elsewhere")
    tokens = [board.call("a", "client", "there")[0] for _ in range(2)]
    with pytest.raises(PeerFull):
        board.call("a", "one more waits", "there")
    for token in tokens:
        assert board.answer(token)
    third = board.answer(board.call("a", "client", "there")[0])
    assert third is not None
    with pytest.raises(PeerFull):
        board.call("a", "one more is served", "there")
    board.call("b", "client", "there")
    with pytest.raises(PeerFull):
        board.call("b", "one more in all", "there")
    board.hang_up(third)
    board.call("b", "client", "there")


def test_callers_of_one_block_do_not_take_all_of_a_peer() -> None:
    board: Switchboard[str] = Switchboard(RelayLimits(calls_per_block=1))
    board.register("a", "line", "block")
    board.call("a", "client", "there")
    with pytest.raises(PeerFull):
        board.call("a", "another", "there")
    board.call("a", "another", "elsewhere")


def test_those_who_want_the_relays_own_peer_count_too() -> None:
    board: Switchboard[str] = Switchboard(RelayLimits(calls=2, calls_per_block=1))
    call = board.call_self("me", "client", "there")
    with pytest.raises(PeerFull):
        board.call_self("me", "another", "there")
    board.register("a", "line", "block")
    board.call("a", "client", "elsewhere")
    with pytest.raises(PeerFull):
        board.call_self("me", "one more in all", "far away")
    board.hang_up(call)
    assert board.calls == 1
    board.call_self("me", "one more in all", "far away")


def test_strangers_of_one_block_do_not_keep_out_others() -> None:
    board: Switchboard[str] = Switchboard(RelayLimits(strangers=3, strangers_per_block=2))
    assert board.greet("here") and board.greet("here") and not board.greet("here")
    assert board.greet("there") and not board.greet("elsewhere")
    board.leave("here")
    assert board.greet("elsewhere")


# ---------------------------------------------------------------------------- how fast


def test_a_bucket_lets_through_its_rate_and_a_burst() -> None:
    bucket, now_s, carried = Bucket(1e6, 2e5), 0.0, 0
    while now_s < 10.0:
        carried += 65536
        now_s += bucket.take(65536, now_s)
    assert carried == pytest.approx(10e6 + 2e5, rel=0.02)


def test_small_messages_do_not_wait_for_a_bucket_that_is_not_empty() -> None:
    bucket = Bucket(1e6, 2e5)
    assert bucket.take(100_000, 0.0) == 0.0
    assert bucket.take(4096, 0.0) == 0.0
    assert bucket.take(1_000_000, 0.0) == pytest.approx(0.904, abs=0.001)
    assert bucket.take(0, -5.0) == pytest.approx(0.904, abs=0.001), "a clock that goes back fills nothing"


# ---------------------------------------------------------------------------- hosts


def test_hosts() -> None:
    assert address("2001:db8::1", 5) == "[2001:db8::1]:5" and host_of("[2001:db8::1]:5") == "2001:db8::1"
    assert address("h", 5) == "h:5" and host_of("h:5") == "h"
    assert block("45.77.3.9") == block("45.77.3.200") == block("::ffff:45.77.3.1") != block("45.77.4.9")
    assert block("2001:db8:1:2::1") == block("2001:db8:1:3::1") and block("name") == "name"
    assert is_global("45.77.3.9") and is_global("name") and not is_global("192.168.1.1") and not is_global("::1")
    assert is_loopback("127.0.0.1") and is_loopback("::1") and is_loopback("localhost") and not is_loopback("10.0.0.1")


def test_where_calls_come_from() -> None:
    assert seen_end("ipv4:192.0.2.1:50000") == ("192.0.2.1", 50000)
    for end in (("192.0.2.1", 50000), ("2001:db8::1", 443)):
        assert seen_end(connection_of(*end)) == end
    assert seen_host("ipv6:%5B2001:db8::1%5D:443") == "2001:db8::1"
    assert seen_host("ipv6:[::ffff:192.0.2.1]:443") == "192.0.2.1"
    assert seen_host("unix:/tmp/x") is None and seen_host("ipv4:nonsense:1") is None


def test_a_name_in_a_hello_is_a_certificates() -> None:
    name = certificate_name(identity(0).peer_id)
    assert server_name(hello_of(name)) == name
