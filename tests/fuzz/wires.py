"""Connections in memory and a clock that is turned by hand, for protocols of asyncio: no sockets, always the same.

A `Wire` does what transports of asyncio and uvloop do, and where these differ, what is harder on a protocol.
"""

from __future__ import annotations

import asyncio
import atexit
import selectors
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any, cast

FIRST_PORT = 1024
READ_BYTES = 256 << 10  # that uvloop reads at most at once


class Clockwork(asyncio.SelectorEventLoop):
    """A loop in which time passes only when there is nothing else to do, and then at once.

    Attributes:
        dial: what comes of `create_connection`: a wire, or an OSError; set by whoever uses the loop.
        escaped: exceptions of callbacks and tasks that nobody caught.
    """

    def __init__(self) -> None:
        self._clock = _Clock()
        super().__init__(self._clock)
        self.dial: Callable[[str, int], Coroutine[Any, Any, Wire]] = _nobody
        self.escaped: list[BaseException] = []
        atexit.register(self.close)  # a harness has one, for as long as the process
        self.set_exception_handler(lambda _, context: self.escaped.append(_exception(context)))

    def time(self) -> float:
        return self._clock.now_s

    async def create_connection(  # type: ignore[override]  # no more of it than is used
        self, protocol_factory: Callable[[], asyncio.Protocol], host: str, port: int, **_: Any
    ) -> tuple[asyncio.Transport, asyncio.Protocol]:
        wire = await self.dial(host, port)
        protocol = protocol_factory()
        begun: asyncio.Future[None] = self.create_future()
        self.call_soon(wire.begin, protocol)
        self.call_soon(_done, begun)
        try:
            await begun
        except BaseException:
            wire.close()
            raise
        return wire, protocol

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:  # type: ignore[override]
        done: asyncio.Future[Any] = self.create_future()
        done.set_result(func(*args))
        return done

    def rewind(self) -> None:
        """The clock begins anew; no timer may be left.

        Raises:
            AssertionError: something would still happen.
        """
        left = [handle for handle in cast("Any", self)._scheduled if not handle.cancelled()]
        assert not left, f"timers are left: {left}"
        self._clock.now_s = 0.0


class _Clock(selectors.SelectSelector):
    now_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing would ever happen again"
        self.now_s += max(0.0, timeout)
        return []


class Wire(asyncio.Transport):
    """One connection: the transport that a protocol has, and the far end, for whoever plays that.

    Args:
        host: the far end's address.
        number: of this wire, from which its port follows.
        is_gone: the far end was gone before anybody could ask where it is.

    Attributes:
        at: where the far end is.
        given: all bytes that the protocol has been given; `sent`: all that have arrived at the far end.
        waiting: bytes that the protocol has written and the far end has not taken yet.
        has_ended: the protocol knows that the far end will write no more.
        is_eager: as with some transports, one more read comes after `pause_reading`.
        is_lost: `connection_lost` has been called; `was_cut`: something that was waiting may never have been sent.
        protocols: all that have had this transport, in order.
    """

    def __init__(self, loop: Clockwork, host: str, number: int, *, is_gone: bool = False) -> None:
        self.number = number
        self.at = host, FIRST_PORT + number
        super().__init__({"peername": None if is_gone else self.at, "sockname": ("127.0.0.1", self.at[1])})
        self.given = bytearray()
        self.sent = bytearray()
        self.waiting = bytearray()
        self.has_ended = self.is_eager = False
        self.is_lost = self.was_cut = False
        self.protocols: list[asyncio.Protocol] = []
        self._loop = loop
        self._incoming: deque[bytes] = deque()
        self._ends, self._is_reset = False, is_gone
        self._is_stalled = False
        self._is_reading = True
        self._spare = 0
        self._is_closing = self._is_ending = self._has_eof = False
        self._high, self._is_full = 64 << 10, False

    # ------------------------------------------------------------------ the far end

    def begin(self, protocol: asyncio.Protocol) -> None:
        """The connection is there."""
        self.protocols.append(protocol)
        protocol.connection_made(self)
        self._loop.call_soon(self._read)

    def say(self, data: bytes, piece: int = READ_BYTES) -> None:
        """The far end writes, and the protocol shall read so many bytes at once."""
        if self._ends or self._is_reset:
            return
        self._incoming.extend(data[at : at + piece] for at in range(0, len(data), piece))
        self._loop.call_soon(self._read)

    def end(self) -> None:
        """The far end will write no more."""
        self._ends = True
        self._loop.call_soon(self._read)

    def reset(self) -> None:
        """The far end is gone; who neither reads nor writes does not hear of it."""
        self._is_reset = True
        self._incoming.clear()
        self._loop.call_soon(self._read)

    def stall(self) -> None:
        """The far end takes nothing any more."""
        self._is_stalled = True

    def take(self) -> None:
        """The far end takes what is waiting, and what comes after it."""
        self._is_stalled = False
        self._loop.call_soon(self._flush)

    def _read(self) -> None:
        if self._is_closing or not self.protocols or not (self._is_reading or self._spare):
            return
        if self._is_reset:
            self._break(ConnectionResetError("reset by the far end"))
        elif self._incoming:
            self._spare = 0
            data = self._incoming.popleft()
            self.given += data
            self._loop.call_soon(self._read)
            self.protocols[-1].data_received(data)
        elif self._ends and self._is_reading:
            self._is_reading, self.has_ended = False, True
            if not self.protocols[-1].eof_received():
                self.close()

    def _flush(self) -> None:
        if self._is_stalled or self._is_ending or not self.waiting:
            return
        self.sent += self.waiting
        self.waiting.clear()
        if self._is_full:
            self._is_full = False
            self.protocols[-1].resume_writing()
        if self._is_closing:
            self._lose(None)

    # ------------------------------------------------------------------ the transport

    def get_protocol(self) -> asyncio.BaseProtocol:
        return self.protocols[-1]

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        self.protocols.append(cast("asyncio.Protocol", protocol))

    def is_closing(self) -> bool:
        return self._is_closing

    def is_reading(self) -> bool:
        return self._is_reading and not self._is_closing

    def pause_reading(self) -> None:
        if self.is_reading():
            self._is_reading = False
            self._spare = int(self.is_eager)

    def resume_reading(self) -> None:
        if not self._is_closing and not self._is_reading:
            self._is_reading = True
            self._loop.call_soon(self._read)

    def write(self, data: Any) -> None:
        if self._has_eof or self.is_lost:  # the latter by uvloop
            raise RuntimeError("written after the end")
        if self._is_ending or not data:
            return
        if self._is_reset:
            self._break(ConnectionResetError("reset by the far end"))
        elif self._is_stalled or self.waiting:
            self.waiting += data
            if len(self.waiting) > self._high and not self._is_full:
                self._is_full = True
                self.protocols[-1].pause_writing()
        else:
            self.sent += data

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if self.is_lost:  # by uvloop
            raise RuntimeError("ended after the end")
        self._has_eof = self._has_eof or not self._is_closing

    def get_write_buffer_size(self) -> int:
        return len(self.waiting)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        if self.is_lost:  # by uvloop
            raise RuntimeError("changed after the end")
        assert high is not None
        self._high = high

    def close(self) -> None:
        if self._is_closing:
            return
        self._is_closing = True
        if not self.waiting:
            self._lose(None)

    def abort(self) -> None:
        self._break(None)

    def _break(self, error: Exception | None) -> None:
        if self._is_ending:
            return
        self._is_closing = self.was_cut = True
        self.waiting.clear()
        self._lose(error)

    def _lose(self, error: Exception | None) -> None:
        self._is_ending = True
        self._loop.call_soon(self._lost, error)

    def _lost(self, error: Exception | None) -> None:
        self.is_lost = True
        if self.protocols:
            self.protocols[-1].connection_lost(error)


async def settle(turns: int) -> None:
    """Lets happen what would happen without any time, for so many turns of the loop at most."""
    loop: Any = asyncio.get_running_loop()
    for _ in range(turns):
        await asyncio.sleep(0)
        if not loop._ready:
            return


def _done(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


async def _nobody(host: str, port: int) -> Wire:
    raise ConnectionRefusedError(f"nobody is at {host} {port}")


def _exception(context: dict[str, Any]) -> BaseException:
    found = context.get("exception")
    return found if isinstance(found, BaseException) else AssertionError(context["message"])
