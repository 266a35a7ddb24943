"""What is fuzzed: pure functions of bytes, each with the limits of one input.

A harness may raise nothing: it catches the errors of `protocol/errors.py` that its docstring allows, and all others are
findings. So is an input that takes more processor time or memory than the harness declares.
"""

from __future__ import annotations

import gc
import importlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

FOUND = Path(__file__).parent / "found"
"""Inputs that once broke something, `TARGET-...`; all of them are replayed by `make test`."""

PURE = ("codecs", "messages", "frames", "replies", "records", "node", "view", "requests", "headers", "relay", "tether")
"""The harnesses: modules beside this one, each with a `TARGET`. To add one: write the module, a `run` that takes bytes
and a `seeds` that makes right ones, and name it here; all runs, short and long, follow."""


@dataclass(frozen=True, slots=True)
class Target:
    """One harness.

    Attributes:
        run: takes one input.
        seeds: makes valid inputs, few and small, from which others are bred.
        modules: of ours, that this is to cover.
        cpu_s: processor time that one input may take.
        nbytes: by which one input may raise the process's peak of memory.
        longest: bytes of an input.
        short: inputs in `make test`.
    """

    name: str
    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]
    modules: tuple[str, ...]
    cpu_s: float = 0.5
    nbytes: int = 32 << 20
    longest: int = 4096
    short: int = 2000


class TooMuch(AssertionError):
    """An input took more time or memory than it may."""


class Guarded:
    """A target under its limits. Runs the seeds first: what is only made once is not the fault of an input."""

    def __init__(self, target: Target) -> None:
        self._target = target
        for seed in target.seeds():
            target.run(seed)
        gc.collect()
        gc.freeze()  # else a collection of all that pytest has imported would count as an input's
        Path("/proc/self/clear_refs").write_text("5")  # the peak of memory begins anew

    def __call__(self, data: bytes) -> None:
        before, started_s = peak_bytes(), time.process_time()
        self._target.run(data)
        took_s = time.process_time() - started_s
        if took_s > self._target.cpu_s:
            raise TooMuch(f"{len(data)} bytes took {took_s:.2f} s; {self._target.cpu_s} s are allowed")
        if (took := peak_bytes() - before) > self._target.nbytes:
            raise TooMuch(f"{len(data)} bytes took {took >> 20} MiB; {self._target.nbytes >> 20} are allowed")


def peak_bytes() -> int:
    """The most memory that this process has had at once, since its peak was begun anew."""
    with open("/proc/self/status", "rb") as file:  # noqa: PTH123  # ten thousand times a second
        text = file.read()
    return int(text[text.index(b"VmHWM:") + 6 : text.index(b"VmHWM:") + 24].split()[0]) << 10


def load(name: str) -> Target:
    """The target of that name."""
    target: Target = importlib.import_module(f"tests.fuzz.{name}").TARGET
    assert target.name == name
    return target


def found(name: str) -> Sequence[Path]:
    """Inputs that once broke that target."""
    return sorted(FOUND.glob(f"{name}-*"))


def can_limit() -> bool:
    """Is there a /proc in which the peak of memory can be begun anew?"""
    return os.access("/proc/self/clear_refs", os.W_OK)
