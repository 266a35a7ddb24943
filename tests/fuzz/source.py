"""Choices read off bytes, so that a fuzzer that only knows bytes can build values that are almost right."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

Item = TypeVar("Item")

NUMBERS = (
    0,
    1,
    2,
    3,
    5,
    7,
    8,
    63,
    64,
    65,
    127,
    128,
    255,
    256,
    4096,
    2**16,
    2**24,
    2**31 - 1,
    2**32 - 1,
    2**62,
    2**63 - 1,
)


class Source:
    """The same bytes, the same choices. When they run out, zeros follow."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        return len(self._data) - self._at

    def raw(self, nbytes: int) -> bytes:
        """So many bytes, or what is left."""
        taken = self._data[self._at : self._at + nbytes]
        self._at += len(taken)
        return taken

    def rest(self) -> bytes:
        return self.raw(self.left)

    def byte(self) -> int:
        return (self.raw(1) or b"\0")[0]

    def flag(self) -> bool:
        return self.byte() % 2 == 1

    def pick(self, items: Sequence[Item]) -> Item:
        """One of at most 256."""
        return items[self.byte() % len(items)]

    def number(self) -> int:
        """Small, remarkable, or any of 64 bits."""
        kind = self.byte()
        if kind < 160:
            return kind
        if kind < 224:
            return NUMBERS[kind % len(NUMBERS)]
        return int.from_bytes(self.raw(8), "little")

    def pieces(self) -> Iterator[bytes]:
        """The rest as pieces, each after its length in two bytes."""
        while self.left > 1:
            yield self.raw(int.from_bytes(self.raw(2), "little"))


def as_pieces(pieces: Sequence[bytes]) -> bytes:
    """What `Source.pieces` reads as these."""
    return b"".join(len(piece).to_bytes(2, "little") + piece for piece in pieces)
