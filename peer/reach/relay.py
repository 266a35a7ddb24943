"""A relay: one port, at which peers that nobody can dial are reached by those who want them.

Such a peer keeps a connection to the relay and has shown who it is. A client dials the relay as if it were the peer;
the relay reads the peer's name in the TLS hello (`peer.reach.hello`), has the peer come with another connection, and
joins the two. The certificate stays pinned from end to end, so a relay can do no more than carry, or not carry.

Those whose routers allow it do without: two that meet here are told where each of them is, and dial each other
(`protocol.meeting`).

A connection per client, dialled by the peer when it is wanted, and not one for all: each has TCP's own flow control,
a slow client holds up nobody, and nothing has to be taken apart here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from functools import partial
from typing import cast

from dht.background import background
from peer.bucket import Bucket
from peer.reach.hello import HANDSHAKE, MAX_HELLO_BYTES, HelloReader
from peer.reach.switchboard import Call, RelayLimits, Switchboard
from protocol.errors import BadMessage, ConfigError, PeerError, PeerFull, PotluckError, WireError
from protocol.hosts import block, ip
from protocol.identity import certificate_name
from protocol.relay_frames import NONCE_BYTES, End, Frame, FrameReader, Kind, came, meet, proven, sought
from protocol.splice import Splice

logger = logging.getLogger(__name__)

SWEEP_S = 5.0
BURST_S = 0.25  # of the rate may pass at once
MIN_BURST_BYTES = 256 << 10
BACKLOG = 128


@dataclass(frozen=True, slots=True)
class RelaySettings:
    """Where a relay listens, and how fast it carries.

    Attributes:
        mbit_per_s: megabits per second, all connections together; a byte counts once, though it comes in and goes out.
        own: where this machine's own gRPC port is, so that others can try the relay by asking for this peer itself;
            None: it has none at the moment.
    """

    host: str
    port: int
    mbit_per_s: float
    own: Callable[[], tuple[str, int] | None] = lambda: None
    limits: RelayLimits = field(default_factory=RelayLimits)


class Relay:
    """Made by `open_relay`.

    Attributes:
        peer_id: this peer's.
        port: at which it listens.
        carried_bytes: so far.
        joined: connections of clients that it has joined with a peer's, so far.
        met: clients and peers that have met here, so far.
        refusals: whom it turned away, so far, by the error's code.
    """

    def __init__(self, peer_id: str, settings: RelaySettings) -> None:
        self.peer_id = peer_id
        self.port = 0
        self.carried_bytes = 0
        self.joined = self.met = 0
        self.refusals: Counter[str] = Counter()
        self.settings = settings
        self.board: Switchboard[Entrance] = Switchboard(settings.limits)
        self._loop = asyncio.get_running_loop()
        bytes_per_s = settings.mbit_per_s * 1e6 / 8
        self._bucket = Bucket(bytes_per_s, max(MIN_BURST_BYTES, bytes_per_s * BURST_S))
        self._splices: set[Splice] = set()
        self._entrances: set[Entrance] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None

    @property
    def places_left(self) -> int:
        """How many more peers may register."""
        return self.board.places_left

    async def listen(self) -> None:
        """Opens the port; for `open_relay`, as the next two.

        Raises:
            ConfigError: it cannot be had.
        """
        host, port = self.settings.host, self.settings.port
        try:
            listening = _listening(host, port)
            self._server = await self._loop.create_server(lambda: Entrance(self), sock=listening)
        except OSError as error:
            raise ConfigError(
                f"cannot relay at {host} port {port}: {error.strerror or error}; choose another --relay-port"
            ) from None
        self.port = int(self._server.sockets[0].getsockname()[1])

    async def run(self) -> None:
        """Ends what is idle or silent, for ever."""
        limits = self.settings.limits
        while True:
            await asyncio.sleep(SWEEP_S)
            now_s = self._loop.time()
            for splice in [splice for splice in self._splices if now_s - splice.used_s > limits.idle_s]:
                splice.abort()
            for entrance in [each for each in self._entrances if now_s - each.heard_s > limits.silent_s]:
                entrance.abort()

    async def close(self) -> None:
        """Gives up the port, and ends all connections."""
        if self._server is not None:
            self._server.close()
        for splice in list(self._splices):
            splice.abort()
        for entrance in list(self._entrances):
            entrance.abort()
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.wait_closed()

    # ------------------------------------------------------------------ for entrances

    def enter(self, entrance: Entrance) -> None:
        self._entrances.add(entrance)

    def left(self, entrance: Entrance) -> None:
        self._entrances.discard(entrance)

    def dial_self(self, call: Call[Entrance], target: tuple[str, int]) -> None:
        """A client asks for this very peer: it is joined with this peer's own port."""
        splice = self._splice(partial(self.board.hang_up, call))
        task = self._loop.create_task(self._dial_self(splice, call.client, target))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _dial_self(self, splice: Splice, client: Entrance, target: tuple[str, int]) -> None:
        try:
            async with asyncio.timeout(self.settings.limits.dial_s):
                await self._loop.create_connection(lambda: splice.second, *target)
        except (OSError, TimeoutError):
            splice.abort()
            client.abort()
            return
        self.joined += 1
        client.hand_over(splice)

    def join(self, call: Call[Entrance], provider: Entrance) -> None:
        """The peer has come for the client."""
        self.joined += 1
        splice = self._splice(partial(self.board.hang_up, call))
        provider.hand_over(splice, second=True)
        call.client.hand_over(splice)

    def _splice(self, hang_up: Callable[[], None]) -> Splice:
        def ended() -> None:
            self._splices.discard(splice)
            hang_up()

        splice = Splice(self._carried, ended)
        self._splices.add(splice)
        return splice

    def _carried(self, nbytes: int) -> float:
        self.carried_bytes += nbytes
        return self._bucket.take(nbytes, self._loop.time())


class Entrance(asyncio.Protocol):
    """A connection from the moment that it was taken: a stranger's, who says what it wants; then a registered peer's;
    or a client's that waits for its peer."""

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._host = self._block = ""
        self._port = 0
        self._greeted = False
        self._received = bytearray()
        self._hello = HelloReader()
        self._frames: FrameReader | None = None
        self._nonce = b""
        self._registered: str | None = None  # its name, if it is a peer's
        self._token = b""  # of a client that waits
        self._meets = False  # does it come to a meeting?
        self._meeting: Call[Entrance] | None = None  # of a client that has met its peer
        self._deadline: asyncio.TimerHandle | None = None
        self.heard_s = self._loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        name, self._port, *_ = self._transport.get_extra_info("peername") or ("", 0)
        self._host = str(ip(name) or name)
        self._block = block(self._host)
        self._relay.enter(self)
        self._greeted = self._relay.board.greet(self._block)
        if not self._greeted:
            self._relay.refusals[PeerFull.code] += 1
            self._transport.abort()
            return
        self._deadline = self._loop.call_later(self._relay.settings.limits.hello_s, self.abort)

    def data_received(self, data: bytes) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        self.heard_s = self._loop.time()
        try:
            if self._meets:
                raise BadMessage("who comes to a meeting has nothing more to say")
            if self._token:
                self._received += data
                if len(self._received) > MAX_HELLO_BYTES + (256 << 10):  # reading had been paused
                    self.abort()
            elif self._frames is not None:
                self._hear(data)
            else:
                self._first(data)
        except WireError as error:
            logger.debug("the relay ends a connection: %s", error)
            self._relay.refusals[error.code] += 1
            self.abort()
        except PeerError as error:
            self._refuse(error)

    def _first(self, data: bytes) -> None:
        self._received += data
        if self._received[0] != HANDSHAKE:
            self._frames = FrameReader()
            data, self._received = bytes(self._received), bytearray()
            self._hear(data)
            return
        name = self._hello.name(self._received)
        if name is not None:
            self._call(name)

    # ------------------------------------------------------------------ clients

    def _call(self, name: str) -> None:
        relay = self._relay
        own = relay.settings.own() if name == certificate_name(relay.peer_id) else None
        assert self._transport is not None
        if own is not None:
            call = relay.board.call_self(name, self, self._block)
            self._wait(b"own")
            relay.dial_self(call, own)
            return
        token, provider = relay.board.call(name, self, self._block)
        self._wait(token)
        provider.say(Frame(Kind.DIAL, token))

    def _wait(self, token: bytes) -> None:
        assert self._transport is not None
        self._known()
        self._token = token
        self._transport.pause_reading()
        self._deadline = self._loop.call_later(self._relay.settings.limits.dial_s, self.abort)

    # ------------------------------------------------------------------ peers

    def _hear(self, data: bytes) -> None:
        assert self._frames is not None
        self._frames.feed(data)
        for frame in self._frames.frames():
            if self._registered is None and not self._nonce and frame.kind in (Kind.DATA, Kind.SEEK, Kind.HERE):
                self._begin(frame)
                return
            self._take(frame)
            if self._transport is None or self._transport.is_closing():
                return

    def _begin(self, frame: Frame) -> None:
        """The one frame of a connection that will carry no others."""
        if frame.kind is Kind.DATA:
            self._come(frame.body)
        elif frame.kind is Kind.SEEK:
            self._seek(sought(frame))
        else:
            self._meet(*came(frame))

    def _take(self, frame: Frame) -> None:
        if self._registered is not None:
            if frame.kind is Kind.PING:
                self.say(Frame(Kind.PONG))
                return
        elif not self._nonce:
            if frame.kind is Kind.REGISTER:
                self._nonce = secrets.token_bytes(NONCE_BYTES)
                self.say(Frame(Kind.CHALLENGE, self._nonce))
                return
        elif frame.kind is Kind.PROOF:
            self._register(proven(frame, self._relay.peer_id, self._nonce))
            return
        logger.debug("the relay ends a connection: %s is out of order", frame.kind.name)
        self.abort()

    def _register(self, peer_id: str) -> None:
        name = certificate_name(peer_id)
        before = self._relay.board.register(name, self, self._block)
        self._registered = name
        if before is not None:
            before.abort()
        self._known()
        self.say(Frame(Kind.WELCOME, self._host.encode()))

    def _come(self, token: bytes) -> None:
        found = self._answered(token, seeks=False)
        if found is not None:
            self._relay.join(found, self)

    def _answered(self, token: bytes, *, seeks: bool) -> Call[Entrance] | None:
        """The call for which this connection has come; None: there is none, and it is ended."""
        found = self._relay.board.answer(token)
        if found is not None and found.seeks == seeks:
            self._known()
            return found
        if found is not None:  # the peer mistakes a meeting for a call, or the other way round
            self._relay.board.hang_up(found)
            found.client.abort()
        self.abort()
        return None

    # ------------------------------------------------------------------ meetings

    def _seek(self, name: str) -> None:
        token, provider = self._relay.board.call(name, self, self._block, seeks=True)
        self._meets = True
        self._known()
        self._token = token
        self._deadline = self._loop.call_later(self._relay.settings.limits.dial_s, self.abort)
        provider.say(Frame(Kind.SOUGHT, token))

    def _meet(self, token: bytes, own: End) -> None:
        found = self._answered(token, seeks=True)
        if found is None:
            return
        self._meets = True
        client = found.client
        client._token, client._meeting = b"", found
        self._relay.met += 1
        self._tell_of(client)
        # Where the peer sees itself is of use, and said, only behind the same router.
        client._tell_of(self, *([own] if client._host == self._host else []))

    def _tell_of(self, other: Entrance, *near: End) -> None:
        """Where the other one is."""
        self._stop_waiting()
        self._deadline = self._loop.call_later(self._relay.settings.limits.meet_s, self.abort)
        self.say(meet((self._host, self._port), [(other._host, other._port), *near]))

    def say(self, frame: Frame) -> None:
        """To the peer. One that does not read is given up before it costs memory."""
        if self._transport is None or self._transport.is_closing():
            return
        self._transport.write(frame.encode())
        if self._transport.get_write_buffer_size() > MIN_BURST_BYTES:
            self.abort()

    # ------------------------------------------------------------------ ends

    def hand_over(self, splice: Splice, *, second: bool = False) -> None:
        """From now on the connection is the splice's."""
        transport, self._transport = self._transport, None
        self._stop_waiting()
        self._relay.left(self)
        if transport is None or transport.is_closing():
            splice.abort()
            return
        received = self._frames.rest if self._frames is not None else bytes(self._received)
        self._token = b""
        (splice.second if second else splice.first).adopt(transport, received)

    def _refuse(self, error: PotluckError) -> None:
        """A peer hears why; a client, which would not understand, does not."""
        logger.debug("the relay refuses a connection: %s", error)
        self._relay.refusals[error.code] += 1
        if self._frames is not None and self._transport is not None:
            self._transport.write(Frame(Kind.REFUSED, error.message.encode()).encode())
            self._transport.close()
        else:
            self.abort()

    def _known(self) -> None:
        """It is no stranger any more."""
        self._stop_waiting()
        if self._greeted:
            self._greeted = False
            self._relay.board.leave(self._block)

    def _stop_waiting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._known()
        self._relay.left(self)
        if self._registered is not None:
            self._relay.board.unregister(self._registered, self)
        if self._token and (waited := self._relay.board.answer(self._token)) is not None:
            self._relay.board.hang_up(waited)
        if self._meeting is not None:
            self._relay.board.hang_up(self._meeting)
        self._token, self._meeting = b"", None
        self._transport = None

    def abort(self) -> None:
        """Ends the connection at once."""
        if self._transport is not None:
            self._transport.abort()


def _listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; for all addresses of the machine, those of IPv6 are among them, as gRPC does it.

    Raises:
        OSError: the port is taken, or the host is not this machine's.
    """
    if host in ("0.0.0.0", "::") and socket.has_dualstack_ipv6():  # noqa: S104  # a relay is there to be reached
        return socket.create_server(("::", port), family=socket.AF_INET6, backlog=BACKLOG, dualstack_ipv6=True)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family, backlog=BACKLOG)


@contextlib.asynccontextmanager
async def open_relay(peer_id: str, settings: RelaySettings) -> AsyncIterator[Relay]:
    """A relay while the body runs.

    Raises:
        ConfigError: the port cannot be had.
    """
    relay = Relay(peer_id, settings)
    await relay.listen()
    try:
        async with background(relay.run(), "relay"):
            yield relay
    finally:
        await relay.close()
