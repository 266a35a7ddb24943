"""How long a liar survives audits, and what it does until then: many sessions, drawn. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from client.sample import LEAST, MOST

AT_ONCE = 20_000_000  # steps that are drawn at once

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Habit:
    """In which steps a liar lies: from one on, and in a share of these at random."""

    first: int = 0
    share: float = 1.0

    def lies(self, rng: np.random.Generator, shape: tuple[int, int]) -> Mask:
        """bool [sessions, steps]."""
        lies = rng.random(shape, dtype=np.float32) < self.share if self.share < 1 else np.ones(shape, dtype=bool)
        lies[:, : self.first] = False
        return lies


@dataclass(frozen=True, slots=True, eq=False)
class Signs:
    """Of recorded lies, [spans, tokens] each.

    Attributes:
        alone: is the token further off than any may be?
        typical: is it further off than the median of several may be?
    """

    alone: Mask
    typical: Mask


@dataclass(frozen=True, slots=True)
class Odds:
    """What became of sessions at one hop with a liar.

    Attributes:
        survives: share in which it was not found.
        survives_single: the same, if an audit compared the step alone that was drawn.
        steps: median of the step in which it was found; infinite: in less than half of them it was.
        unseen: share of all tokens that came after its first lie in sessions in which it was not found.
        shown: mean number of tokens, from its first lie on, that came before it was found, where it was.
    """

    survives: float
    survives_single: float
    steps: float
    unseen: float
    shown: float


def odds(
    signs: Signs, habit: Habit, rate: float, sessions: int, steps: int, rng: np.random.Generator, blind: float = 0.0
) -> Odds:
    """Draws sessions.

    Args:
        signs: of what the liar says; each session is in one of the spans, and its steps take theirs from it at random.
        rate: of audits, per step.
        blind: share of sessions whose auditor lies alike.
    """
    found: list[NDArray[np.int64]] = []
    first: list[NDArray[np.int64]] = []
    single = 0
    for count in _portions(sessions, steps):
        shape = (count, steps)
        lies = habit.lies(rng, shape)
        spans, tokens = signs.alone.shape
        drawn = rng.integers(0, spans, (count, 1)), rng.integers(0, tokens, shape)
        sees = rng.random((count, 1)) >= blind
        seen = lies & signs.alone[drawn] & sees
        audits = rng.random(shape, dtype=np.float32) < rate
        single += int((~(audits & seen).any(axis=1)).sum())
        seen |= _typical(lies & signs.typical[drawn]) & sees
        hit = audits & np.logical_or.accumulate(seen, axis=1)  # an audit looks at all steps before it, too
        found.append(np.where(hit.any(axis=1), hit.argmax(axis=1), steps))
        first.append(np.where(lies.any(axis=1), lies.argmax(axis=1), steps))
    at, began = np.concatenate(found), np.concatenate(first)
    escaped = at == steps
    return Odds(
        survives=float(escaped.mean()),
        survives_single=single / sessions,
        steps=float(np.median(np.where(escaped, np.inf, at))),
        unseen=float(((steps - began) * escaped).sum() / (sessions * steps)),
        shown=float((at - began)[~escaped].mean()) if not escaped.all() else np.inf,
    )


def _typical(far: Mask) -> Mask:
    """At which steps is the median of the tokens that are kept too far off, if these are?"""
    steps = far.shape[1]
    count = np.cumsum(far, axis=1, dtype=np.int32)
    count[:, MOST:] -= count[:, :-MOST].copy()
    compared = np.minimum(np.arange(1, steps + 1), MOST)
    return (2 * count > compared) & (compared >= LEAST)


def _portions(sessions: int, steps: int) -> Iterator[int]:
    most = max(1, AT_ONCE // steps)
    for start in range(0, sessions, most):
        yield min(most, sessions - start)
