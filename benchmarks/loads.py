"""Rising load: some numbers of streams at once, what each came to, and that as a table and a curve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.result import Curve, Table
from benchmarks.timing import Answer, Spread, p99, total_tokens_per_s


@dataclass(slots=True)
class Load:
    """Rounds of so many streams at once."""

    rounds: list[list[Answer]] = field(default_factory=list)

    @property
    def totals(self) -> list[float]:
        return [total_tokens_per_s(answers) for answers in self.rounds]

    @property
    def worst_first_s(self) -> list[float]:
        return [max(answer.first_s for answer in answers) for answers in self.rounds]

    @property
    def p99_ms(self) -> float:
        """Of all times between two tokens of a stream."""
        return 1e3 * p99([gap for answers in self.rounds for answer in answers for gap in answer.gaps_s])


@dataclass(slots=True)
class Loads:
    """Of one setting.

    Attributes:
        alone: between its rounds, single streams to compare with, by what these are.
        loads: by number of streams.
    """

    name: str
    alone: dict[str, list[Answer]]
    loads: dict[int, Load]

    def total(self, streams: int) -> float:
        """Tokens per second of all these together."""
        return Spread.of(self.loads[streams].totals).median

    def over(self, streams: int, name: str) -> float:
        """The same, over those of a single stream."""
        return self.total(streams) / self.alone_tokens_per_s(name)

    def alone_tokens_per_s(self, name: str) -> float:
        return Spread.of(answer.tokens_per_s for answer in self.alone[name]).median

    def curve(self, name: str) -> Curve:
        """Each round's tokens per second over those of a single stream."""
        alone = self.alone_tokens_per_s(name)
        return Curve.of(self.name, {n: [t / alone for t in load.totals] for n, load in self.loads.items()})


def table(found: Sequence[Loads], setting: str, stream: str) -> Table:
    """A row for each number of streams. `setting`, `stream`: what these are called."""
    rows = [
        (
            each.name,
            str(n),
            Spread.of(load.totals).show(".1f"),
            f"{each.total(n) / each.total(1):.2f}",
            *(f"{each.over(n, name):.2f}" for name in each.alone),
            Spread.of(load.worst_first_s).show(),
            f"{load.p99_ms:.0f}",
        )
        for each in found
        for n, load in each.loads.items()
    ]
    ratios = [f"over {name}" for name in (f"1 {stream}", *found[0].alone)]
    head = (setting, f"{stream}s", "total tok/s", *ratios, "worst first token, s", "p99 between tokens, ms")
    return Table(head, rows)
