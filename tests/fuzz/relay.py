"""A relay among strangers, peers and clients: connections, what they say in pieces of any size, their ends, and time.

An input is a little program. Its connections are in memory and its clock is turned by hand, but the relay is the real
one. Nonces and tokens can be foreseen, so that a right registration and a right call are bred as easily as wrong ones.
Allowed, of the parsers, which get the same bytes by themselves: what their docstrings say. The relay may raise nothing;
what else is asked of it is in `Scene.check` and `Scene.check_ended`.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Iterator
from functools import lru_cache
from unittest.mock import patch

from peer.reach import relay
from peer.reach.hello import CLIENT_HELLO, HANDSHAKE, HOST_NAME, MAX_HELLO_BYTES, SERVER_NAME, HelloReader, server_name
from peer.reach.relay import Entrance, Relay, RelaySettings
from peer.reach.switchboard import RelayLimits
from protocol.errors import BadMessage, BadRecord, WireError
from protocol.hosts import ip
from protocol.identity import certificate_name
from protocol.relay_frames import (
    HEAD_BYTES,
    MAX_BODY_BYTES,
    NONCE_BYTES,
    TOKEN_BYTES,
    Frame,
    FrameReader,
    Kind,
    came,
    here,
    meet,
    met,
    proof,
    proven,
    seek,
    sought,
)
from protocol.splice import LINGER_S, WRITE_BUFFER_BYTES, End, Splice
from tests.fuzz.programs import (
    DIALS,
    EAGER,
    END,
    HANGS,
    HELLO,
    HERE,
    OWN,
    PROOF,
    REFUSED,
    RESET,
    SEEK,
    STALL,
    TAKE,
    TOKEN,
    Play,
    at_once,
    does,
    fills,
    in_a_turn,
    opens,
    passes,
    raw,
    says,
)
from tests.fuzz.source import Source
from tests.fuzz.target import Target
from tests.fuzz.wires import FIRST_PORT, READ_BYTES, Clockwork, Wire
from tests.harness import identity

RELAY, PEERS = 0, (1, 2)  # numbers of identities
NOBODY = "nobody.example"
HOSTS = ("192.0.2.1", "192.0.2.2", "198.51.100.1", "203.0.113.1", "2001:db8::1", "2001:db8:0:1::1", "::ffff:192.0.2.3")
OWN_END = ("127.0.0.1", 1)
SAID_ENDS = (("10.0.0.1", 5000), ("192.0.2.1", FIRST_PORT), ("2001:db8::7", 443))
"""Where those that come to a meeting say that they are."""
LIMITS = RelayLimits(
    providers=2,
    providers_per_block=1,
    calls=4,
    calls_per_provider=3,
    calls_per_block=2,
    waiting_per_provider=2,
    seeks=3,
    seeks_per_provider=2,
    seeks_per_block=1,
    strangers=5,
    strangers_per_block=3,
    idle_s=20.0,
    silent_s=12.0,
)
MBIT_PER_S = 8.0
QUIET_S = LIMITS.idle_s + LINGER_S + 2 * 5.0  # and two sweeps: by then a relay has ended all that says nothing
LINE_BYTES = 1 << 10  # that wait for a peer that does not read; fewer than there may be else, so that it is reached

NONCE = bytes(range(NONCE_BYTES))
TO_ANYBODY = {Kind.CHALLENGE, Kind.REFUSED}
TO_PEERS = {Kind.WELCOME, Kind.PONG, Kind.DIAL, Kind.SOUGHT}
"""What the relay says to whoever has shown who it is."""
TO_THOSE_WHO_MEET = {Kind.MEET, Kind.REFUSED}
"""A new kind of frame belongs into one of these."""

BY_SILENCE, BY_RESETS, BY_CLOSING = range(3)
"""How all of it ends."""

_loop = Clockwork()


def run(data: bytes) -> None:
    """Tries the parsers, and then the whole relay."""
    _parse(data)
    _loop.run_until_complete(_play(data))
    escaped, _loop.escaped = _loop.escaped, []
    if escaped:
        raise escaped[0]
    _loop.rewind()


def _parse(data: bytes) -> None:
    for received in (data, bytes([HANDSHAKE]) + data[1:]):
        name = _named(received, len(received))
        assert name is None or (len(name) <= 255 and name.isascii() and name.isprintable())
        assert name is not None or len(received) < MAX_HELLO_BYTES
        assert name == _named(received, 1 + len(received) // 16), "it depends on how it arrives"
    reader, number = FrameReader(), 0
    try:
        for at in range(0, len(data), 61):
            reader.feed(data[at : at + 61])
            for frame in reader.frames():
                number += len(frame.encode())
                assert len(frame.body) <= MAX_BODY_BYTES and frame.text.isprintable()
        assert number + len(reader.rest) == len(data)
    except BadMessage:
        pass
    try:
        name = sought(Frame(Kind.SEEK, data))
        assert sought(seek(name)) == name
    except BadMessage:
        pass
    try:
        token, end = came(Frame(Kind.HERE, data))
        assert came(here(token, end)) == (token, end) and _is_end(end)
    except BadMessage:
        pass
    try:
        own, others = met(Frame(Kind.MEET, data))
        assert met(meet(own, others)) == (own, others) and all(map(_is_end, (own, *others)))
    except BadMessage:
        pass
    for frame in (Frame(Kind.PROOF, data), _flawed(data)):
        try:
            name = proven(frame, identity(RELAY).peer_id, NONCE)
        except (BadMessage, BadRecord):
            continue
        assert name == identity(PEERS[0]).peer_id


def _is_end(end: tuple[str, int]) -> bool:
    return ip(end[0]) is not None and 1 <= end[1] <= 65535


def _named(received: bytes, piece: int) -> str | None:
    """The name in what arrives in such pieces; an empty one: it is refused."""
    reader = HelloReader()
    try:
        for arrived in range(0, len(received), max(1, piece)):
            name = reader.name(received[: arrived + max(1, piece)])
            if name is not None:
                assert name
                return name
    except BadMessage:
        return ""
    return None


def _flawed(data: bytes) -> Frame:
    """A right proof with the input laid over some of it."""
    body = proof_of(PEERS[0]).body
    at = int.from_bytes(data[:2]) % len(body)
    return Frame(Kind.PROOF, (body[:at] + data[2:] + body[at + len(data[2:]) :])[:MAX_BODY_BYTES])


# ---------------------------------------------------------------------------- the program


async def _play(data: bytes) -> None:
    scene = Scene(Source(data))
    with patch.object(secrets, "token_bytes", scene.foreseen), patch.object(relay, "MIN_BURST_BYTES", LINE_BYTES):
        await scene.play()


class Scene(Play):
    """A relay, and those who come."""

    def __init__(self, source: Source) -> None:
        self._ending = source.byte() % 3
        super().__init__(_loop, source)
        self.own_wires: list[Wire] = []  # of the connections, such as the relay dialled at its own peer's port
        self._entered: dict[Entrance, tuple[Wire, float]] = {}  # when
        self._tokens = 0
        settings = RelaySettings(
            "127.0.0.1", 0, MBIT_PER_S, own=lambda: OWN_END if self.is_open else None, limits=LIMITS
        )
        self.relay = Relay(identity(RELAY).peer_id, settings)

    def foreseen(self, nbytes: int | None = None) -> bytes:
        """In the place of `secrets.token_bytes`."""
        if nbytes == NONCE_BYTES:
            return NONCE
        self._tokens += 1
        return self._tokens.to_bytes(nbytes or 16)

    async def play(self) -> None:
        """All of it, to its end."""
        sweeping = asyncio.ensure_future(self.relay.run())
        await self.perform()
        if self._ending == BY_RESETS:
            for wire in self.wires:
                wire.reset()
        elif self._ending == BY_CLOSING:
            await self.relay.close()
        await self.passes(QUIET_S)
        assert not sweeping.done(), sweeping
        sweeping.cancel()
        await self.passes(0.0)
        self.check_ended()

    def opened(self, choice: int) -> None:
        wire = self.wire(HOSTS[choice % len(HOSTS)])
        if wire is not None:
            entrance = Entrance(self.relay)
            self._entered[entrance] = wire, self.loop.time()
            self.loop.call_soon(wire.begin, entrance)

    async def dialled(self, host: str, port: int) -> Wire:
        assert (host, port) == OWN_END
        wire = await super().dialled(host, port)
        self.own_wires.append(wire)
        return wire

    def phrase(self, kind: int) -> bytes:
        source = self.source
        if kind == PROOF:
            data = bytearray(proof_of(source.pick((*PEERS, RELAY))).encode())
        elif kind == TOKEN:
            frame, known = source.byte(), self._known_tokens()
            token = source.pick(known) if known else source.raw(1)
            data = bytearray(bytes([frame]) + len(token).to_bytes(2) + token)
        elif kind == SEEK:
            data = bytearray(seek(name_of(source.byte())).encode())
        elif kind == HERE:
            known, number = self._known_tokens(), source.byte()
            token = known[number % len(known)] if known else bytes(16)
            data = bytearray(here(token, SAID_ENDS[source.byte() % len(SAID_ENDS)]).encode())
        else:
            data = bytearray(hello(name_of(source.byte()), source.byte()))
        at, flaw = int.from_bytes(source.raw(2), "little"), source.byte()
        data[at % len(data)] ^= flaw
        return bytes(data)

    def _known_tokens(self) -> list[bytes]:
        """Those that somebody has been told, in their order."""
        said = [frame for wire in self._lines() for frame in frames_of(wire.sent)]
        return [frame.body for frame in said if frame.kind in (Kind.DIAL, Kind.SOUGHT)]

    def _lines(self) -> list[Wire]:
        """The connections to which the relay itself has spoken."""
        return [wire for wire in self.wires if not any(isinstance(protocol, End) for protocol in wire.protocols)]

    # ------------------------------------------------------------------ what must hold

    def check(self) -> None:
        """While it goes on: no more is held than may be, and what was carried is what came."""
        board = self.relay.board
        assert board.providers <= LIMITS.providers and board.calls <= LIMITS.calls
        assert max(board._calls.by_name.values(), default=0) <= LIMITS.calls_per_provider
        assert max(board._calls.by_block.values(), default=0) <= LIMITS.calls_per_block
        assert board.seeks <= LIMITS.seeks
        assert max(board._seeks.by_name.values(), default=0) <= LIMITS.seeks_per_provider
        assert max(board._seeks.by_block.values(), default=0) <= LIMITS.seeks_per_block
        assert max(board._strangers.values(), default=0) <= LIMITS.strangers_per_block
        assert board._strangers.total() == sum(each._greeted for each in self.relay._entrances) <= LIMITS.strangers
        met_here = sum(each._meeting is not None for each in self.relay._entrances)
        seeking = sum(call.seeks for call in board._waiting.values())
        assert board._seeks.by_block.total() == board.seeks == seeking + met_here
        assert board._calls.by_block.total() == board.calls
        assert board.calls == len(board._waiting) - seeking + len(self.relay._splices)
        for entrance in self.relay._entrances:
            wire, came_s = self._entered[entrance]
            if not wire.is_closing():
                self._check_time(entrance, wire, self.loop.time() - came_s)
            assert len(entrance._received) <= MAX_HELLO_BYTES + READ_BYTES
            if entrance._frames is not None:
                listens = not entrance._meets and not wire.is_closing()  # else the rest of its last read is left
                assert len(entrance._frames.rest) < HEAD_BYTES + MAX_BODY_BYTES + (0 if listens else READ_BYTES)
        for wire in self.wires:
            protocol = wire.protocols[-1] if wire.protocols else None
            if isinstance(protocol, End):
                assert sum(map(len, protocol._early)) <= MAX_HELLO_BYTES + READ_BYTES
                assert len(wire.waiting) <= WRITE_BUFFER_BYTES + MAX_HELLO_BYTES + 2 * READ_BYTES
            else:
                assert wire.is_closing() or len(wire.waiting) <= LINE_BYTES
        joined = list(self._pairs())
        alone = self.relay._splices - {splice for splice, _, _ in joined}
        assert len(alone) <= len(self.relay._tasks), "nobody will come to what waits for a second end"
        for splice, client, other in joined:
            if not splice.is_over:
                assert not (client.has_ended and other.has_ended)
                assert len(client.sent) + len(client.waiting) == len(_carried(other, other in self.own_wires))
                assert len(other.sent) + len(other.waiting) == len(client.given)

    def _check_time(self, entrance: Entrance, wire: Wire, seconds: float) -> None:
        """Nobody waits for longer than it may; nor is read from, if it is a client that waits."""
        if entrance._greeted:
            assert seconds <= LIMITS.hello_s
        elif entrance._meets:
            assert seconds <= LIMITS.hello_s + LIMITS.dial_s + LIMITS.meet_s
        elif entrance._token:
            assert seconds <= LIMITS.hello_s + LIMITS.dial_s
            assert not wire.is_reading()

    def check_ended(self) -> None:
        """When nobody has said anything for long: all is forgotten, and nobody got what was not for them."""
        for wire in self.wires:
            assert wire.is_lost or not wire.protocols, f"connection {wire.number} is still there"
        for counted in (self.relay.board, self.relay):
            for name, held in vars(counted).items():
                if isinstance(held, (dict, set, list)) and name != "refusals":
                    assert not held, f"{name}: {held}"
        joined = set()
        for _, client, other in self._pairs():
            joined |= {client.number, other.number}
            is_own = other in self.own_wires
            self._check_meant(client, other, is_own)
            for wire, meant in ((client, _carried(other, is_own)), (other, bytes(client.given))):
                assert meant.startswith(wire.sent)
                assert wire.was_cut or len(wire.sent) == len(meant), f"connection {wire.number} lacks something"
        for wire in self.wires:
            if wire.number not in joined:
                self._check_alone(wire)

    def _check_meant(self, client: Wire, other: Wire, is_own: bool) -> None:
        """Those two were to be joined: the one asked for the other, which has shown that it is who it is."""
        name = server_name(bytes(client.given))
        if is_own:
            assert name == certificate_name(self.relay.peer_id)
            return
        announced = next(frames_of(other.given))
        assert announced.kind is Kind.DATA
        assert name in self._told(Frame(Kind.DIAL, announced.body))

    def _told(self, frame: Frame) -> set[str]:
        """Who those are that have been told this: one connection, which has proved that."""
        (told,) = [wire for wire in self._lines() if frame in frames_of(wire.sent)]
        return proven_names(told)

    def _check_alone(self, wire: Wire) -> None:
        """It was told no more than it may know."""
        if not wire.given or wire.given[0] == HANDSHAKE or wire in self.own_wires:
            assert not wire.sent
            return
        heard = list(frames_of(wire.sent))
        assert wire.was_cut or sum(len(frame.encode()) for frame in heard) == len(wire.sent)
        kinds = {frame.kind for frame in heard}
        first = next(frames_of(wire.given), None)
        if first is not None and first.kind in (Kind.SEEK, Kind.HERE):
            assert kinds <= TO_THOSE_WHO_MEET and len(heard) <= 1
            for frame in heard:
                if frame.kind is Kind.MEET:
                    self._check_met(wire, first, frame)
            return
        assert kinds <= TO_ANYBODY | TO_PEERS
        assert kinds <= TO_ANYBODY or proven_names(wire)

    def _check_met(self, wire: Wire, first: Frame, told: Frame) -> None:
        """It learned where it is seen itself, and the other one: whom it sought, or who sought it."""
        own, others = met(told)
        assert own == _seen(wire)
        other = self.wires[others[0][1] - FIRST_PORT]
        assert others[0] == _seen(other)
        second = next(frames_of(other.given))
        asked, come = (first, second) if first.kind is Kind.SEEK else (second, first)
        name, (token, said) = sought(asked), came(come)
        assert name in self._told(Frame(Kind.SOUGHT, token))
        assert others[1:] == ((said,) if first is asked and _seen(wire)[0] == _seen(other)[0] else ())

    def _pairs(self) -> Iterator[tuple[Splice, Wire, Wire]]:
        """What has been joined: the client's connection, and the other."""
        ends = {wire.protocols[-1]: wire for wire in self.wires if wire.protocols}
        for end, wire in ends.items():
            if (
                isinstance(end, End)
                and end is end._splice.first
                and (other := ends.get(end._splice.second)) is not None
            ):
                yield end._splice, wire, other


def _carried(other: Wire, is_own: bool) -> bytes:
    """What came in at the peer's connection, for the client."""
    return bytes(other.given if is_own else other.given[len(Frame(Kind.DATA, bytes(16)).encode()) :])


def _seen(wire: Wire) -> tuple[str, int]:
    """Where the relay sees the far end."""
    host, port = wire.at
    return str(ip(host)), port


def frames_of(data: bytes | bytearray) -> Iterator[Frame]:
    """The frames with which it begins."""
    reader = FrameReader()
    reader.feed(bytes(data))
    try:
        yield from reader.frames()
    except BadMessage:
        return


def proven_names(wire: Wire) -> set[str]:
    """Whose certificates' names those are that the far end has proved to be its own."""
    names = set()
    for frame in frames_of(wire.given):
        if frame.kind is Kind.PROOF:
            try:
                names.add(certificate_name(proven(frame, identity(RELAY).peer_id, NONCE)))
            except WireError:
                continue
    return names


@lru_cache
def proof_of(number: int) -> Frame:
    """Made once: a signature takes 1 ms."""
    return proof(identity(number), identity(RELAY).peer_id, NONCE)


def name_of(number: int) -> str:
    """A name that a client asks for."""
    names = [*(certificate_name(identity(peer).peer_id) for peer in (*PEERS, RELAY)), NOBODY]
    return names[number % len(names)]


def hello(name: str, spread: int = 0) -> bytes:
    """A TLS hello as short as can be, always the same. `spread`: over records of so many bytes; 0: in one."""

    def vector(length_bytes: int, body: bytes) -> bytes:
        return len(body).to_bytes(length_bytes) + body

    names = vector(2, bytes([HOST_NAME]) + vector(2, name.encode()))
    extensions = vector(2, SERVER_NAME.to_bytes(2) + vector(2, names))
    body = b"\3\3" + bytes(32) + vector(1, b"") + vector(2, b"\x13\1") + vector(1, b"\0") + extensions
    message = bytes([CLIENT_HELLO]) + vector(3, body)
    pieces = range(0, len(message), spread or len(message))
    return b"".join(b"\x16\3\1" + vector(2, message[at : at + (spread or len(message))]) for at in pieces)


# ---------------------------------------------------------------------------- right programs


def proves(peer: int, flaw: int = 0) -> bytes:
    """The proof of the peer at that place in `PEERS`, in which one byte may be wrong."""
    return bytes([PROOF, peer]) + b"\x30\1" + bytes([flaw, 0])


def told(kind: Kind, number: int, tail: int = 0) -> bytes:
    """A frame with a token that somebody was told. `tail`: the root of how many bytes follow, by fours."""
    return bytes([TOKEN, kind, number, 0, 0, 0, tail])


def asks(name: int, spread: int = 0, tail: int = 0) -> bytes:
    """The TLS hello of a client that wants the peer of that name (`name_of`)."""
    return bytes([HELLO, name, spread, 0, 0, 0, tail])


def seeks(name: int) -> bytes:
    """Asks for a meeting with the peer of that name."""
    return bytes([SEEK, name, 0, 0, 0, 0])


def is_here(number: int, own: int = 1) -> bytes:
    """Comes to a meeting, with a token that somebody was told."""
    return bytes([HERE, number, own, 0, 0, 0, 0])


def registers(wire: int, peer: int) -> bytes:
    """As a peer does."""
    return says(wire, raw(Frame(Kind.REGISTER))) + says(wire, proves(peer))


def comes(client: int, provider: int, token: int = 0, host: int = 2) -> bytes:
    """A client, and the peer that comes for it."""
    return opens(host) + says(client, asks(0)) + opens() + says(provider, told(Kind.DATA, token))


LONG_HELLO = b"\x16\3\1\x40\0\1\0\x20\1"
FIRST_TOKEN = Frame(Kind.DATA, (1).to_bytes(TOKEN_BYTES))  # that the relay gives (`Scene.foreseen`)
WRONG_TOKEN = Frame(Kind.DATA, b"\xff" * 16)


def programs() -> list[bytes]:
    """What peers and clients do, and what strangers do."""
    at_home = opens() + registers(0, 0)
    call = at_home + comes(1, 2)
    talk = says(1, fills(3)) + says(2, fills(9), 200)
    own = opens(2) + says(0, asks(2))
    come = says(2, told(Kind.DATA, 0))
    sought_there = at_home + opens(2) + says(1, seeks(0))
    return [
        at_home + says(0, raw(Frame(Kind.PING), Frame(Kind.PING))) + passes(11.0) + says(0, raw(Frame(Kind.PING)), 1),
        call + talk + does(END, 1) + says(2, fills(1)) + does(END, 2),
        call + talk + does(RESET, 2) + says(1, fills(1)),
        call + does(STALL, 1) + says(2, fills(256)) + says(2, fills(100)) + passes(1.0) + does(TAKE, 1) + passes(4.9),
        call + does(STALL, 1) + says(2, fills(100)) + does(END, 2) + does(END, 1) + passes(1.0) + does(TAKE, 1),
        at_home + opens(2) + in_a_turn(says(1, asks(0), 7)) + says(1, fills(30)) + opens() + come,
        at_home + opens(2) + does(EAGER, 1) + says(1, asks(0)) + says(1, fills(64)) + says(1, fills(64)),
        at_home + opens(2) + says(1, asks(0)) + passes(5.1) + opens() + says(2, told(Kind.DATA, 0)),
        at_home + opens(2) + says(1, asks(0)) + opens() + in_a_turn(does(RESET, 1)) + says(2, told(Kind.DATA, 0)),
        at_home + opens(2) + says(1, asks(1)) + opens(3) + says(2, asks(3)),
        at_home + opens(3) + registers(1, 0) + opens(5) + registers(2, 1) + opens() + registers(3, 2),
        call + comes(3, 4, 1, 3) + comes(5, 6, 2, 4) + comes(7, 8, 3, 5) + says(3, fills(1)) + says(4, fills(1)),
        call + comes(3, 4, 1) + opens(2) + says(5, asks(0)) + opens(2) + says(6, asks(2)) + says(3, fills(1)),
        at_home + b"".join(opens(number) + says(number, asks(0)) for number in range(1, 6)),
        at_home + opens(2) + says(1, asks(0, tail=9)) + opens() + says(2, told(Kind.DATA, 0, tail=200)),
        at_home + opens(2) + does(EAGER, 1) + says(1, asks(0, tail=255)) + says(1, fills(64)),
        own + does(OWN) + says(0, fills(2)) + says(1, fills(20)) + does(END, 1) + does(END, 0),
        does(DIALS, REFUSED) + own,
        does(DIALS, HANGS) + own + opens(1) + says(1, asks(2)) + does(RESET, 0) + passes(4.9),
        opens(2) + in_a_turn(says(0, asks(2))) + does(RESET, 0) + passes(1.0),
        opens(2) + in_a_turn(says(0, asks(2))) + in_a_turn(says(1, fills(1))) + passes(1.0),
        b"".join(opens(number % 2) for number in range(8)) + says(0, raw(b"GET / HTTP/1.0\r\n\r\n")) + passes(5.1),
        opens() + says(0, asks(0, spread=1), 1) + opens(3) + says(1, asks(0, spread=100)) + passes(4.9),
        opens() + says(0, raw(LONG_HELLO)) + opens(2) + says(1, raw(LONG_HELLO[:-1])) + says(1, fills(2)),
        opens() + says(0, raw(Frame(Kind.REGISTER))) + says(0, proves(0, flaw=1)),
        opens() + says(0, proves(0)) + opens() + says(1, raw(WRONG_TOKEN, b"more")) + passes(0.2),
        opens() + says(0, raw(Frame(Kind.REGISTER), Frame(Kind.REGISTER), WRONG_TOKEN)),
        at_home + does(STALL, 0) + b"".join(says(0, raw(*[Frame(Kind.PING)] * 150)) for _ in range(3)) + does(END, 0),
        at_home + opens(2) + does(EAGER, 1) + says(1, asks(0, tail=255)) + opens() + at_once(says(1, fills(64))) + come,
        at_home + opens(2) + says(1, asks(0)) + opens() + says(2, raw(Frame(Kind.PONG), FIRST_TOKEN)),
        at_home + says(0, raw(*[Frame(Kind.PING)] * 300)) + opens(3) + at_once(registers(1, 0)) + does(RESET, 0),
        sought_there + opens(1) + says(2, is_here(0)) + passes(11.0),
        sought_there + opens(2) + says(2, is_here(0), 5) + does(END, 1) + does(RESET, 2),
        sought_there + opens(1) + says(2, told(Kind.DATA, 0)) + opens() + says(3, is_here(0)),
        sought_there + in_a_turn(does(RESET, 1)) + opens() + says(2, is_here(0)) + says(2, fills(1)),
        sought_there + passes(5.1) + opens(3) + says(2, seeks(1)) + opens(3) + says(3, seeks(0)) + says(3, fills(1)),
        sought_there + says(0, raw(Frame(Kind.SEEK, b"a"))) + opens(3) + says(2, asks(0)),
        at_home + opens(2) + says(1, asks(0)) + opens() + says(2, is_here(0)),
        at_home + says(0, raw(Frame(Kind.DIAL, bytes(16)), Frame(Kind.WELCOME, b"192.0.2.1"))),
    ]


def seeds() -> list[bytes]:
    """Each program, ended in one of three ways; and a hello and frames for the parsers alone."""
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # what it would log is raised here
    ended = [bytes([number % 3]) + program for number, program in enumerate(programs())]
    frames = [Frame(Kind.REGISTER), Frame(Kind.WELCOME, b"192.0.2.1"), Frame(Kind.DIAL, bytes(16))]
    bodies = [
        bytes(16) + b"192.0.2.1:0000199999",
        seek(NOBODY).body,
        here(bytes(16), SAID_ENDS[2]).body,
        meet(SAID_ENDS[0], SAID_ENDS[1:]).body,
    ]
    return [*ended, hello(NOBODY), hello(NOBODY, 9), b"".join(frame.encode() for frame in frames), *bodies]


TARGET = Target(
    "relay",
    run,
    seeds,
    modules=(
        "peer.reach.relay",
        "peer.reach.switchboard",
        "peer.reach.hello",
        "protocol.relay_frames",
        "protocol.splice",
    ),
)
