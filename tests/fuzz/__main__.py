"""The long run: `python -m tests.fuzz [TARGET...]`. Each harness for FUZZ_MINUTES (10), FUZZ_JOBS (1) at a time.

Minutes are of the processor, which others may want too; those of `surface`, which waits much, are the clock's. Prints a
table: minutes, of which it had the processor for so many; executions, and how many in a second of these; edges and
lines that were reached; the peak of memory, and by how much memory grew after the first fifth of the time; and by how
much, and over how many inputs, it grew in a process without the fuzzer, whose books grow (`tests.fuzz.growth`; of
`surface`: in its own process). What leaks, grows there. Exit code 1: something was found.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.fuzz.lines import Lines
from tests.fuzz.target import PURE, load

LOOK_S = 1.0
SETTLED = 0.2  # of the time: from then on memory should not grow
SHARE = 0.1  # of a processor, that a harness gets at least: by then it ends, whatever it had
OVER_S = 600.0  # beside its time, for imports and the count of lines; then it is ended, and counts as failed
GROWTH_S = 60.0  # of the processor, to see what a harness keeps
SHOWN_CHARS = 100_000  # of what a harness said that failed: the first of its lines names its seed
SURFACE = "surface"
ALL = (*PURE, SURFACE)
HEAD = ("target", "min", "CPU min", "executions", "per s", "edges", "lines", "MiB", "grown", "kept", "result")


@dataclass(frozen=True, slots=True)
class Run:
    """What came of one harness. Memory in bytes."""

    name: str
    code: int
    executions: int
    took_s: float
    cpu_s: float
    edges: int
    lines: tuple[int, int]
    peak: int
    grown: int
    kept: tuple[int, int]  # inputs, and bytes that grew over them without the fuzzer
    said: str

    @property
    def row(self) -> tuple[str, ...]:
        ran, total = self.lines
        return (
            self.name,
            f"{self.took_s / 60:.1f}",
            f"{self.cpu_s / 60:.1f}",
            f"{self.executions:,}",
            f"{self.executions / max(1.0, self.cpu_s):,.0f}",
            str(self.edges or "-"),
            f"{ran}/{total} ({ran / max(1, total):.0%})",
            f"{self.peak >> 20}",
            f"{self.grown / 2**20:+.1f}",
            f"{self.kept[1] / 2**20:+.1f} in {self.kept[0]:,}" if self.kept[0] else "-",
            "ok" if self.code == 0 else f"FAILED ({self.code})",
        )


async def _fuzz(name: str, seconds: int, folder: Path) -> Run:
    corpus = folder / name
    corpus.mkdir()
    is_guided = name != SURFACE
    module = "tests.fuzz.guided" if is_guided else "tests.fuzz.surface"
    at_most_s = int(seconds / SHARE) if is_guided else seconds
    log = folder / f"{name}.log"
    started_s = time.monotonic()
    with log.open("wb") as file:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", module, name, str(at_most_s), str(corpus), stdout=file, stderr=file
        )
        sizes: list[int] = []
        cpu_s, is_told = 0.0, False
        ended = asyncio.ensure_future(process.wait())
        try:
            async with asyncio.timeout(at_most_s + OVER_S):
                while not ended.done():
                    with contextlib.suppress(psutil.Error):  # it may end meanwhile
                        watched = psutil.Process(process.pid)
                        sizes.append(watched.memory_info().rss)
                        cpu_s = max(cpu_s, sum(watched.cpu_times()[:2]))
                        if is_guided and not is_told and cpu_s >= seconds:
                            is_told = True
                            watched.send_signal(signal.SIGUSR1)  # libFuzzer's word for "enough"
                    await asyncio.wait({ended}, timeout=LOOK_S)
        except TimeoutError:
            print(f"{name} did not end by itself")
        finally:
            if process.returncode is None:
                process.kill()
            code = await ended
    took_s, said = time.monotonic() - started_s, log.read_text(errors="replace")
    settled = sizes[int(SETTLED * len(sizes)) :] or [0]
    kept = (0, 0)
    if name == SURFACE:
        lines = _pair(r"lines: (\d+)/(\d+)", said)
    else:
        lines = await asyncio.to_thread(_lines_of, name, corpus)  # harnesses have event loops of their own
        if code == 0:
            code, kept = await _kept(name, corpus)
    return Run(
        name,
        code,
        executions=_number(r"stat::number_of_executed_units:\s*(\d+)", said) or _number(r"#(\d+)\s", said),
        took_s=took_s,
        cpu_s=cpu_s,
        edges=_number(r"cov: (\d+)", said),
        lines=lines,
        peak=max(sizes, default=0),
        grown=max(settled[-5:]) - settled[0],
        kept=kept,
        said=said,
    )


async def _kept(name: str, corpus: Path) -> tuple[int, tuple[int, int]]:
    """Exit code; and how many inputs were tried without the fuzzer, and by how many bytes that grew."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.fuzz.growth", name, str(GROWTH_S), str(corpus), stdout=asyncio.subprocess.PIPE
    )
    try:
        async with asyncio.timeout(GROWTH_S / SHARE + OVER_S):
            said, _ = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
    return process.returncode or 0, _pair(r"inputs: (\d+) kept: (-?\d+)", said.decode())


def _number(pattern: str, text: str) -> int:
    """The largest one: all of these only grow."""
    return max(map(int, re.findall(pattern, text)), default=0)


def _pair(pattern: str, text: str) -> tuple[int, int]:
    found = re.findall(pattern, text)
    return (int(found[-1][0]), int(found[-1][1])) if found else (0, 0)


def _lines_of(name: str, corpus: Path) -> tuple[int, int]:
    """The lines that the corpus reaches in the target's modules."""
    target = load(name)
    lines = Lines(target.modules)
    with lines.watching():
        for path in sorted(corpus.iterdir()):
            target.run(path.read_bytes())
    for missed in lines.missed():
        print(f"{name} missed {missed}")
    return lines.counts


def _table(rows: Sequence[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))


async def main(names: Sequence[str]) -> int:
    """Returns the exit code."""
    seconds = int(float(os.environ.get("FUZZ_MINUTES", "10")) * 60)
    places = asyncio.Semaphore(int(os.environ.get("FUZZ_JOBS", "1")))

    async def one(name: str, folder: Path) -> Run:
        async with places:
            run = await _fuzz(name, seconds, folder)
        print("  ".join(run.row), flush=True)
        if run.code != 0:
            print(run.said[-SHOWN_CHARS:], flush=True)
        return run

    with tempfile.TemporaryDirectory(prefix="potluck-fuzz-") as folder:
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(one(name, Path(folder))) for name in names]
    runs = [task.result() for task in running]
    print("\n".join(_table([HEAD, *(run.row for run in runs)])))
    return int(any(run.code != 0 for run in runs))


if __name__ == "__main__":
    chosen = sys.argv[1:] or ALL
    if unknown := set(chosen) - set(ALL):
        sys.exit(f"no target {', '.join(sorted(unknown))}; there are: {', '.join(ALL)}")
    sys.exit(asyncio.run(main(chosen)))
