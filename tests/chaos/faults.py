"""What may happen to an answer, and when: drawn from a seed, so that it can be drawn again."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

THIRDS = ("0:8", "8:16", "16:24")

Kind = Literal["kill -9", "freeze", "black hole", "black link", "slow", "slow loris", "SIGTERM"]
Moment = Literal["open", "prefill", "decode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
MOMENTS: tuple[Moment, ...] = get_args(Moment)

INTO_STEP_S = 0.02
"""A strike at a decode step comes up to so much later than the token before."""


@dataclass(frozen=True)
class Fault:
    """One run's fault.

    Attributes:
        thirds: of each, the peer that the chain uses is struck.
        at: 0..1, how far through the prefill's bytes or the decode steps.
        after_s: between the token before and the strike, at a decode step.
        wakes_s: a frozen peer goes on so long after the strike; None: after the answer.
        dies: a frozen peer is killed after the answer instead.
        whole: a peer's other processes (p2pd) freeze with it.
        mode, codec: of the question.
    """

    kind: Kind
    moment: Moment
    thirds: tuple[str, ...]
    at: float
    after_s: float
    wakes_s: float | None
    dies: bool
    whole: bool
    mode: str
    codec: str

    def __str__(self) -> str:
        more = {
            "at": f"{self.at:.2f}" if self.moment != "open" else "",
            "after": f"{self.after_s * 1e3:.0f} ms" if self.moment == "decode" and self.after_s else "",
            "wakes": f"{self.wakes_s:g} s" if self.kind == "freeze" and self.wakes_s else "",
            "dies": "later" if self.kind == "freeze" and self.dies else "",
        }
        words = " ".join(f"{name} {value}" for name, value in more.items() if value)
        return f"{self.kind} of {' and '.join(self.thirds)} in the {self.moment} {words}".rstrip()


def draw(seed: int, cases: Sequence[tuple[str, str]]) -> Iterator[Fault]:
    """Faults without end: in each round each kind once at each moment, and in each third of a round each kind once.

    Args:
        cases: modes and codecs of questions, to draw from.
    """
    for number in itertools.count():
        rng = random.Random(f"{seed} round {number}")
        latin = {kind: rng.sample(MOMENTS, len(MOMENTS)) for kind in KINDS}
        for turn in range(len(MOMENTS)):
            for kind in rng.sample(KINDS, len(KINDS)):
                yield draw_one(rng, kind, latin[kind][turn], rng.choice(cases))


def draw_one(rng: random.Random, kind: Kind, moment: Moment, case: tuple[str, str]) -> Fault:
    # Nobody but the client sends to the first third: no link between peers leads there.
    possible = THIRDS[1:] if kind == "black link" else THIRDS
    thirds = tuple(sorted(rng.sample(possible, 1 if rng.random() < 0.6 else 2), key=THIRDS.index))
    wakes_s, dies = rng.choice(((0.3, False), (1.5, False), (None, False), (None, True)))
    return Fault(
        kind,
        moment,
        thirds,
        at=rng.uniform(0.05, 0.95),
        after_s=rng.choice((0.0, rng.uniform(0.0, INTO_STEP_S))),
        wakes_s=wakes_s,
        dies=dies,
        whole=rng.random() < 0.5,
        mode=case[0],
        codec=case[1],
    )
