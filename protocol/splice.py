"""Two connections joined, so that what comes in at one goes out at the other, no faster than that takes it.

Bytes are read only while the other end has room: of each direction there is at most one read and one write buffer in
memory, however slow a reader is. Sockets are asyncio's, and reads are large (uvloop's 256 KiB): a relay does as little
per byte as it can.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

WRITE_BUFFER_BYTES = 256 << 10
LINGER_S = 5.0  # for what is on its way out when the other connection has ended


class Splice:
    """Joins `first` and `second`, which are protocols for two connections. Ends with the first of them that breaks, or
    when both have said that nothing more will come.

    Args:
        carried: told of bytes as they are carried; says for how many seconds the connection that they came from rests.
        ended: called once, after the end.

    Attributes:
        used_s: when something was carried last, by the loop's clock.
    """

    def __init__(
        self, carried: Callable[[int], float] = lambda _: 0.0, ended: Callable[[], None] = lambda: None
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._carried = carried
        self._ended = ended
        self._open = 2
        self.is_over = False
        self.used_s = self._loop.time()
        self.first = End(self)
        self.second = End(self)
        self.first.other, self.second.other = self.second, self.first

    def carry(self, came: End, data: bytes) -> float:
        """Hands on what came in at one end; returns for how long it rests."""
        assert came.other is not None
        came.other.write(data)
        self.used_s = self._loop.time()
        return self._carried(len(data))

    def finished(self) -> None:
        """One end will say no more; for the ends only."""
        self._open -= 1
        if not self._open:
            self.close()

    def close(self) -> None:
        """Ends both connections, once what is on its way out is out."""
        if self.is_over:
            return
        self.is_over = True
        for end in (self.first, self.second):
            end.close()
        self._loop.call_later(LINGER_S, self.abort)
        self._ended()

    def abort(self) -> None:
        """Ends both connections at once."""
        self.close()
        for end in (self.first, self.second):
            end.abort()


class End(asyncio.Protocol):
    """One of the two connections. What comes before the other one is there waits."""

    def __init__(self, splice: Splice) -> None:
        self.other: End | None = None
        self._splice = splice
        self._transport: asyncio.Transport | None = None
        self._early: list[bytes] = []
        self._pauses: set[str] = set()
        self._resting: asyncio.TimerHandle | None = None

    @property
    def transport(self) -> asyncio.Transport | None:
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(WRITE_BUFFER_BYTES)
        if self._splice.is_over:
            self._transport.abort()
            return
        other = self.other
        assert other is not None
        if other._transport is None:
            self._pause("alone")
            return
        for end in (self, other):
            end._join()

    def _join(self) -> None:
        early, self._early = self._early, []
        for data in early:
            self._splice.carry(self, data)
        self._resume("alone")

    def adopt(self, transport: asyncio.Transport, received: bytes) -> None:
        """Takes over a connection, and what has been received on it."""
        if received:
            self._early.append(received)
        transport.set_protocol(self)
        self.connection_made(transport)

    def data_received(self, data: bytes) -> None:
        if self._splice.is_over:
            return
        if "alone" in self._pauses:
            self._early.append(data)
            return
        rest_s = self._splice.carry(self, data)
        if rest_s > 0:
            self._pause("rests")
            self._resting = asyncio.get_running_loop().call_later(rest_s, self._resume, "rests")

    def eof_received(self) -> bool:
        other = self.other
        if self._splice.is_over or other is None or other._transport is None:
            return False
        if other._transport.can_write_eof() and not other._transport.is_closing():
            other._transport.write_eof()
        self._splice.finished()
        return not self._splice.is_over

    def connection_lost(self, exc: Exception | None) -> None:
        if self._resting is not None:
            self._resting.cancel()
        self._splice.close()

    def pause_writing(self) -> None:
        if self.other is not None:
            self.other._pause("full")

    def resume_writing(self) -> None:
        if self.other is not None:
            self.other._resume("full")

    def write(self, data: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(data)

    def close(self) -> None:
        """Ends the connection when what is on its way out is out."""
        if self._resting is not None:
            self._resting.cancel()
        self._early.clear()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def _pause(self, why: str) -> None:
        self._pauses.add(why)
        if self._transport is not None and not self._transport.is_closing():
            self._transport.pause_reading()

    def _resume(self, why: str) -> None:
        self._pauses.discard(why)
        if not self._pauses and self._transport is not None and not self._transport.is_closing():
            self._transport.resume_reading()
