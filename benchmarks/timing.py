"""What was timed, as figures: one answer, and the same thing measured several times."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer of a subject.

    Attributes:
        started_s, stamps_s: when it was asked, and when each token came (`time.monotonic`).
        chain: ids of the peers at its end.
        steps: passes through the chain, as the client counts them.
    """

    started_s: float
    stamps_s: tuple[float, ...]
    tokens: tuple[int, ...]
    chain: tuple[str, ...]
    steps: int

    @classmethod
    def of(cls, said: dict[str, Any]) -> Answer:
        """From what a subject said."""
        return cls(
            said["started_s"], tuple(said["stamps_s"]), tuple(said["tokens"]), tuple(said["chain"]), said["steps"]
        )

    @property
    def ended_s(self) -> float:
        return self.stamps_s[-1]

    @property
    def total_s(self) -> float:
        return self.ended_s - self.started_s

    @property
    def first_s(self) -> float:
        """Until the first token."""
        return self.stamps_s[0] - self.started_s

    @property
    def tokens_per_s(self) -> float:
        """The first token included."""
        return len(self.tokens) / self.total_s

    @property
    def gaps_s(self) -> tuple[float, ...]:
        """Between each token and the next."""
        return tuple(later - earlier for earlier, later in pairwise(self.stamps_s))

    @property
    def ms_per_token(self) -> float:
        """The median gap, in milliseconds."""
        return median(self.gaps_s) * 1e3


@dataclass(frozen=True, slots=True)
class Spread:
    """Of some values: the median, the least and the most."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Raises ValueError: there are none."""
        found = sorted(values)
        if not found:
            raise ValueError("nothing was measured")
        return cls(median(found), found[0], found[-1])

    def show(self, form: str = ".2f") -> str:
        """`1.02 (0.99-1.05)`."""
        return f"{self.median:{form}} ({self.low:{form}}-{self.high:{form}})"


def ratios(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Of each turn: what was measured over what was measured beside it."""
    return [a / b for a, b in zip(above, below, strict=True)]


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Of the line that fits best (least squares)."""
    return float(np.polyfit(xs, ys, 1)[0])


def p99(values: Sequence[float]) -> float:
    """The 99th percentile."""
    return float(np.quantile(values, 0.99))


def total_tokens_per_s(answers: Sequence[Answer]) -> float:
    """Of clients at once: all tokens, over the time from the first question to the last token."""
    took_s = max(answer.ended_s for answer in answers) - min(answer.started_s for answer in answers)
    return sum(len(answer.tokens) for answer in answers) / took_s
