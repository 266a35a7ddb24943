"""Inputs bred from seeds without looking at coverage, for short runs: the same number, the same inputs."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

REMARKABLE = (
    b"\0",
    b"\xff",
    b"\x7f",
    b"\x80",
    b"\xff\xff\xff\xff",
    b"\xff" * 9 + b"\1",
    b"NaN",
    b"1e999",
    b'"',
    b"[",
    b"{",
)


def bred(seeds: Sequence[bytes], number: int, seed: int, longest: int) -> Iterator[bytes]:
    """`number` inputs of at most `longest` bytes."""
    rng = random.Random(seed)
    for _ in range(number):
        if rng.random() < 0.1:
            yield rng.randbytes(rng.choice((0, 1, 2, 10, 100, longest)))
            continue
        data = bytearray(rng.choice(seeds))
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            _change(rng, data, seeds)
        yield bytes(data[:longest])


def _change(rng: random.Random, data: bytearray, seeds: Sequence[bytes]) -> None:
    at = rng.randrange(len(data) + 1)
    stop = min(len(data), at + rng.choice((1, 1, 2, 4, 16, 64)))
    match rng.randrange(8):
        case 0 | 1 if at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        case 2 if at < len(data):
            data[at] = rng.randrange(256)
        case 3:
            del data[at:stop]
        case 4:
            data[at:at] = data[at:stop] * rng.choice((1, 1, 2, 50))
        case 5:
            data[at:stop] = rng.choice(REMARKABLE)
        case 6:
            other = rng.choice(seeds)
            data[at:] = other[rng.randrange(len(other) + 1) :]
        case _:
            data[at:at] = rng.randbytes(rng.randint(1, 8))
