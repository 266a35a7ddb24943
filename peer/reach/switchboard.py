"""Who is registered with a relay, who waits for whom, and how many there may be. Pure: no sockets, no clock."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Generic, TypeVar

from protocol.errors import PeerFull, PeerLost
from protocol.relay_frames import TOKEN_BYTES

Line = TypeVar("Line")
"""A connection, whatever that is to whoever has one."""


@dataclass(frozen=True, slots=True)
class RelayLimits:
    """What a relay takes on, beside bytes per second.

    Attributes:
        providers: peers that it serves; `providers_per_block`: of one block of addresses.
        calls: clients' connections, those that wait for their peer counted; `calls_per_provider`: of one peer;
            `calls_per_block`: of one block of addresses.
        waiting_per_provider: of these, such as wait for the peer.
        seeks: clients that want to meet their peer here; `seeks_per_provider`: one peer; `seeks_per_block`: of one
            block of addresses.
        strangers: connections of which nobody knows yet what they are; `strangers_per_block`: of one block of
            addresses.
        hello_s: seconds in which a connection says what it is.
        dial_s: seconds in which a peer comes for a client.
        idle_s: seconds without a byte after which a client's connection is ended.
        silent_s: seconds without a word after which a registered peer is forgotten.
        meet_s: seconds in which two that have met here find a way without the relay.
    """

    providers: int = 64
    providers_per_block: int = 8
    calls: int = 256
    calls_per_provider: int = 64
    calls_per_block: int = 48
    waiting_per_provider: int = 16
    seeks: int = 64
    seeks_per_provider: int = 16
    seeks_per_block: int = 8
    strangers: int = 128
    strangers_per_block: int = 32
    hello_s: float = 5.0
    dial_s: float = 5.0
    idle_s: float = 120.0
    silent_s: float = 45.0
    meet_s: float = 10.0


@dataclass(frozen=True, slots=True)
class _Provider(Generic[Line]):
    line: Line
    block: str


@dataclass(frozen=True, slots=True)
class Call(Generic[Line]):
    """A client's connection, or wish for one: to the peer of that name, from that block of addresses. A client that
    `seeks` wants to meet it, and to have the relay carry nothing."""

    name: str
    block: str
    client: Line
    seeks: bool = False


class _Tally(Generic[Line]):
    """Calls of one kind that there are."""

    def __init__(self) -> None:
        self.by_name: Counter[str] = Counter()
        self.by_block: Counter[str] = Counter()  # from which they come

    @property
    def total(self) -> int:
        return self.by_name.total()

    def add(self, call: Call[Line]) -> None:
        self.by_name[call.name] += 1
        self.by_block[call.block] += 1

    def remove(self, call: Call[Line]) -> None:
        _less(self.by_name, call.name)
        _less(self.by_block, call.block)


class Switchboard(Generic[Line]):
    """Finds a client's peer by the name in its certificate."""

    def __init__(self, limits: RelayLimits) -> None:
        self._limits = limits
        self._providers: dict[str, _Provider[Line]] = {}  # by name
        self._waiting: dict[bytes, Call[Line]] = {}  # by token
        self._calls: _Tally[Line] = _Tally()
        self._seeks: _Tally[Line] = _Tally()
        self._strangers: Counter[str] = Counter()  # by block

    @property
    def places_left(self) -> int:
        """How many more peers may register."""
        return max(0, self._limits.providers - len(self._providers))

    @property
    def providers(self) -> int:
        return len(self._providers)

    @property
    def calls(self) -> int:
        """Clients' connections, those that wait counted."""
        return self._calls.total

    @property
    def seeks(self) -> int:
        """Clients that want to meet their peer, or have just done so."""
        return self._seeks.total

    # ------------------------------------------------------------------ who comes

    def greet(self, block: str) -> bool:
        """May somebody come from this block of addresses, to say what they want? If so, `leave` later."""
        if (
            self._strangers.total() >= self._limits.strangers
            or self._strangers[block] >= self._limits.strangers_per_block
        ):
            return False
        self._strangers[block] += 1
        return True

    def leave(self, block: str) -> None:
        """One who was greeted is none of the strangers any more."""
        _less(self._strangers, block)

    # ------------------------------------------------------------------ peers

    def register(self, name: str, line: Line, block: str) -> Line | None:
        """From now on clients who ask for `name` are `line`'s. Returns the line that was before it, to be closed.

        Raises:
            PeerFull: there is no place.
        """
        before = self._providers.get(name)
        if before is None:
            near = sum(1 for provider in self._providers.values() if provider.block == block)
            if not self.places_left or near >= self._limits.providers_per_block:
                raise PeerFull("this relay serves as many peers as it can")
        self._providers[name] = _Provider(line, block)
        return None if before is None else before.line

    def unregister(self, name: str, line: Line) -> None:
        """The peer's line has ended; nothing, if it has another one by now."""
        if name in self._providers and self._providers[name].line is line:
            del self._providers[name]

    # ------------------------------------------------------------------ clients

    def call(self, name: str, client: Line, block: str, *, seeks: bool = False) -> tuple[bytes, Line]:
        """A client asks for `name`. Returns the token with which the peer shall come, and its line, to be told.

        The call counts until `hang_up`.

        Raises:
            PeerLost: nobody of that name is registered.
            PeerFull: there are too many clients: here, for that peer, or from there.
        """
        provider = self._providers.get(name)
        if provider is None:
            raise PeerLost("no peer of that name is registered")
        call = Call(name, block, client, seeks)
        if seeks:
            self._admit_seek(call)
        else:
            self._admit(call)
        token = secrets.token_bytes(TOKEN_BYTES)
        self._waiting[token] = call
        return token, provider.line

    def call_self(self, name: str, client: Line, block: str) -> Call[Line]:
        """A client asks for `name`, who need not be told: the peer that has the relay. Counts until `hang_up`.

        Raises:
            PeerFull: as for `call`.
        """
        call = Call(name, block, client)
        self._admit(call)
        return call

    def _admit(self, call: Call[Line]) -> None:
        waiting = sum(1 for other in self._waiting.values() if other.name == call.name and not other.seeks)
        if (
            self.calls >= self._limits.calls
            or self._calls.by_name[call.name] >= self._limits.calls_per_provider
            or self._calls.by_block[call.block] >= self._limits.calls_per_block
            or waiting >= self._limits.waiting_per_provider
        ):
            raise PeerFull("this relay carries as many connections as it can")
        self._calls.add(call)

    def _admit_seek(self, call: Call[Line]) -> None:
        """Counted for themselves: a peer that does not come to meetings is still there for calls."""
        if (
            self.seeks >= self._limits.seeks
            or self._seeks.by_name[call.name] >= self._limits.seeks_per_provider
            or self._seeks.by_block[call.block] >= self._limits.seeks_per_block
        ):
            raise PeerFull("at this relay as many meet as can")
        self._seeks.add(call)

    def answer(self, token: bytes) -> Call[Line] | None:
        """The call for which a peer has come; None: nobody waits with that token any longer."""
        return self._waiting.pop(token, None)

    def hang_up(self, call: Call[Line]) -> None:
        """The call has ended."""
        (self._seeks if call.seeks else self._calls).remove(call)


def _less(counter: Counter[str], key: str) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
