"""What the runs of the chaos suite came to: a table, JSON, and what of it is a failure."""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

BARS_S: Mapping[str, float] = {"kill -9": 1.0, "freeze": 3.0, "black hole": 3.0, "black link": 3.0, "slow loris": 5.0}
"""How much longer an answer may take, by kind of fault. A slow link and a peer that leaves are only reported."""


@dataclass(frozen=True)
class Run:
    """One disturbed answer.

    Attributes:
        trouble: "" if the answer was right and all went as it must.
        extra_s: the answer's time less the median of undisturbed ones.
        pause_s: the longest pause, between the question, the tokens and the end.
        usual_pause_s: the same of undisturbed answers, their median.
        settled_s: until the swarm was whole and the case known, before.
    """

    number: int
    fault: str
    kind: str
    moment: str
    victims: int
    case: str
    trouble: str
    extra_s: float
    pause_s: float
    usual_pause_s: float
    settled_s: float
    reroutes: int
    events: tuple[str, ...] = ()

    def over(self, slack: float) -> str:
        """How the run is over its bar, in words; "" if it is not."""
        bar_s = BARS_S.get(self.kind, math.inf) * slack
        return f"{self.extra_s:.2f} s extra, allowed are {bar_s:g} s" if self.extra_s > bar_s else ""


def table(runs: Sequence[Run]) -> str:
    """By kind of fault and moment."""
    head = f"{'fault':<12} {'moment':<8} {'runs':>4} {'bad':>4} {'median s':>9} {'worst':>6} {'longest pause':>14}"
    lines = [head, "-" * len(head)]
    for kind in sorted({run.kind for run in runs}):
        of_kind = [run for run in runs if run.kind == kind]
        lines.append(_row(kind, "", of_kind))
        for moment in sorted({run.moment for run in of_kind}):
            lines.append(_row("", moment, [run for run in of_kind if run.moment == moment]))
    return "\n".join([*lines, _row("all", "", runs)] if runs else lines)


def _row(kind: str, moment: str, runs: Sequence[Run]) -> str:
    bad = sum(1 for run in runs if run.trouble)
    extra_s, pause_s = [run.extra_s for run in runs], [run.pause_s for run in runs]
    return (
        f"{kind:<12} {moment:<8} {len(runs):>4} {bad:>4} {statistics.median(extra_s):>9.2f} {max(extra_s):>6.2f} "
        f"{max(pause_s):>14.2f}"
    )


def write(path: Path, seed: int, runs: Sequence[Run]) -> None:
    """All of it, as JSON."""
    kinds = {run.kind for run in runs}
    worst = {kind: max(run.extra_s for run in runs if run.kind == kind) for kind in sorted(kinds)}
    content = {"seed": seed, "worst_extra_s": worst, "runs": [dataclasses.asdict(run) for run in runs]}
    path.write_text(json.dumps(content, indent=1) + "\n")


def failures(runs: Sequence[Run], slack: float) -> list[str]:
    """One sentence for each run that is not as it must be."""
    found = []
    for run in runs:
        reasons = [reason for reason in (run.trouble, run.over(slack)) if reason]
        if reasons:
            found.append(f"run {run.number}, {run.fault} ({run.case}): {'; '.join(reasons)}")
    return found
