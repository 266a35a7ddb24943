"""A hop's outputs and a shadow's, token by token: which are too far off? Not for an event loop."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import torch
from torch import Tensor

from client.sample import Compared, Sample
from client.shadow import hidden_of
from client.tolerance import Tolerance, row_distances
from client.verdict import Distance
from protocol.journal import Entry


@dataclass(frozen=True, slots=True)
class Mismatch:
    """Tokens for which hop and shadow give what differs by more than it may.

    Attributes:
        step_id: up to which both were compared.
        position: of the first token in doubt, in the caches.
        tokens: the one that is too far off, or several that are, or whose median is.
        apart: how far that is; of several, their median.
        is_typical: is it a median of tokens that are not all too far off themselves?
    """

    step_id: int
    position: int
    tokens: tuple[Compared, ...]
    apart: Distance
    is_typical: bool = False

    def from_third(
        self, inputs: Sequence[Entry], tensors: Sequence[Tensor], to_hop: Tolerance, to_shadow: Tolerance
    ) -> tuple[Distance, Distance] | tuple[None, None]:
        """How far what a third peer computed from the same inputs is from both, for the same tokens; None: it has not
        all of these.

        Args:
            tensors: what came out for each of `inputs`, [..., rows, tokens, H].
            to_hop, to_shadow: how far it may be from the hop's outputs, and from the shadow's.
        """
        computed, committed, recomputed = _by_position(inputs, tensors), list[float](), list[float]()
        for token in self.tokens:
            found = computed.get(token.position)
            if found is None or token.row >= found.shape[-3]:
                return None, None
            row = found.narrow(-3, token.row, 1)
            committed.append(float(_apart(row, token.committed).amax()))
            recomputed.append(float(_apart(row, token.recomputed).amax()))
        limits = [within.typical if self.is_typical else within.token for within in (to_hop, to_shadow)]
        return Distance(median_low(committed), limits[0]), Distance(median_low(recomputed), limits[1])


def compare(
    inputs: Sequence[Entry],
    outputs: Sequence[Entry],
    recomputed: Sequence[Tensor],
    within: Tolerance,
    step_id: int,
    sample: Sample,
    rows: Mapping[int, Tensor],
    rng: random.Random,
    *,
    is_routed: bool = False,
) -> tuple[int, Mismatch | None]:
    """Compares the tokens that are in both logs, which may have joined or cropped them differently: how many, and the
    first that are too far off.

    Args:
        recomputed: what a shadow made of each of `inputs`, [..., rows, tokens, H].
        within: how far tokens may be off.
        step_id: up to which the logs go.
        sample: of the tokens that were compared before; these are added.
        rows: those of a position that mean something, int64; all of them, where a position is not among these.
        rng: draws which row of a token counts for the median. A peer that knew it could lie in all others.
        is_routed: do tokens choose among experts? One that is too far off may then have chosen otherwise, and proves
            nothing: several do, or the median, over the rows that were drawn. What is no number, or of another shape,
            always does.

    Raises:
        PeerFault: outputs cannot be read.
    """
    computed = _by_position(inputs, recomputed)
    committed = _by_position(outputs, [hidden_of(entry) for entry in outputs])
    positions = sorted(computed.keys() & committed.keys())
    typical: list[Compared] = []
    for position in positions:
        one, other = committed[position], computed[position]
        apart = _apart(one, other)
        meaningful = list(range(len(apart)))
        if position in rows and one.shape == other.shape:
            meaningful = [row for row in rows[position].tolist() if row < len(apart)]
        if not meaningful:
            continue
        worst = max(meaningful, key=apart.tolist().__getitem__)
        if apart[worst] > within.token and not (is_routed and math.isfinite(apart[worst])):
            token = _row(position, one, other, apart, worst)
            return len(positions), Mismatch(step_id, position, (token,), Distance(token.apart, within.token))
        typical.append(_row(position, one, other, apart, rng.choice(meaningful)))
    if far := sample.take(typical, within.typical, within.token if is_routed else math.inf):
        median = Distance(median_low([token.apart for token in far.tokens]), far.limit)
        return len(positions), Mismatch(step_id, far.first, far.tokens, median, far.is_typical)
    return len(positions), None


def _by_position(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """The outputs of single tokens, [..., rows, 1, H]. One that was taken back gives way to what came in its place."""
    return {
        entry.position + index: tensor.narrow(-2, index, 1)
        for entry, tensor in zip(entries, tensors, strict=True)
        for index in range(tensor.shape[-2])
    }


def _row(position: int, one: Tensor, other: Tensor, apart: Tensor, row: int) -> Compared:
    """One row of a token whose rows are so far apart; of another shape, all that there is."""
    if one.shape != other.shape:
        return Compared(row, position, one, other, float(apart[row]))
    return Compared(row, position, one.narrow(-3, row, 1), other.narrow(-3, row, 1), float(apart[row]))


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Of one token's rows, float64 [rows]; what has another shape is as far off as can be."""
    if one.shape != other.shape:
        return torch.full((1,), torch.inf, dtype=torch.float64)
    return row_distances(one, other).flatten()
