"""What is simulated: how many machines, of what make, where, and how long they stay."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """What is simulated. Times in seconds unless named otherwise.

    Attributes:
        peers: machines; one that leaves is followed at once by a stranger with a machine of the same make, who knows
            nothing of the place that became free.
        mean_stay_h: mean of the exponentially distributed stay; 0: nobody leaves.
        silent: share of the leavers that leave without notice.
        replicas: so many models of `n_blocks` are served that the memory of all machines is `replicas` times their
            blocks, and `spare` more; 0: one model, served by all.
        least_blocks, most_blocks: memory of a machine, log-uniform between.
        speed_spread, line_spread: sigma of the log-normal speed and bandwidth.
        noise: relative error of the throughput that a peer measures.
        vanish: share of those without notice whose machine is gone (nothing answers); the others' process alone died,
            and their connections break at once.
        phases: readers of the DHT read at so many different moments; those of one moment share a view.
        warm_up_h: so long the swarm runs before anything is counted.
    """

    peers: int = 1000
    hours: float = 24.0
    mean_stay_h: float = 2.0
    silent: float = 0.5
    replicas: float = 2.0
    spare: float = 0.2
    n_blocks: int = 80
    least_blocks: int = 2
    most_blocks: int = 16
    speed_blocks_per_s: float = 800.0
    speed_spread: float = 0.5
    vanish: float = 0.5
    block_mib: float = 220.0
    line_mib_per_s: float = 25.0
    line_spread: float = 0.5
    noise: float = 0.05
    drain_s: float = 5.0
    world_ms: float = 100.0
    last_mile_ms: float = 4.0
    clients: int = 20
    phases: int = 1
    warm_up_h: float = 1.0

    @property
    def mean_stay_s(self) -> float:
        return self.mean_stay_h * 3600 if self.mean_stay_h else math.inf


@dataclass(frozen=True, slots=True)
class Machine:
    """What somebody shares. `x_ms`, `y_ms`: where it is, as the time light and routers take."""

    num_blocks: int
    blocks_per_s: float
    load_block_s: float
    x_ms: float
    y_ms: float

    @property
    def where(self) -> tuple[float, float]:
        return self.x_ms, self.y_ms


def rtt_ms(scenario: Scenario, one: tuple[float, float], other: tuple[float, float]) -> float:
    """The round trip between two places: there and back, and over the last mile at both ends."""
    return 2 * math.dist(one, other) + 4 * scenario.last_mile_ms


def make_machine(scenario: Scenario, rng: random.Random) -> Machine:
    """One of the machines of a scenario, drawn at random."""
    low, high = math.log(scenario.least_blocks), math.log(scenario.most_blocks + 1)
    line = scenario.line_mib_per_s * math.exp(rng.gauss(0, scenario.line_spread))
    return Machine(
        num_blocks=min(int(math.exp(rng.uniform(low, high))), scenario.most_blocks),
        blocks_per_s=scenario.speed_blocks_per_s * math.exp(rng.gauss(0, scenario.speed_spread)),
        load_block_s=scenario.block_mib / line,
        x_ms=rng.uniform(0, scenario.world_ms),
        y_ms=rng.uniform(0, scenario.world_ms),
    )
