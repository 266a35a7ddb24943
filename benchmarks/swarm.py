"""A simulated swarm under churn: coverage, moves, throughput. `python -m benchmarks swarm`; writes `docs/swarm.md`."""

from __future__ import annotations

import random
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, fields, replace
from multiprocessing import get_context
from pathlib import Path
from textwrap import fill
from typing import Any, Final

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.swarm_optimum import Case, joined, optimum, random_case, rebalanced, weakest
from benchmarks.swarm_peers import DHT
from benchmarks.swarm_plot import Panel, svg
from benchmarks.swarm_report import Figures, Row, client_rows, simulate, swarm_rows
from benchmarks.swarm_scenario import Scenario
from peer.placement import MovePolicy

DOCS: Final = Path(__file__).parents[1] / "docs"
PAGE: Final = DOCS / "swarm.md"
PLOT: Final = DOCS / "swarm.svg"
REPLICAS: Final = (1, 2, 3)
SMALL_CASES: Final = 200
CALM_HOURS: Final = 6.0
DEFAULT: Final = Scenario()
QUICK: Final = Scenario(peers=200, hours=3.0)
"""What `make bench` runs."""
ONE_MODEL: Final = Scenario(peers=400, hours=1.0, replicas=0.0)
"""A view of many peers of one model takes long to make: these are fewer."""

INTRODUCTION: Final = """\
# A swarm under churn, simulated

This page is written by `python -m benchmarks swarm --page{options}`; `make bench` writes it from fewer peers and hours.
The seed was {seed}: the same one gives the same figures.

**What is real.** Peers find their place and move by `peer.placement`, and claim it and make sure of it by
`peer.claim` and `peer.balance`. What they announce is merged into views by `dht.view`, stamped and expiring as in
`dht.announcer` and `dht.config`: every {announce_s:g} s, gone after {expiry_s:g} s, read every {refresh_s:g} s.
Clients choose chains by `client.chain`, blame by `client.blame`, wait by `client.deadline`; `client.recovery` says who
has to be told everything. Peers publish round trips to those that `peer.neighbours` finds likely to come next.

**What is simulated.** The clock. {peers} machines with {least_blocks} to {most_blocks} blocks of memory (log-uniform),
log-normal speed and bandwidth (sigma {speed_spread:g}), and a place on a plane of {world_ms:g} x {world_ms:g} ms. The
time to load, {block_mib:g} MiB per block at {line_mib_per_s:g} MiB/s in the median, and to drain, {drain_s:g} s. A peer
stays for {mean_stay_h:g} h on average (exponential); {silent:.0%} of those that leave say nothing, and half of these do
not even refuse connections. A stranger with a machine of the same make comes at once; it does not know which place
became free. A machine that moves has no room for a second span: it drains, loads what it has not, and serves again. For
r replicas there are so many models of about {n_blocks} blocks that memory is enough for r of each block and {spare:.0%}
more: spans of uneven length never fit without waste.
"""

COVERAGE: Final = """\
## Coverage

A block is uncovered while no peer takes new sessions for it. The bound is (d/m)^r: a replica is lost every
m = {mean_stay_h:g} h and takes d to be replaced, so that all r replicas of a block are missing at once for (d/m)^r of
the time. d = detect + decide + load:

- *detect*: without notice, until the record expires, which was announced half an announcement's pace ago on average:
  {expiry_s:g} s less {announce_s:g}/2 s. With notice, half a reader's pace, {refresh_s:g}/2 s.
- *decide*: until the peer whose turn it is looks again: `MovePolicy.gap_check_every_s`, {decide_s:g} s.
- *load*: {drain_s:g} s to drain, and the mean time to load a span, spans weighted by their length, since a long one
  holds more of the replicas.
"""

CLIENTS: Final = """\
## What users saw
"""

CALM: Final = """\
## A calm swarm

Nobody comes or goes for {hours:g} h, r = 2; speeds are measured with an error of a few percent all the time.
"""

ONE: Final = """\
## All in one model

{peers} peers serve one model for {hours:g} h, with the same churn. The upper bound of the weakest block's throughput is
what all devices compute together over the number of blocks: no placement gives more.
"""

SMALL: Final = """\
## Against the optimum

The weakest block's throughput, where the optimum can be found by trying all placements (2 to 8 peers, 3 to 12 blocks):
right after the peers joined one after the other, and when nobody moves any more. The optimum is the best placement of
those that lack fewest replicas, every peer taking as many blocks as it can hold. Below, many equal peers right after
they joined one after the other, against the upper bound.
"""

LIMITS: Final = """\
## What this does not show

- All readers of the DHT read at the same moments and share one view, except those who are about to move, who read anew;
  signatures are neither made nor checked; the DHT never loses a record and takes no time to store one.
- Peers load at their line's full speed; a block that was left has to be loaded again.
- Clients know all round trips exactly. Queues at peers are not simulated: clients are few.
- Every peer keeps the outputs of a session's steps for its whole length; the time to send them is left out.
- The optimum, as placement itself, has every peer take all the blocks it can hold. Shorter spans would sometimes give
  the weakest block more, and leave fewer replicas.
- A few small swarms of unequal peers stay below 95 % of the optimum: what is left would not pay the moves, or is not
  found.
- In a thin swarm (r = 1 to 3) the weakest block is far below the upper bound, which whole spans cannot reach:
  replicas come first there.
"""


@dataclass(frozen=True, slots=True)
class Section:
    """A heading, a text, and a table; printed, and written to the page."""

    text: str
    head: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()

    def markdown(self) -> str:
        lines = [self.text]
        if self.rows:
            lines += [f"| {' | '.join(self.head)} |", "|---" * len(self.head) + "|"]
            lines += [f"| {' | '.join(row)} |" for row in self.rows]
        return "\n".join(lines) + "\n"

    def table(self) -> Table:
        table = Table(*self.head, title=self.text.splitlines()[0].lstrip("# "))
        for row in self.rows:
            table.add_row(*row)
        return table


def run() -> None:
    """Simulate a small swarm, print, write the page."""
    write_page(QUICK, secrets.randbits(32), f" --peers {QUICK.peers} --hours {QUICK.hours:g}")


def write_page(scenario: Scenario, seed: int, options: str, processes: int = 2) -> None:
    """Coverage for r = 1, 2, 3, a calm swarm, all in one model, and small swarms; printed, and written to `docs/`."""
    scenarios = [replace(scenario, replicas=float(r)) for r in REPLICAS]
    calm = replace(scenario, replicas=2.0, mean_stay_h=0.0, hours=min(scenario.hours, CALM_HOURS), clients=0)
    crowded = replace(ONE_MODEL, peers=min(ONE_MODEL.peers, scenario.peers))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        runs = [pool.submit(simulate, each, seed) for each in (*scenarios, calm, crowded)]
        small = pool.submit(small_swarms, seed)
        *churned, quiet, one = (each.result() for each in runs)
        sections = [
            Section(filled(INTRODUCTION, scenario, seed=seed, options=options)),
            side_by_side(filled(COVERAGE, scenario), churned, swarm_rows),
            Section(f"![Coverage over time]({PLOT.name})\n"),
            side_by_side(CLIENTS, churned, client_rows),
            Section(filled(CALM, calm), ("", ""), swarm_rows(quiet)),
            Section(filled(ONE, crowded), ("", ""), swarm_rows(one)),
            small.result(),
            Section(LIMITS),
        ]
    PLOT.write_text(plot(churned), encoding="utf-8")
    PAGE.write_text("\n".join(section.markdown() for section in sections), encoding="utf-8")
    console = Console()
    console.print(f"seed {seed}")
    for section in sections:
        if section.rows:
            console.print(section.table())
    console.print(f"written: {PAGE.name}, {PLOT.name}")


def words(scenario: Scenario) -> dict[str, object]:
    """What the page's texts say of a scenario and of the project's defaults."""
    return {
        **{each.name: getattr(scenario, each.name) for each in fields(scenario)},
        "announce_s": DHT.announce_every_s,
        "expiry_s": DHT.expiry_s,
        "refresh_s": DHT.refresh_every_s,
        "decide_s": MovePolicy().gap_check_every_s,
    }


def filled(text: str, scenario: Scenario, **more: object) -> str:
    """A text of the page with its words filled in, and its lines broken anew."""
    parts = text.format_map({**words(scenario), **more}).strip().replace("\n- ", "\n\0- ").split("\n\n")
    return "\n\n".join("\n".join(map(_broken, filter(None, part.split("\0")))) for part in parts) + "\n"


def _broken(text: str) -> str:
    return fill(" ".join(text.split()), 120, subsequent_indent="  " * text.startswith("- "))


def side_by_side(text: str, runs: Sequence[Figures], rows_of: Callable[[Figures], Sequence[Row]]) -> Section:
    """One column for each run."""
    columns = [rows_of(figures) for figures in runs]
    head = ["", *(f"r = {figures.scenario.replicas:g}" for figures in runs)]
    return Section(text, head, [[row[0][0], *(cell for _, cell in row)] for row in zip(*columns, strict=True)])


def plot(runs: Sequence[Figures]) -> str:
    """Coverage and the weakest block over time, as an SVG."""
    hours = max(figures.scenario.hours for figures in runs)
    panels = [
        Panel("covered blocks", [figures.coverage_line for figures in runs], 90.0, 100.0, "%"),
        Panel("weakest block / upper bound", [figures.weakest_line for figures in runs], 0.0, 100.0, "%"),
    ]
    return svg(panels, hours)


def small_swarms(seed: int) -> Section:
    """Joins and rebalancing against the optimum by brute force; many equal peers against the upper bound."""
    rng = random.Random(seed)
    rows = [_small(f"{SMALL_CASES} small swarms of equal peers", rng, equal=True)]
    rows.append(_small(f"{SMALL_CASES} small swarms of unequal peers", rng, equal=False))
    rows += [_many(peers, 80, 8) for peers in (20, 100, 1000)]
    return Section(
        SMALL, ("", "after joining: mean, worst", "after rebalancing: mean, worst", ">= 95 %", "moves"), rows
    )


def _small(name: str, rng: random.Random, *, equal: bool) -> Sequence[str]:
    shares, moves, peers = [], 0, 0
    for _ in range(SMALL_CASES):
        case = random_case(rng, equal=equal)
        best, before = optimum(case), joined(case)
        after, moved = rebalanced(case, before, MovePolicy(), rng)
        shares.append([weakest(case.n_blocks, each) / best for each in (before, after)])
        moves, peers = moves + moved, peers + len(after)
    first, last = np.array(shares).T
    enough = float((last > 0.95 - 1e-6).mean())
    return (
        name,
        f"{first.mean():.1%}, {first.min():.0%}",
        f"{last.mean():.1%}, {last.min():.0%}",
        f"{enough:.0%}",
        f"{moves / peers:.2f} per peer",
    )


def _many(peers: int, n_blocks: int, num_blocks: int) -> Sequence[str]:
    case = Case(n_blocks, (num_blocks,) * peers, (100.0,) * peers)
    share = weakest(n_blocks, joined(case)) / (sum(case.blocks_per_s) / n_blocks)
    return (f"{peers} equal peers of {num_blocks} blocks, {n_blocks} blocks", f"{share:.1%} of the bound", "", "", "")


@click.command("swarm")
@click.option("--peers", default=DEFAULT.peers, show_default=True, help="Machines.")
@click.option("--hours", default=DEFAULT.hours, show_default=True, help="Simulated time that is counted.")
@click.option(
    "--mean-stay-h", type=float, help=f"Mean stay of a peer, in hours; 0: nobody leaves.  [{DEFAULT.mean_stay_h:g}]"
)
@click.option("--churn", type=float, help="The same, as departures per peer and hour: 0.5 is a mean stay of 2 h.")
@click.option("--silent", default=DEFAULT.silent, show_default=True, help="Share of the leavers that say nothing.")
@click.option(
    "--replicas", default=DEFAULT.replicas, show_default=True, help="Of each block, as memory allows; 0: one model."
)
@click.option("--spare", default=DEFAULT.spare, show_default=True, help="Memory beyond these replicas, as a share.")
@click.option("--n-blocks", default=DEFAULT.n_blocks, show_default=True, help="Blocks of each model, about.")
@click.option("--clients", default=DEFAULT.clients, show_default=True, help="Clients that ask all the time.")
@click.option("--seed", type=int, help="For the same figures again; a fresh one if not given.")
@click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), default=PLOT, help="Where to draw coverage over time."
)
@click.option("--processes", default=2, show_default=True, help="With --page, so many at once.")
@click.option("--page", is_flag=True, help="Simulate r = 1, 2, 3 and all else that docs/swarm.md shows, and write it.")
def command(
    mean_stay_h: float | None,
    churn: float | None,
    seed: int | None,
    plot_path: Path,
    processes: int,
    page: bool,
    **options: Any,
) -> None:
    """Simulate a swarm with the project's own placement, records and routing."""
    seed = secrets.randbits(32) if seed is None else seed
    click.echo(f"seed {seed}")
    scenario = replace(DEFAULT, mean_stay_h=_mean_stay_h(mean_stay_h, churn), **options)
    if page:
        write_page(scenario, seed, f" --peers {scenario.peers} --hours {scenario.hours:g} --seed {seed}", processes)
        return
    figures = simulate(scenario, seed)
    Console().print(Section("A simulated swarm", ("", ""), [*swarm_rows(figures), *client_rows(figures)]).table())
    plot_path.write_text(plot([figures]), encoding="utf-8")
    click.echo(f"coverage over time: {plot_path}")


def _mean_stay_h(mean_stay_h: float | None, churn: float | None) -> float:
    """Raises UsageError: the two contradict each other."""
    if churn is None:
        return DEFAULT.mean_stay_h if mean_stay_h is None else mean_stay_h
    stay_h = 1 / churn if churn else 0.0
    if mean_stay_h is not None and abs(mean_stay_h - stay_h) > 1e-9:
        raise click.UsageError(
            f"--churn {churn:g} is a mean stay of {stay_h:g} h, not {mean_stay_h:g}; give one of them"
        )
    return stay_h
