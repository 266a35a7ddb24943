"""Short simulations of a whole swarm: the project's own placement, claims, records and routing, on a clock that jumps.

Seeds are fresh in each run and printed; `SIM_SEED` repeats one.
"""

from __future__ import annotations

import os
import secrets
from dataclasses import replace

import pytest

from benchmarks.swarm_peers import DHT
from benchmarks.swarm_report import Figures, simulate
from benchmarks.swarm_scenario import Scenario
from benchmarks.swarm_world import World
from peer.placement import could_help

SEED = int(os.environ.get("SIM_SEED", secrets.randbits(32)))
SMALL = Scenario(peers=60, hours=1.0, replicas=2.0, clients=0, warm_up_h=0.5, phases=2)
REPLACED_WITHIN_S = 600.0
"""Silent losses are noticed after a minute; a machine with a slow line loads a long span for some minutes."""


@pytest.fixture(autouse=True)
def seed() -> int:
    print(f"SIM_SEED={SEED}")
    return SEED


def calm(**values: object) -> Scenario:
    return replace(SMALL, mean_stay_h=0.0, **values)  # type: ignore[arg-type]


def leave_half(world: World, *, silent: bool) -> None:
    """Every second peer goes, and nobody comes in its place."""
    for swarm in world.swarms:
        for peer in list(swarm.peers.values())[::2]:
            world.leave(peer, silent, replaced=False)


def uncovered(world: World) -> int:
    """Blocks of all models that nobody serves now."""
    return sum(int((swarm.meter.replicas == 0).sum()) for swarm in world.swarms)


@pytest.fixture(scope="module")
def churned() -> Figures:
    """A hundred peers that come and go, and a few clients."""
    return simulate(replace(SMALL, peers=100, clients=6), SEED)


def test_the_same_seed_gives_the_same_figures() -> None:
    scenario = replace(SMALL, peers=30, hours=0.25, warm_up_h=0.25, clients=3)
    one, again = simulate(scenario, SEED), simulate(scenario, SEED)
    assert one == again
    assert one.tally.answers > 0
    assert one.joins > 0


def test_hardly_anyone_moves_in_a_calm_swarm() -> None:
    figures = simulate(calm(), SEED)
    assert figures.moves_per_peer_hour <= 0.2
    assert figures.moves_for_replicas == 0
    assert figures.uncovered == 0


def test_all_blocks_are_covered_soon_after_half_the_peers_vanished() -> None:
    """Four replicas of each block, so that two are left: enough for all, once peers have moved."""
    world = World(calm(replicas=4.0), SEED)
    world.run(1.0)
    assert uncovered(world) == 0
    leave_half(world, silent=True)
    world.run(REPLACED_WITHIN_S / 3600)
    assert uncovered(world) == 0
    for swarm in world.swarms:
        known = swarm.read_anew(world.now_s).placed
        assert not could_help(swarm.n_blocks, swarm.cuts, known), "replicas are still lacking that could be given"


def test_hardly_ever_two_peers_fill_one_gap(churned: Figures) -> None:
    """All peers see a gap within seconds; turns and claims leave it to one. A newcomer may be faster than the mover."""
    assert churned.moves_for_replicas > 10
    assert churned.filled_twice <= 0.1 * churned.moves_for_replicas


def test_with_two_replicas_under_churn_blocks_are_covered_as_the_analytic_bound_says(churned: Figures) -> None:
    """A short run has a handful of gaps, or none: the bar is far above that of the long ones (`docs/swarm.md`)."""
    assert churned.leaves > 20
    assert churned.uncovered <= 10 * churned.bound.uncovered


def test_with_one_replica_under_churn_blocks_are_covered_as_the_analytic_bound_says() -> None:
    figures = simulate(replace(SMALL, replicas=1.0), SEED)
    assert 0 < figures.uncovered <= 3 * figures.bound.uncovered


def test_answers_survive_those_that_leave(churned: Figures) -> None:
    tally = churned.tally
    assert tally.answers > 50
    assert tally.handovers + len(tally.failures_s) > 5
    assert tally.lost <= tally.waited
    assert max(tally.failures_s) <= 30.0


def test_a_peer_that_says_it_leaves_is_counted_on_no_longer() -> None:
    world = World(calm(peers=20), SEED)
    world.run(0.5)
    swarm = world.swarms[0]
    peer = next(iter(swarm.peers.values()))
    world.leave(peer, silent=False, replaced=False)
    for phase in range(SMALL.phases):
        world.run(DHT.refresh_every_s / 3600)
        assert peer.peer_id not in {placed.peer_id for placed in swarm.read(world.now_s, phase).placed}


def test_a_silent_peer_is_in_nobodys_view_after_its_record_expired() -> None:
    world = World(calm(peers=20), SEED)
    world.run(0.5)
    swarm = world.swarms[0]
    peer = next(iter(swarm.peers.values()))
    world.leave(peer, silent=True, replaced=False)
    assert peer.peer_id in {record.peer_id for record in swarm.read_anew(world.now_s).peers}
    world.run(DHT.expiry_s / 3600)
    for reading in (swarm.read_anew(world.now_s), *(swarm.read(world.now_s, phase) for phase in range(SMALL.phases))):
        assert peer.peer_id not in {record.peer_id for record in reading.peers}
