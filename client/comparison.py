"""A hop's outputs and a shadow's, token by token: which is the first that is too far off? Not for an event loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from client.shadow import hidden_of
from client.tolerance import distances
from client.verdict import Distance
from protocol.journal import Entry


@dataclass(frozen=True, slots=True)
class Mismatch:
    """The first token for which hop and shadow give what differs by more than it may.

    Attributes:
        step_id: up to which both were compared.
        position: of the token, in the caches.
        committed, recomputed: the hop's output for it and the shadow's, [..., rows, 1, H].
    """

    step_id: int
    position: int
    committed: Tensor
    recomputed: Tensor
    apart: Distance

    def from_third(
        self, inputs: Sequence[Entry], tensors: Sequence[Tensor], to_hop: float, to_shadow: float
    ) -> tuple[Distance, Distance] | tuple[None, None]:
        """How far what a third peer computed from the same inputs is from both; None: it has no such token.

        Args:
            tensors: what came out for each of `inputs`, [..., rows, tokens, H].
            to_hop, to_shadow: how far it may be from the hop's outputs, and from the shadow's.
        """
        found = _by_position(inputs, tensors).get(self.position)
        if found is None:
            return None, None
        committed, recomputed = (float(_apart(found, each)) for each in (self.committed, self.recomputed))
        return Distance(committed, to_hop), Distance(recomputed, to_shadow)


def first_mismatch(
    inputs: Sequence[Entry], outputs: Sequence[Entry], recomputed: Sequence[Tensor], limit: float, step_id: int
) -> tuple[int, Mismatch | None]:
    """Compares the tokens that are in both logs, which may have joined or cropped them differently: how many, and the
    first one that is too far off.

    Args:
        recomputed: what a shadow made of each of `inputs`, [..., rows, tokens, H].
        limit: relative distance from which on a token is too far off.
        step_id: up to which the logs go.

    Raises:
        PeerFault: outputs cannot be read.
    """
    computed = _by_position(inputs, recomputed)
    committed = _by_position(outputs, [hidden_of(entry) for entry in outputs])
    positions = sorted(computed.keys() & committed.keys())
    if not positions:
        return 0, None
    apart = torch.stack([_apart(committed[position], computed[position]) for position in positions])
    wrong = (apart > limit).nonzero().flatten().tolist()
    if not wrong:
        return len(positions), None
    position = positions[wrong[0]]
    far = Distance(float(apart[wrong[0]]), limit)
    return len(positions), Mismatch(step_id, position, committed[position], computed[position], far)


def _by_position(entries: Sequence[Entry], tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """The outputs of single tokens, [..., rows, 1, H]. One that was taken back gives way to what came in its place."""
    return {
        entry.position + index: tensor.narrow(-2, index, 1)
        for entry, tensor in zip(entries, tensors, strict=True)
        for index in range(tensor.shape[-2])
    }


def _apart(one: Tensor, other: Tensor) -> Tensor:
    """Of one token, float64 []; what has another shape is as far off as can be."""
    if one.shape != other.shape:
        return torch.tensor(torch.inf, dtype=torch.float64)
    return distances(one, other).amax()
