"""Inputs as little programs: what the far ends of connections do, and how time passes.

A `Play` performs one; the functions below write right ones, from which a fuzzer breeds others.
"""

from __future__ import annotations

import asyncio
import random
from functools import lru_cache

from protocol.relay_frames import Frame
from tests.fuzz.source import Source
from tests.fuzz.wires import READ_BYTES, Clockwork, Wire, settle

TIMES_S = (0.01, 0.2, 1.0, 4.9, 5.1, 11.0, 21.0, 60.0)
MAX_WIRES = 16
MAX_SAID = 2 << 20  # bytes of one input's connections together
TAIL_BYTES = 4  # times the square of a byte
MAX_PIECES = 4096  # of one saying
TURNS = 100_000

SAY, END, RESET, STALL, TAKE, EAGER, PASS, DIALS, OWN, OPEN = range(N_OPERATIONS := 10)
"""What is done next. `AT_ONCE` is added where the next thing is done before anything comes of it, `IN_A_TURN` where the
loop turns once."""
AT_ONCE, IN_A_TURN = 64, 128
RAW, FILL, PROOF, TOKEN, HELLO, SEEK, HERE = range(N_PHRASES := 7)
"""What is said; those after `FILL` are a harness's own."""
TAKEN, REFUSED, HANGS, GONE = range(N_DIALS := 4)
"""What comes of dialling."""


class Play:
    """One program, and what it has come to. A harness says what its own operations and phrases are.

    Attributes:
        wires: all connections, in the order in which they came.
        dials: what comes of dialling.
        is_open: does the port listen of the peer that has the relay, or the tether?
    """

    def __init__(self, loop: Clockwork, source: Source) -> None:
        self.loop = loop
        self.source = source
        self.wires: list[Wire] = []
        self.dials = TAKEN
        self.is_open = True
        self._said = 0
        loop.dial = self.dialled

    async def perform(self) -> None:
        """All of it; `check` after each step, when nothing more comes of that without time."""
        while self.source.left:
            kind = self.source.byte()
            await self._do(kind % AT_ONCE % N_OPERATIONS)
            if kind < AT_ONCE:
                await settle(TURNS)
                self.check()
            elif kind >= IN_A_TURN:
                await settle(1)

    async def _do(self, operation: int) -> None:
        if operation == OPEN:
            self.opened(self.source.byte())
        elif operation == PASS:
            await self.passes(self.source.pick(TIMES_S))
        elif operation == DIALS:
            self.dials = self.source.byte() % N_DIALS
        elif operation == OWN:
            self.is_open = not self.is_open
        elif self.wires:
            wire = self.source.pick(self.wires)
            if operation == SAY:
                self._say(wire)
            elif operation == EAGER:
                wire.is_eager = True
            else:
                {END: wire.end, RESET: wire.reset, STALL: wire.stall, TAKE: wire.take}[operation]()

    def _say(self, wire: Wire) -> None:
        piece = self.source.byte() or READ_BYTES
        kind = self.source.byte() % N_PHRASES
        if kind == RAW:
            data = self.source.raw(int.from_bytes(self.source.raw(2), "little"))
        elif kind == FILL:
            data = self._noise(wire, (self.source.byte() + 1) << 12)
        else:
            data = self.phrase(kind)
            data += self._noise(wire, TAIL_BYTES * self.source.byte() ** 2)
        self._said += len(data)
        if self._said <= MAX_SAID:
            wire.say(data, max(piece, len(data) // MAX_PIECES))

    def _noise(self, wire: Wire, nbytes: int) -> bytes:
        """Bytes that no other connection says, and this one says nowhere else."""
        noise = _noise_of(wire.number)
        at = self._said % len(noise)
        return (noise * (2 + nbytes // len(noise)))[at : at + nbytes]

    async def passes(self, seconds: float) -> None:
        """Time passes."""
        await asyncio.sleep(seconds)
        await settle(TURNS)

    def wire(self, host: str, *, is_gone: bool = False) -> Wire | None:
        """One more connection, if there may be one."""
        if len(self.wires) == MAX_WIRES:
            return None
        self.wires.append(Wire(self.loop, host, len(self.wires), is_gone=is_gone))
        return self.wires[-1]

    async def dialled(self, host: str, port: int) -> Wire:
        """For the loop."""
        if self.dials == HANGS:
            await asyncio.sleep(1e3)
        wire = self.wire(host, is_gone=self.dials == GONE) if self.dials in (TAKEN, GONE) else None
        if wire is None:
            raise ConnectionRefusedError("nobody is there")
        return wire

    # ------------------------------------------------------------------ the harness's own

    def opened(self, choice: int) -> None:
        """A connection comes from outside."""

    def phrase(self, kind: int) -> bytes:
        """What is said, of the kinds after `FILL`; more may follow at once."""
        return b""

    def check(self) -> None:
        """While it goes on.

        Raises:
            AssertionError: something is not as it must be.
        """


@lru_cache
def _noise_of(number: int) -> bytes:
    return random.Random(number).randbytes(65521)


# ---------------------------------------------------------------------------- right programs


def opens(choice: int = 0) -> bytes:
    """One more connection."""
    return bytes([OPEN, choice])


def says(wire: int, phrase: bytes, piece: int = 0) -> bytes:
    """The far end of that connection says a phrase, of which so many bytes arrive at once; 0: all that can."""
    return bytes([SAY, wire, piece]) + phrase


def raw(*frames: Frame | bytes) -> bytes:
    """These frames, or bytes."""
    data = b"".join(each.encode() if isinstance(each, Frame) else each for each in frames)
    return bytes([RAW]) + len(data).to_bytes(2, "little") + data


def fills(pages: int) -> bytes:
    """So many times 4 KiB."""
    return bytes([FILL, pages - 1])


def does(operation: int, *what: int) -> bytes:
    """An operation with one connection, one choice, or neither."""
    return bytes([operation, *what])


def at_once(step: bytes) -> bytes:
    """The step, and the next one before anything has come of it."""
    return bytes([step[0] + AT_ONCE]) + step[1:]


def in_a_turn(step: bytes) -> bytes:
    """The step, and the next one before all has come of it that may."""
    return bytes([step[0] + IN_A_TURN]) + step[1:]


def passes(seconds: float) -> bytes:
    """So much time, of `TIMES_S`."""
    return bytes([PASS, TIMES_S.index(seconds)])
