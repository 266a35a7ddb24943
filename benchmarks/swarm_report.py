"""What a simulated swarm did, in figures: against the analytic bound, the optimum, and over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import mean

import numpy as np

from benchmarks.swarm_clients import Tally, start_clients
from benchmarks.swarm_meter import BIN_S, MOST_REPLICAS
from benchmarks.swarm_peers import DHT
from benchmarks.swarm_plot import Line
from benchmarks.swarm_scenario import Scenario
from benchmarks.swarm_world import World

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Bound:
    """The share of time in which a block would be uncovered if each of its r replicas were replaced by itself.

    A replica is lost every `stay_s` on average and takes `detect_s + decide_s + load_s` = d to be replaced, so that it
    is missing for d/m of the time, and all r of a block at once for (d/m)^r.

    Attributes:
        detect_s: until the others know. Without notice: the record's expiry after an announcement that was, on
            average, half an announcement's pace ago. With notice: half a reader's pace.
        decide_s: until the one whose turn it is looks whether to move.
        load_s: until it has drained and loaded; long spans hold more replicas, and count accordingly.
    """

    detect_s: float
    decide_s: float
    load_s: float
    stay_s: float
    replicas: float

    @property
    def lost_s(self) -> float:
        return self.detect_s + self.decide_s + self.load_s

    @property
    def uncovered(self) -> float:
        return math.pow(self.lost_s / self.stay_s, self.replicas)


def bound(world: World) -> Bound:
    """The bound for a world's machines and policy."""
    scenario = world.scenario
    unnoticed_s = DHT.expiry_s - DHT.announce_every_s / 2
    return Bound(
        detect_s=scenario.silent * unnoticed_s + (1 - scenario.silent) * DHT.refresh_every_s / 2,
        decide_s=world.policy.gap_check_every_s,
        load_s=scenario.drain_s + world.mean_load_s,
        stay_s=scenario.mean_stay_s,
        replicas=scenario.replicas,
    )


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run showed. Shares are of the time that was counted, averaged over all blocks of all models."""

    scenario: Scenario
    seed: int
    models: int
    n_blocks: int
    memory_replicas: float
    uncovered: float
    any_gap: float
    gaps: int
    replicas: tuple[float, ...]
    bound: Bound
    joins: int
    leaves: int
    moves: int
    moves_for_replicas: int
    filled_twice: int
    weakest: float
    tally: Tally
    coverage_line: Line
    weakest_line: Line

    @property
    def moves_per_peer_hour(self) -> float:
        return self.moves / self.scenario.peers / self.scenario.hours


def simulate(scenario: Scenario, seed: int) -> Figures:
    """Run the scenario to its end."""
    world = World(scenario, seed)
    tally = start_clients(world)
    world.run()
    meters = [swarm.meter for swarm in world.swarms]
    seconds = sum(meter.seconds for meter in meters)
    block_seconds = seconds * world.n_blocks
    bins = sorted(set().union(*(meter.bound.sums for meter in meters)))[:-1]
    hours = [index * BIN_S / 3600 - scenario.warm_up_h for index in bins]

    def curve(name: str) -> list[float]:
        return [sum(getattr(meter, name).sums.get(index, 0.0) for meter in meters) for index in bins]

    covered = [100 * (1 - value / BIN_S / len(meters)) for value in curve("uncovered")]
    weakest = [100 * value / top if top else 0.0 for value, top in zip(curve("weakest"), curve("bound"), strict=True)]
    name = f"r = {scenario.replicas:g}" if scenario.replicas else "one model"
    return Figures(
        scenario=scenario,
        seed=seed,
        models=len(world.swarms),
        n_blocks=world.n_blocks,
        memory_replicas=world.memory_blocks / (len(world.swarms) * world.n_blocks),
        uncovered=sum(meter.uncovered_block_s for meter in meters) / block_seconds,
        any_gap=sum(meter.gap_s for meter in meters) / seconds,
        gaps=sum(meter.gaps for meter in meters),
        replicas=tuple(float(sum(m.replica_block_s[k] for m in meters)) / block_seconds for k in range(MOST_REPLICAS)),
        bound=bound(world),
        joins=world.joins,
        leaves=world.leaves,
        moves=world.moves,
        moves_for_replicas=world.moves_for_replicas,
        filled_twice=world.filled_twice,
        weakest=sum(meter.weakest_token for meter in meters) / sum(meter.bound_token for meter in meters),
        tally=tally,
        coverage_line=Line(name, hours, covered),
        weakest_line=Line(name, hours, weakest),
    )


def swarm_rows(figures: Figures) -> list[Row]:
    """Coverage, moves and throughput, as (what, how much)."""
    per_peer_hour = figures.scenario.peers * figures.scenario.hours
    rows = [
        ("models x blocks", f"{figures.models} x {figures.n_blocks}"),
        ("replicas that memory allows, on average", f"{figures.memory_replicas:.2f}"),
        ("time a block is uncovered", f"{figures.uncovered:.2e}"),
    ]
    if figures.scenario.mean_stay_h and figures.scenario.replicas:
        limit = figures.bound
        parts = f"{limit.detect_s:.0f} + {limit.decide_s:.0f} + {limit.load_s:.0f}"
        rows += [
            ("d = detect + decide + load", f"{parts} = {limit.lost_s:.0f} s"),
            ("analytic bound (d/m)^r", f"{limit.uncovered:.2e}"),
            ("uncovered / bound", f"{figures.uncovered / limit.uncovered:.2f}"),
        ]
    rows += [
        ("gaps; share of time a model has one", f"{figures.gaps}; {figures.any_gap:.2e}"),
        ("blocks with 0, 1, 2, 3, 4 replicas", ", ".join(f"{share:.2%}" for share in figures.replicas)),
        ("joins, leaves", f"{figures.joins}, {figures.leaves}"),
        ("moves per peer and hour", f"{figures.moves_per_peer_hour:.3f}"),
        ("... to give replicas", f"{figures.moves_for_replicas / per_peer_hour:.3f}"),
        ("... of which others had filled the gap", f"{figures.filled_twice} of {figures.moves_for_replicas}"),
        ("weakest block / upper bound", f"{figures.weakest:.1%}"),
    ]
    return rows


def client_rows(figures: Figures) -> list[Row]:
    """What users saw, as (what, how much); nothing where nobody asked."""
    tally = figures.tally
    if not tally.answers:
        return []
    failures = np.array(tally.failures_s or [0.0])
    return [
        ("answers; given up after waiting", f"{tally.answers}; {tally.lost}"),
        (
            "answers that waited for missing blocks",
            f"{tally.waited}, {tally.waited_s / max(tally.waited, 1):.0f} s each",
        ),
        ("dead peers met when opening", f"{tally.dead_at_open}"),
        ("handovers from peers that said they go", f"{tally.handovers}"),
        ("interruptions that cost time", f"{len(tally.failures_s)}"),
        (
            "time lost by one: mean, 95 %, worst",
            f"{failures.mean():.2f}, {np.quantile(failures, 0.95):.2f}, {failures.max():.2f} s",
        ),
        ("hops of a route", f"{mean(tally.hops):.1f}"),
        (
            "one step: all, on the way",
            f"{mean(tally.step_ms):.0f}, {mean(tally.network_ms):.0f} ms",
        ),
    ]
