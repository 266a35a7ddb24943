"""Whom a third peer convicts: the client's own verdicts, on recorded lies."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from benchmarks.lies import BFLOAT16, FLOAT32, LIES, Recording, rows
from client.sample import MOST
from client.tolerance import Tolerance, distances
from client.verdict import Culprit, Distance, judge


@dataclass(frozen=True, slots=True)
class Verdicts:
    """How many were given, could not be decided, and named the honest one of both."""

    given: int = 0
    undecided: int = 0
    wrong: int = 0

    def plus(self, said: Culprit, right: Culprit) -> Verdicts:
        return Verdicts(self.given + 1, self.undecided + (said == "both"), self.wrong + (said not in ("both", right)))


def verdicts(recordings: list[Recording]) -> Verdicts:
    """Over all lies that are noticed, by a token or by the median of several, with auditors and third peers of each
    number format; and the other way round, where it is the auditor that lies."""
    found = Verdicts()
    for recording, part in rows(recordings):
        for kind in (FLOAT32, BFLOAT16):
            honest = recording.bulk[kind][:, part]
            for lie in LIES.values():
                told = lie(recording, kind)[:, part]
                for third in (FLOAT32, BFLOAT16):
                    others = recording.bulk[third][:, part]
                    apart = [_rows(*pair) for pair in ((told, honest), (others, told), (others, honest))]
                    between = Tolerance.between(kind, kind, "int8", len(recording.span))
                    to_third = Tolerance.between(third, kind, "int8", len(recording.span))
                    for count in (1, MOST):
                        limits = between.of(count), to_third.of(count)
                        for first, to_liar, to_honest in _cases(*apart, count, *limits):
                            if not first.agrees:
                                found = found.plus(judge(first, to_liar, to_honest), "audited")
                                found = found.plus(judge(first, to_honest, to_liar), "auditor")
    return found


def _rows(one: Tensor, other: Tensor) -> list[Tensor]:
    """Distances of the tokens of each session."""
    return [distances(a, b) for a, b in zip(one, other, strict=True)]


def _cases(
    first: list[Tensor], to_liar: list[Tensor], to_honest: list[Tensor], count: int, limit: float, to_third: float
) -> Iterator[tuple[Distance, Distance, Distance]]:
    """Each token of each session, or each so many in a row."""
    for session in zip(first, to_liar, to_honest, strict=True):
        size = min(count, len(session[0]))
        a, b, c = (apart.unfold(0, size, size).median(dim=1).values.tolist() for apart in session)
        for one, two, three in zip(a, b, c, strict=True):
            yield Distance(one, limit), Distance(two, to_third), Distance(three, to_third)
