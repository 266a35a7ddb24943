"""`docs/performance.md`, from whatever results there are."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from benchmarks.plots import draw
from benchmarks.result import FOLDER, Bar, Origin, Result, Table, load
from benchmarks.scenarios import MEASURED

PAGE: Final = FOLDER.with_suffix(".md")

INTRODUCTION: Final = """\
# Performance

This page is written by `python -m benchmarks run NAME...`; what was measured is in `docs/performance/NAME.json`. All
peers and clients are processes of one machine. Each figure is a median, with the least and the most in parentheses.
Compare ratios, not seconds: each is taken between things that were measured in turns in one run, mostly against
`generate()` of the unsplit model (transformers, float32) on the same cores. Codec `int8` unless said. The models
`llama-small` (16 blocks of width 1024) and `llama-tiny` (8 of 256) are random and seeded: `benchmarks/models.py`.

Petals stands for version 2.2.0.post1 with the same models, measured in the same way on another two-core machine
(AVX-512), on loopback: its ratios to its own unsplit model are what can be compared. Codecs, answers that
compression costs, and swarms under churn have pages of their own: [codecs](codecs.md), [accuracy](accuracy.md),
[swarm](swarm.md).
"""


def write(folder: Path = FOLDER, page: Path = PAGE) -> None:
    """The page and its plots. Scenarios without a result are left out."""
    found = [load(folder / f"{name}.json") for name in MEASURED if (folder / f"{name}.json").is_file()]
    parts = [
        INTRODUCTION,
        "## Numbers to hold\n",
        bars_table([(result, bar) for result, _ in found for bar in result.bars]),
    ]
    for result, where in found:
        parts.append(section(result, where, folder.name))
        if result.plots:
            draw(result.plots, folder / f"{result.scenario}.svg")
    page.write_text("\n".join(parts), encoding="utf-8")


def bars_table(bars: Sequence[tuple[Result, Bar]]) -> str:
    """All bars of all results, in Markdown."""
    rows = [
        (result.scenario, bar.what, show(bar.value, bar.unit), f"{bar.sense} {show(bar.limit, bar.unit)}", bar.verdict)
        for result, bar in bars
    ]
    return markdown(Table(("scenario", "what", "measured", "bar", ""), rows))


def show(value: float, unit: str) -> str:
    """`1.02x`, `0.45 ms`."""
    number = f"{value:.2f}" if abs(value) < 100 else f"{value:.0f}"
    return f"{number}{unit if unit == 'x' else f' {unit}'}".rstrip()


def section(result: Result, where: Origin, folder: str) -> str:
    """One scenario, in Markdown."""
    parts = [f"## {result.title}\n", result.notes.strip() + "\n"]
    if result.plots:
        parts.append(f"![{result.title}]({folder}/{result.scenario}.svg)\n")
    for table in result.tables:
        parts += [f"**{table.title}**\n"] if table.title else []
        parts.append(markdown(table))
    versions = ", ".join(f"{name} {number}" for name, number in where.versions.items())
    parts.append(f"<sub>{where.date}, commit {where.commit}, {where.took_s:.0f} s; {where.machine}; {versions}</sub>\n")
    return "\n".join(parts)


def markdown(table: Table) -> str:
    """The table as Markdown."""
    lines = [f"| {' | '.join(table.head)} |", "|---" * len(table.head) + "|"]
    lines += [f"| {' | '.join(row)} |" for row in table.rows]
    return "\n".join(lines) + "\n"
