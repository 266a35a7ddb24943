"""What a hostile relay may do to a peer that is tied to it: say anything, on any of the connections, or nothing.

An input is a little program (`tests.fuzz.programs`) of the far ends of all connections of one tether: the first of them
is the one that the peer keeps, the others are pairs of one to the peer's own port and one to the relay. Allowed: that
the tether is lost, or refused; never that it hangs. What else is asked of it is in `Scene.check` and
`Scene.check_ended`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from functools import lru_cache
from unittest.mock import patch

from peer.reach import tether
from peer.reach.tether import CONNECT_TIMEOUT_S, PING_EVERY_S, SILENT_S, Tether
from protocol.errors import PeerFull, PeerLost
from protocol.identity import Identity
from protocol.relay_frames import NONCE_BYTES, TOKEN_BYTES, Frame, Kind, proof
from protocol.splice import LINGER_S, WRITE_BUFFER_BYTES, End
from tests.fuzz.programs import (
    DIALS,
    EAGER,
    END,
    GONE,
    HANGS,
    OWN,
    REFUSED,
    RESET,
    STALL,
    TAKE,
    TOKEN,
    Play,
    does,
    fills,
    in_a_turn,
    opens,
    passes,
    raw,
    says,
)
from tests.fuzz.relay import frames_of
from tests.fuzz.source import Source
from tests.fuzz.target import Target
from tests.fuzz.wires import READ_BYTES, Clockwork, Wire
from tests.harness import identity

PEER, RELAY = 1, 0
OWN_END, RELAY_ENDS = ("127.0.0.1", 1), (("192.0.2.1", 2), ("2001:db8::1", 2))
MAX_CALLS = 5  # fewer than there may be else, so that they are reached
QUIET_S = SILENT_S + PING_EVERY_S + CONNECT_TIMEOUT_S + LINGER_S
NONCE = bytes(NONCE_BYTES)
ABANDONED, CANCELLED = range(2)
"""How all of it ends: the relay says nothing any more, or the peer does not want the tether any more."""

_loop = Clockwork()


def run(data: bytes) -> None:
    """One tether, from its beginning to its end."""
    _loop.run_until_complete(_play(data))
    escaped, _loop.escaped = _loop.escaped, []
    if escaped:
        raise escaped[0]
    _loop.rewind()


async def _play(data: bytes) -> None:
    with patch.object(tether, "MAX_CALLS", MAX_CALLS), patch.object(tether, "proof", _proof):
        await Scene(Source(data)).play()


class Scene(Play):
    """A tether, and the far ends of its connections."""

    def __init__(self, source: Source) -> None:
        self._ending = source.byte() % 2
        super().__init__(_loop, source)
        self._own_wires: list[Wire] = []
        self._dials_own = 0  # that are under way
        target = lambda: OWN_END if self.is_open else None  # noqa: E731
        self._sought: list[Frame] = []
        self._tether = Tether(identity(PEER), identity(RELAY).peer_id, RELAY_ENDS, target, self._seek)
        self.dials = source.byte() % 4

    async def play(self) -> None:
        """All of it, to its end."""
        running = asyncio.ensure_future(self._tether.run())
        await self.passes(0.0)
        await self.perform()
        if self._ending == CANCELLED:
            running.cancel()
            await self.passes(0.0)
            assert running.done()
        await self.passes(QUIET_S)
        assert running.done(), "it hangs"
        self.check_ended(None if running.cancelled() else running.exception())

    def _seek(self, relay: tuple[str, int], token: bytes) -> None:
        assert relay in RELAY_ENDS and relay[0] == self.wires[0].at[0]
        self._sought.append(Frame(Kind.SOUGHT, token))

    async def dialled(self, host: str, port: int) -> Wire:
        if (host, port) != OWN_END:
            assert (host, port) in RELAY_ENDS
            return await super().dialled(host, port)
        self._dials_own += 1
        try:
            wire = await super().dialled(host, port)
        finally:
            self._dials_own -= 1
        self._own_wires.append(wire)
        return wire

    def phrase(self, kind: int) -> bytes:
        """Many calls at once, each with a token of its own; for `TOKEN` only."""
        if kind != TOKEN:
            return b""
        first, number = self.source.byte(), self.source.byte()
        return b"".join(_dial(each).encode() for each in range(first, first + number))

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """While it goes on: no more is begun or held than may be, and what was carried is what came."""
        open_now = sum(not wire.is_closing() for wire in self._own_wires)
        assert self._dials_own + open_now <= MAX_CALLS, f"{self._dials_own} + {open_now} connections to the own port"
        for wire in self.wires:
            protocol = wire.protocols[-1] if wire.protocols else None
            if isinstance(protocol, End):
                assert sum(map(len, protocol._early)) <= READ_BYTES
                assert len(wire.waiting) <= WRITE_BUFFER_BYTES + 2 * READ_BYTES
        for own, other in self._pairs():
            splice = own.protocols[-1]
            if isinstance(splice, End) and not splice._splice.is_over:
                head = len(_dial(0).encode())
                assert not (own.has_ended and other.has_ended)
                assert len(own.sent) + len(own.waiting) == len(other.given)
                assert len(other.sent) + len(other.waiting) == len(own.given) + head

    def check_ended(self, error: BaseException | None) -> None:
        """When it has ended: by an error that says so, and everything with it."""
        if error is not None:
            assert isinstance(error, (PeerLost, PeerFull)), repr(error)
            assert error.peer_id == identity(RELAY).peer_id and error.message.isprintable()
            assert len(error.message) < 1000 and not error.message.endswith("lost: ")
        else:
            assert self._ending == CANCELLED
        welcome = self._tether.welcome
        assert welcome.done()
        if not welcome.cancelled() and welcome.exception() is None:
            assert welcome.result().isprintable()
        assert not self._tether._splices and not self._tether._calls
        for wire in self.wires:
            assert wire.is_lost or not wire.protocols, f"connection {wire.number} is still there"
        called = [frame.body for wire in self.wires[:1] for frame in frames_of(wire.given) if frame.kind is Kind.DIAL]
        for own, other in self._pairs():
            announced = next(frames_of(other.sent), None)
            assert announced is not None or other.was_cut
            if announced is None:
                continue
            assert announced.kind is Kind.DATA and announced.body in called
            called.remove(announced.body)
            came = other.sent[len(announced.encode()) :]
            assert own.given.startswith(came) and other.given.startswith(own.sent)
            assert other.was_cut or len(came) == len(own.given)
        heard = iter([frame for wire in self.wires[:1] for frame in frames_of(wire.given)])
        assert all(frame in heard for frame in self._sought), "sought by nobody"
        self._check_line()

    def _check_line(self) -> None:
        """On the connection that the peer keeps: its registration, a proof where one is due, and pings."""
        for wire in self.wires:
            if any(isinstance(protocol, End) for protocol in wire.protocols) or wire in self._own_wires:
                continue
            heard = list(frames_of(wire.sent))
            assert [frame.kind for frame in heard[:1]] in ([Kind.REGISTER], [])
            proofs = [frame for frame in heard if frame.kind is Kind.PROOF]
            asked = [frame.body for frame in frames_of(wire.given) if frame.kind is Kind.CHALLENGE]
            assert proofs == [_proof(identity(PEER), identity(RELAY).peer_id, nonce) for nonce in asked[: len(proofs)]]
            assert {frame.kind for frame in heard[1:]} <= {Kind.PROOF, Kind.PING}

    def _pairs(self) -> Iterator[tuple[Wire, Wire]]:
        """What has been joined: the connection to the own port, and the one to the relay."""
        ends = {wire.protocols[-1]: wire for wire in self.wires if wire.protocols}
        for end, wire in ends.items():
            if isinstance(end, End) and end is end._splice.second and end._splice.first in ends:
                yield wire, ends[end._splice.first]


@lru_cache(256)
def _proof(me: Identity, relay_id: str, nonce: bytes) -> Frame:
    """Made once for each nonce: a signature takes 1 ms."""
    return proof(me, relay_id, nonce)


def _dial(number: int) -> Frame:
    return Frame(Kind.DIAL, number.to_bytes(TOKEN_BYTES))


# ---------------------------------------------------------------------------- right programs


def calls(first: int, number: int = 1) -> bytes:
    """So many clients want the peer; the tokens are numbers from `first` on."""
    return bytes([TOKEN, first, number, 0])


WELCOME = Frame(Kind.WELCOME, b"198.51.100.7")
HELD = says(0, raw(Frame(Kind.CHALLENGE, NONCE))) + says(0, raw(WELCOME))


def programs() -> list[bytes]:
    """What relays do, and what hostile ones might."""
    call = HELD + says(0, calls(0))
    talk = says(1, fills(3)) + says(2, fills(9), 200)
    come = says(2, fills(2))
    pong = raw(Frame(Kind.PONG))
    return [
        HELD + passes(21.0) + says(0, pong) + passes(21.0) + says(0, pong, 1) + passes(60.0),
        call + talk + does(END, 1) + says(2, fills(1)) + does(END, 2),
        call + talk + does(RESET, 2) + says(1, fills(1)) + does(END, 0),
        call + does(STALL, 2) + says(1, fills(256)) + says(1, fills(100)) + passes(1.0) + does(TAKE, 2) + passes(0.2),
        call + does(STALL, 1) + says(2, fills(100)) + does(END, 2) + does(END, 1) + passes(1.0) + does(TAKE, 1),
        HELD + in_a_turn(says(0, calls(0))) + in_a_turn(does(EAGER, 1)) + in_a_turn(says(1, fills(2))) + come,
        HELD + says(0, calls(0, 3)) + says(2, fills(1)) + says(4, fills(2)) + does(RESET, 0),
        HELD + says(0, calls(0, 200)),
        HELD + says(0, raw(Frame(Kind.SOUGHT, b"s" * TOKEN_BYTES), _dial(0), Frame(Kind.SOUGHT, b"t" * TOKEN_BYTES))),
        HELD + does(DIALS, HANGS) + says(0, calls(0, 9)) + passes(5.1) + says(0, calls(9, 9)),
        HELD + does(DIALS, REFUSED) + says(0, calls(0, 9)) + does(DIALS, GONE) + says(0, calls(3, 2)),
        HELD + does(OWN) + says(0, calls(0)) + does(OWN) + says(0, calls(1)),
        says(0, raw(Frame(Kind.REFUSED, b"this relay serves as many peers as it can\x1b[2J"))),
        says(0, raw(Frame(Kind.REFUSED))),
        says(0, raw(WELCOME, WELCOME)),
        says(0, raw(WELCOME, _dial(0), Frame(Kind.CHALLENGE, NONCE))) + says(1, fills(1)),
        says(0, raw(Frame(Kind.WELCOME, b"nonsense"))),
        does(STALL, 0) + says(0, raw(*[Frame(Kind.CHALLENGE, NONCE)] * 8)) + passes(5.1),
        HELD + does(STALL, 0) + says(0, raw(Frame(Kind.PING), Frame(Kind.REFUSED, b"no"))) + passes(60.0),
        says(0, raw(b"HTTP/1.1 400 Bad Request\r\n\r\n")),
        opens() + passes(4.9) + says(0, raw(Frame(Kind.CHALLENGE, NONCE)), 3) + passes(5.1),
        does(RESET, 0),
    ]


def seeds() -> list[bytes]:
    """Each program, ended in one of two ways; and a relay that cannot be reached."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what it would log is raised here
    ended = [bytes([number % 2, 0]) + program for number, program in enumerate(programs())]
    return [*ended, *(bytes([ABANDONED, dials]) + passes(11.0) for dials in (REFUSED, HANGS, GONE))]


TARGET = Target(
    "tether",
    run,
    seeds,
    modules=("peer.reach.tether", "protocol.relay_frames", "protocol.splice"),
)
