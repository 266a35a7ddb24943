"""How well placement does in small swarms, where the optimum can be found by trying everything."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from peer.board import REPLICAS_WANTED
from peer.placement import MovePolicy, Placed, choose_span, outlook

MOST_PLACEMENTS = 200_000
"""Different placements that are kept while all are tried; a larger case is not small."""
ROUNDS = 6
"""Rebalancing ends when nobody moved for so many rounds of looks by all."""


@dataclass(frozen=True, slots=True)
class Case:
    """Peers that come one after the other to an empty model that may be cut anywhere."""

    n_blocks: int
    num_blocks: tuple[int, ...]
    blocks_per_s: tuple[float, ...]


def weakest(n_blocks: int, peers: Sequence[Placed]) -> float:
    """Tokens per second of the weakest block."""
    return float(_tokens_per_s(n_blocks, peers).min())


def _tokens_per_s(n_blocks: int, peers: Sequence[Placed]) -> np.ndarray:
    tokens_per_s = np.zeros(n_blocks)
    for peer in peers:
        tokens_per_s[peer.span.start : peer.span.stop] += peer.blocks_per_s / len(peer.span)
    return tokens_per_s


def optimum(case: Case, *, replicas_first: bool = True) -> float:
    """The most that the weakest block can get if every peer takes all the blocks it can hold: by trying everything.

    Args:
        replicas_first: only among the placements that lack fewest replicas, as placement itself sees it.

    Raises:
        ValueError: there are too many placements to try.
    """
    found = np.zeros((1, 2, case.n_blocks))
    for num_blocks, rate in zip(case.num_blocks, case.blocks_per_s, strict=True):
        length = min(num_blocks, case.n_blocks)
        places = np.zeros((case.n_blocks - length + 1, 2, case.n_blocks))
        for start, place in enumerate(places):
            place[:, start : start + length] = [[1.0], [rate / length]]
        if len(found) * len(places) > MOST_PLACEMENTS:
            raise ValueError("too many placements to try all")
        found = np.unique((found[:, None] + places[None]).reshape(-1, 2, case.n_blocks).round(9), axis=0)
    if replicas_first:
        wanted = min(REPLICAS_WANTED, max(1, sum(case.num_blocks) // case.n_blocks))
        lacking = [(found[:, 0] < replicas).sum(axis=1) for replicas in range(1, wanted + 1)]
        order = np.lexsort(lacking[::-1])
        fewest = np.all([lack == lack[order[0]] for lack in lacking], axis=0)
        found = found[fewest]
    return float(found[:, 1].min(axis=1).max())


def joined(case: Case) -> list[Placed]:
    """Where the peers go, one after the other."""
    peers: list[Placed] = []
    for index, (num_blocks, rate) in enumerate(zip(case.num_blocks, case.blocks_per_s, strict=True)):
        span = choose_span(case.n_blocks, range(case.n_blocks + 1), peers, num_blocks, rate)
        peers.append(Placed(f"peer-{index}", span, rate))
    return peers


def rebalanced(case: Case, peers: Sequence[Placed], policy: MovePolicy, rng: random.Random) -> tuple[list[Placed], int]:
    """Where they are when nobody moves any more, and after how many moves."""
    now, moves, quiet = list(peers), 0, 0
    while quiet < ROUNDS:
        quiet += 1
        for index in rng.sample(range(len(now)), len(now)):
            others = now[:index] + now[index + 1 :]
            cuts = range(case.n_blocks + 1)
            span = outlook(now[index], others, case.n_blocks, cuts, case.num_blocks[index], policy, rng=rng).span
            if span is not None:
                now[index] = replace(now[index], span=span)
                moves, quiet = moves + 1, 0
    return now, moves


def random_case(rng: random.Random, *, equal: bool) -> Case:
    """A case small enough for `optimum`, with memory for at least the whole model."""
    while True:
        n_blocks = rng.randint(3, 12)
        longest = rng.randint(1, n_blocks)
        peers = rng.randint(2, 8)
        if equal:
            case = Case(n_blocks, (longest,) * peers, (100.0,) * peers)
        else:
            num_blocks = tuple(min(n_blocks, max(1, longest + rng.randint(-2, 2))) for _ in range(peers))
            case = Case(n_blocks, num_blocks, tuple(100.0 * math.exp(rng.gauss(0, 0.5)) for _ in range(peers)))
        places = math.prod(n_blocks - n + 1 for n in case.num_blocks)
        if sum(case.num_blocks) >= n_blocks and places <= MOST_PLACEMENTS and optimum(case) > 0:
            return case
