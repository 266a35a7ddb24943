"""What a scenario found: bars, tables and curves, kept as JSON with the machine and the versions it was found with."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, Literal

import psutil

from benchmarks.timing import Spread

ROOT: Final = Path(__file__).parents[1]
FOLDER: Final = ROOT / "docs" / "performance"
VERSIONS: Final = ("potluck", "torch", "transformers", "grpcio", "hivemind", "numpy")


@dataclass(frozen=True, slots=True)
class Bar:
    """A number to hold.

    Attributes:
        value: what was measured, a median.
        limit: what it is held against: it must be `at least` or `at most` that.
    """

    what: str
    value: float
    sense: Literal["at least", "at most"]
    limit: float
    unit: str = "x"

    @property
    def holds(self) -> bool:
        return self.value >= self.limit if self.sense == "at least" else self.value <= self.limit

    @property
    def verdict(self) -> str:
        """`holds`, or by how much it is missed."""
        return "holds" if self.holds else f"missed by {abs(self.value / self.limit - 1):.0%}"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text below a head."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Curve:
    """A named line; each y with its least and most."""

    name: str
    xs: Sequence[float]
    ys: Sequence[Spread]

    @classmethod
    def of(cls, name: str, points: Mapping[float, Sequence[float]]) -> Curve:
        """Of what was measured at each x."""
        return cls(name, list(points), [Spread.of(values) for values in points.values()])


@dataclass(frozen=True, slots=True)
class Plot:
    """Curves over one axis."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    log_x: bool = False


@dataclass(frozen=True, slots=True)
class Result:
    """Everything about one scenario; `notes` are sentences on how it was measured."""

    scenario: str
    title: str
    notes: str
    bars: Sequence[Bar] = ()
    tables: Sequence[Table] = ()
    plots: Sequence[Plot] = ()
    raw: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Origin:
    """Where and with what it was found."""

    cpu: str
    cores: int
    memory_gib: float
    system: str
    python: str
    versions: Mapping[str, str]
    commit: str
    date: str
    took_s: float

    @property
    def machine(self) -> str:
        return f"{self.cpu}, {self.cores} cores, {self.memory_gib:.0f} GiB, {self.system}, Python {self.python}"


def origin(took_s: float) -> Origin:
    """This machine and this checkout, now."""
    return Origin(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=psutil.virtual_memory().total / 2**30,
        system=platform.system(),
        python=platform.python_version(),
        versions={name: version(name) for name in VERSIONS},
        commit=_commit(),
        date=time.strftime("%Y-%m-%d"),
        took_s=round(took_s, 1),
    )


def _cpu() -> str:
    import torch

    names = [line.partition(":")[2].strip() for line in _lines(Path("/proc/cpuinfo")) if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def _commit() -> str:
    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = "with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', '--short', 'HEAD') or 'unknown'} {changed}".strip()


def save(result: Result, where: Origin, folder: Path = FOLDER) -> Path:
    """As `NAME.json` in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result.scenario}.json"
    path.write_text(json.dumps({"result": asdict(result), "origin": asdict(where)}, indent=1) + "\n")
    return path


def load(path: Path) -> tuple[Result, Origin]:
    """What `save` wrote."""
    found = json.loads(path.read_text())
    fields = found["result"]
    fields["bars"] = [Bar(**bar) for bar in fields["bars"]]
    fields["tables"] = [Table(**table) for table in fields["tables"]]
    fields["plots"] = [_plot(plot) for plot in fields["plots"]]
    return Result(**fields), Origin(**found["origin"])


def _plot(fields: dict[str, Any]) -> Plot:
    curves = [Curve(c["name"], c["xs"], [Spread(**y) for y in c["ys"]]) for c in fields.pop("curves")]
    return Plot(**fields, curves=curves)
