"""Finds out where others reach this peer, and sees to it that they do: directly, or through relays.

Others are asked at the start, when the port changes, now and then, and when clients are lost. What they say decides
what the record says (`peer.reach.verdict`), whether this peer ties itself to relays, and whether it relays itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial

from dht.background import background, task_group
from dht.record import MAX_ADDRESSES, PeerRecord
from peer.config import PeerConfig
from peer.host import SpanHost
from peer.reach.dialback import ask
from peer.reach.meetings import Meetings
from peer.reach.moorings import Moorings
from peer.reach.places import Place
from peer.reach.relay import Relay, RelaySettings, open_relay
from peer.reach.verdict import Position, helpers, settle
from protocol.hosts import address, ip, own_host
from protocol.identity import Identity
from protocol.relay_frames import End

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 1.0
FIRST_LOOK_S = 0.05  # until the port is open, and it is known where: its peer is announced no sooner
ASK_EVERY_S = 600.0
DOUBT_EVERY_S = 60.0  # while somebody cannot reach us, or clients were lost
NOBODY_EVERY_S = 5.0  # as long as there is nobody to ask
LOST_CLIENTS = 3  # whose streams ended without a word, to have a look at once
FIRST_TIES_S = 6.0  # for relays, before a peer that nobody can dial is announced as such


@dataclass(frozen=True, slots=True)
class Around:
    """What it is told of everything else.

    Attributes:
        hosts: under which others reach this machine, by what it knows itself, or as the user named it.
        peers: all that may be asked, and may relay, at any moment.
        port: the gRPC port, as others see it; 0 before it is open.
        host: what serves now.
        announce: has the record announced.
        set_dialable: has the directory's node live with it that nobody can, or can, dial this machine.
        say: told, in one sentence, what a person should know.
    """

    hosts: Callable[[], Sequence[str]]
    peers: Callable[[], Sequence[PeerRecord]]
    port: Callable[[], int]
    host: Callable[[], SpanHost | None]
    announce: Callable[[], Awaitable[object]]
    set_dialable: Callable[[bool], None]
    say: Callable[[str], None]


class Whereabouts:
    """Made by `keeping_track`.

    Attributes:
        relay: this peer's own, for others; None: it does not relay.
        position: by what others said last; None: nobody was asked yet.
        known: set once it is known where this peer is announced.
    """

    def __init__(self, identity: Identity, config: PeerConfig, around: Around, relay: Relay | None) -> None:
        self.position: Position | None = None
        self.known = asyncio.Event()
        self._identity = identity
        self._config = config
        self._around = around
        self.relay = relay
        self._rng = random.Random()
        self._moorings = Moorings(identity, around.peers, self._target, self._poke, sought=self._seek)
        self._meetings: Meetings | None = None  # None: clients are not met
        self._mooring: asyncio.Task[None] | None = None
        self._tasks: asyncio.TaskGroup
        self._poked = asyncio.Event()
        self._asked_s = float("-inf")
        self._asked_port = 0
        self._again_s = 0.0  # after which to ask again
        self._said = ""

    def place(self, port: int) -> Place:
        """Where others reach that port of this peer, for the record; nowhere until it is known."""
        position = self.position
        if position is None:
            return Place()
        relays = self._moorings.addresses if position.needs_relay else ()
        direct = tuple(address(host, port) for host in position.hosts)[: MAX_ADDRESSES - len(relays)]
        if self.relay is None or not position.relays:
            return Place(direct + relays, len(relays))
        return Place(direct + relays, len(relays), self._relay_port, self.relay.places_left)

    async def run(self) -> None:
        """Asks when it is due, for ever."""
        async with task_group() as self._tasks:
            if self._config.direct:
                self._meetings = Meetings(self._target, self._tasks)
            while True:
                self._poked.clear()
                if self._is_due():
                    await self._look()
                self._tell()
                if await self._is_poked():
                    await self._around.announce()

    async def _is_poked(self) -> bool:
        """Did something change at our relays, within a moment?"""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S if self.known.is_set() else FIRST_LOOK_S):
                await self._poked.wait()
        return self._poked.is_set()

    # ------------------------------------------------------------------ asking

    def _is_due(self) -> bool:
        port, age_s = self._around.port(), self._now_s() - self._asked_s
        if not port:
            return False
        lost = age_s >= DOUBT_EVERY_S and self._lost_clients() >= LOST_CLIENTS
        return port != self._asked_port or age_s >= self._again_s or lost

    def _lost_clients(self) -> int:
        host = self._around.host()
        return 0 if host is None else sum(1 for session in host.sessions if not session.attached)

    async def _look(self) -> None:
        port = self._around.port()
        asked = helpers(self._around.peers(), self._identity.peer_id, self._rng)
        ports = [port, self._relay_port] if self._relay_port else [port]
        answers = await ask(asked, self._identity.certificate_der, ports)
        self._asked_s, self._asked_port = self._now_s(), port
        position = settle(answers, port, self._relay_port, self._around.hosts(), await self._announced())
        before = self.position
        if before is not None and before.seen and not position.seen:
            position = before  # nobody says anything new
        doubt = position.needs_relay or not answers
        self._again_s = NOBODY_EVERY_S if not asked else DOUBT_EVERY_S if doubt else ASK_EVERY_S
        if position == before:
            return
        logger.info("reached by others: %s", dict(position.seen) or "nobody could say")
        self.position = position
        self._moor(position.needs_relay)
        self._around.set_dialable(not position.is_hidden)
        if position.needs_relay and not position.hosts and before is None:
            await self._first_ties()
        await self._around.announce()
        self.known.set()

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    async def _announced(self) -> frozenset[str] | None:
        found = await announced_ips(self._config.announce_host)
        if found is not None and not found:
            self._around.say(f"--announce-host {self._config.announce_host} does not resolve here")
        return found

    @property
    def _relay_port(self) -> int:
        """Where others reach the relay; 0: there is none."""
        return 0 if self.relay is None else self._config.relay_announce_port or self.relay.port

    # ------------------------------------------------------------------ relays

    def _moor(self, needed: bool) -> None:
        if needed and self._mooring is None:
            self._mooring = self._tasks.create_task(self._moorings.run(), name="moorings")
        elif not needed and self._mooring is not None:
            self._mooring.cancel()
            self._mooring = None

    async def _first_ties(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FIRST_TIES_S):
                while not self._moorings.addresses:
                    self._poked.clear()
                    await self._poked.wait()

    def _poke(self) -> None:
        self._poked.set()

    def _seek(self, relay_id: str, relay: End, token: bytes) -> None:
        if self._meetings is not None:
            self._meetings.sought(relay_id, relay, token)

    def _is_relayed(self, end: End) -> bool:
        """Does a connection from there come through a relay, or from somebody met at one, and so from this machine?"""
        return self._moorings.carries(end) or (self._meetings is not None and self._meetings.carries(end))

    def _target(self) -> End | None:
        """Where our own gRPC port is, for those who come through relays; its service is told who does."""
        if (host := self._around.host()) is not None:
            host.service.dial_backs.is_relayed = self._is_relayed
            if self._meetings is not None:
                host.service.whence = self._meetings.whence
        return serving_end(self._config, self._around)

    # ------------------------------------------------------------------ people

    def _tell(self) -> None:
        """In one sentence, when it has become another one."""
        if self.position is None or not self.position.seen:
            return
        sentence = told(self.position, self._moorings.addresses, self._around.port(), self._config.announce_host)
        if sentence != self._said:
            self._said = sentence
            self._around.say(sentence)


async def announced_ips(name: str | None) -> frozenset[str] | None:
    """The IP addresses of a host that the user named, none if it has none here; None: no host was named."""
    if name is None:
        return None
    if ip(name) is not None:
        return frozenset({str(ip(name))})
    try:
        found = await asyncio.get_running_loop().getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except OSError:
        return frozenset()
    return frozenset(str(ip(str(end[0]))) for *_, end in found)


def own_end(host: str, port: int) -> End:
    """Where a port of this machine is for itself, that listens at `host`."""
    return own_host(host), port


def serving_end(config: PeerConfig, around: Around) -> End | None:
    """Where the gRPC port of what serves now is for this machine itself; None: it has none at the moment."""
    host = around.host()
    return None if host is None or not host.port else own_end(config.host, host.port)


def told(position: Position, relays: Sequence[str], port: int, announce_host: str | None) -> str:
    """What a person should know of where this peer stands, and can do."""
    if not position.needs_relay:
        return f"others reach this machine at {', '.join(position.hosts)}"
    at = announce_host or ", ".join(host for host, verdict in position.seen.items() if verdict != "yes")
    remedy = f"to be reached directly, have your router forward TCP port {port} to this machine"
    if announce_host is None:
        remedy += ", or name the host that leads here with --announce-host"
    if relays:
        return f"others do not reach port {port} at {at}, so that they come through {_count(relays)}; {remedy}"
    return (
        f"others do not reach port {port} at {at}, and no peer relays for this one: it is of no use as it is; {remedy}"
    )


def _count(relays: Sequence[str]) -> str:
    return "a relay" if len(relays) == 1 else f"{len(relays)} relays"


@contextlib.asynccontextmanager
async def keeping_track(identity: Identity, config: PeerConfig, around: Around) -> AsyncIterator[Whereabouts]:
    """Whereabouts that are kept up to date while the body runs, and a relay, if `config` allows one.

    Raises:
        ConfigError: the relay's port cannot be had.
    """
    async with contextlib.AsyncExitStack() as stack:
        relay = None
        if config.relay:
            own = partial(serving_end, config, around)
            settings = RelaySettings(config.host, config.relay_port, config.relay_mbps, own)
            relay = await stack.enter_async_context(open_relay(identity.peer_id, settings))
        whereabouts = Whereabouts(identity, config, around, relay)
        await stack.enter_async_context(background(whereabouts.run(), "whereabouts"))
        yield whereabouts
