"""Law 2 over real processes: whatever happens to peers and links in the middle of an answer, the answer is the same.

CHAOS_SEED=17              repeats what a seed drew
CHAOS_ONLY=3,8             of that, only these runs
CHAOS_REPORT=chaos.json    writes what came of it
"""

from __future__ import annotations

import itertools
import os
import random
import secrets
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from client.model import SwarmModel
from protocol.errors import PotluckError
from tests.chaos import report
from tests.chaos.arena import Arena, Place, arena
from tests.chaos.cases import CODECS, MODES, Case, Examiner, ask
from tests.chaos.faults import THIRDS, Fault, draw
from tests.chaos.report import Run

SEED = int(os.environ.get("CHAOS_SEED", secrets.randbits(32)))
"""Fresh in each run; CHAOS_SEED repeats one."""
ONLY = frozenset(int(number) for number in os.environ.get("CHAOS_ONLY", "").split(",") if number)

LONG_RUNS = 100
SHORT_RUNS, SHORT_CASES = 8, 2
SHORT_SLACK = 3.0  # the short version's machine has other things to do, too
CALM_ANSWERS = 3
ANSWER_S = 90.0
"""An answer that takes so much longer than usual is lost."""
OPENING_BYTES = 100
"""The opening of a session has more of them, a lonely ping less."""
MISSED = "the fault did not happen"
LOST = "there was no answer"


class Clock:
    """Takes the time of each pass of a model, and calls somebody after one of them."""

    def __init__(self, at: int = 0, call: Callable[[], None] = lambda: None) -> None:
        self.came_s = [time.monotonic()]
        self._at, self._call = at, call

    def ask(self, model: SwarmModel, case: Case) -> Tensor:
        """The answer, timed."""
        handle = model.register_forward_hook(self._passed)
        self.came_s = [time.monotonic()]
        try:
            return ask(model, case)
        finally:
            handle.remove()

    def _passed(self, *_: object) -> None:
        self.came_s.append(time.monotonic())
        if self.steps == self._at:
            self._call()

    @property
    def steps(self) -> int:
        """Passes so far, the prefill's included."""
        return len(self.came_s) - 1

    def times_s(self) -> tuple[float, float]:
        """Since the question, and the longest pause: between question, tokens, and now."""
        times = [*self.came_s, time.monotonic()]
        return times[-1] - times[0], max(b - a for a, b in itertools.pairwise(times))


@dataclass(frozen=True)
class Calm:
    """How a case is answered when nothing happens.

    Attributes:
        steps: of decoding, the prefill included.
        prefill_bytes: to the peer of each third, until the first token.
    """

    case: Case
    wall_s: float
    pause_s: float
    steps: int
    prefill_bytes: dict[str, int]


@dataclass(eq=False)
class Chaos:
    """The arena, and the cases asked in it so far."""

    arena: Arena
    examiner: Examiner = field(default_factory=Examiner)
    calms: dict[tuple[str, str], Calm] = field(default_factory=dict)

    def calm(self, mode: str, codec: str) -> Calm:
        """A case, and what the calm swarm makes of it: the right answer, and times to compare with."""
        if (mode, codec) not in self.calms:
            case = self.examiner.draw(random.Random(f"{SEED} {mode} {codec}"), mode, codec)
            self.calms[mode, codec] = self._measure(case)
        return self.calms[mode, codec]

    def _measure(self, case: Case) -> Calm:
        times, clock, sent = [], Clock(), {}
        for _ in range(CALM_ANSWERS):
            before = self._sent()
            clock = Clock(1, lambda before=before: sent.update(_more(before, self._sent())))
            answer = clock.ask(self.arena.clients[case.codec], case)
            times.append(clock.times_s())
            assert torch.equal(answer, case.expected), f"CHAOS_SEED={SEED}: the calm swarm answers {case.name} wrongly"
        walls, pauses = zip(*times, strict=True)
        return Calm(case, statistics.median(walls), statistics.median(pauses), clock.steps, sent)

    def _sent(self) -> dict[str, int]:
        return {third: sum(place.proxy.total.up for place in self.arena.of(third)) for third in THIRDS}

    def run(self, number: int, fault: Fault) -> Run:
        """One disturbed answer in a swarm that is whole. What was frozen or cut goes on afterwards."""
        began_s = time.monotonic()
        self.arena.settle()
        calm = self.calm(fault.mode, fault.codec)
        settled_s = time.monotonic() - began_s
        self.arena.events.clear()
        strike = Strike(self.arena, fault, calm)
        answer = in_background(strike.answer)
        trouble = outcome(answer, calm)
        wall_s, pause_s = strike.clock.times_s()
        strike.disarm()
        events = tuple(self.arena.events)
        reroutes = self.arena.clients[fault.codec].blocks.last_stats.reroutes
        complaints = self.arena.mend(kill_frozen=fault.dies)
        if trouble == LOST:
            answer.exception(ANSWER_S)  # it must not go on under the next run's hands
        if not trouble and not strike.struck:
            trouble = MISSED
        return Run(
            number,
            str(fault),
            fault.kind,
            fault.moment,
            len(fault.thirds),
            calm.case.name,
            "; ".join(filter(None, [trouble, *complaints])),
            wall_s - calm.wall_s,
            pause_s,
            calm.pause_s,
            settled_s,
            reroutes,
            events,
        )


def outcome(answer: Future[Tensor], calm: Calm) -> str:
    """Waits for the answer. Returns what is wrong with it, "" if nothing."""
    try:
        found = answer.result(calm.wall_s + ANSWER_S)
    except TimeoutError:
        return LOST
    except PotluckError as error:
        return f"{type(error).__name__}: {error}"
    if torch.equal(found, calm.case.expected):
        return ""
    return f"another answer from token {int((found != calm.case.expected).any(0).nonzero()[0])} on"


class Strike:
    """One fault that is about to happen. `answer` asks; it happens meanwhile."""

    def __init__(self, arena: Arena, fault: Fault, calm: Calm) -> None:
        self._arena, self._fault, self._calm = arena, fault, calm
        self._model = arena.clients[fault.codec]
        self._taken_back: list[Callable[[], None]] = []
        self._timer: threading.Timer | None = None
        self._striking = threading.Lock()
        self._over = False
        self.struck: dict[str, Place] = {}
        step = 1 + int(fault.at * (calm.steps - 1)) if fault.moment == "decode" else 0
        self.clock = Clock(step, self._soon)

    def answer(self) -> Tensor:
        """Asks, with the fault on its way."""
        if self._fault.moment != "decode":
            self._arm()
        return self.clock.ask(self._model, self._calm.case)

    def disarm(self) -> None:
        """What has not happened does not happen any more."""
        with self._striking:
            self._over = True
        for take_back in self._taken_back:
            take_back()
        if self._timer is not None:
            self._timer.join()

    def _arm(self) -> None:
        """Of each third the first peer that gets so many bytes is struck: it is the one in use."""
        for third in self._fault.thirds:
            part = self._fault.at if self._fault.moment == "prefill" else 0.0
            up_bytes = OPENING_BYTES + int(part * (self._calm.prefill_bytes[third] - OPENING_BYTES))
            for place in self._arena.of(third):
                call = lambda third=third, place=place: self._strike(third, place)  # noqa: E731
                self._taken_back.append(place.proxy.when_up(up_bytes, call))

    def _soon(self) -> None:
        """At a decode step: between two of them, or while the next one is under way."""
        if self._fault.after_s:
            self._timer = threading.Timer(self._fault.after_s, self._strike_chain, (self._arena.in_use(self._model),))
            self._timer.start()
        else:
            self._strike_chain(self._arena.in_use(self._model))

    def _strike_chain(self, chain: dict[str, Place]) -> None:
        for third in self._fault.thirds:
            if third in chain:
                self._strike(third, chain[third], chain)

    def _strike(self, third: str, place: Place, chain: dict[str, Place] | None = None) -> None:
        """Once for each third. Of a chain that is not known yet, all peers are upstream."""
        with self._striking:
            if third not in self.struck and not self._over:
                self.struck[third] = place
                upstream = self._arena.places if chain is None else [p for t, p in chain.items() if t != third]
                self._arena.strike(self._fault, place, upstream)


def _more(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    return {third: after[third] - before[third] for third in before}


def in_background(call: Callable[[], Any]) -> Future[Any]:
    """In a thread that does not keep the tests from ending, should it hang."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001  # for whoever waits
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


@pytest.fixture(scope="module", name="chaos")
def _chaos(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chaos]:
    with arena(tmp_path_factory.mktemp("chaos")) as made:
        yield Chaos(made)


def go_through(chaos: Chaos, wanted: int, cases: list[tuple[str, str]]) -> list[Run]:
    """So many runs, whatever comes of each; then the report. A fault that came too late is drawn again."""
    print(f"\nCHAOS_SEED={SEED}")
    runs: list[Run] = []
    try:
        for number, fault in enumerate(itertools.islice(draw(SEED, cases), 2 * wanted)):
            if ONLY and number not in ONLY:
                continue
            run = chaos.run(number, fault)
            if run.trouble != MISSED:
                runs.append(run)
            print(
                f"run {number}: {fault} ({run.case}): {run.trouble or 'right'}, "
                f"{run.extra_s:+.2f} s, {run.reroutes} reroutes, settled in {run.settled_s:.1f} s",
                flush=True,
            )
            if len(runs) == (len(ONLY) or wanted):
                break
    finally:
        print(report.table(runs))
        for line, times in chaos.arena.tracebacks().items():
            print(f"{times} x in the peers' logs: {line}")
        if path := os.environ.get("CHAOS_REPORT"):
            report.write(Path(path), SEED, runs)
    return runs


def judge(runs: list[Run], wanted: int, slack: float) -> None:
    """Fails with all that was not as it must be."""
    if failures := report.failures(runs, slack):
        pytest.fail("\n".join([f"CHAOS_SEED={SEED}", *failures]), pytrace=False)
    assert len(runs) == (len(ONLY) or wanted), "too many faults did not happen"


def test_a_few_disturbed_answers_are_the_same(chaos: Chaos) -> None:
    rng = random.Random(SEED)
    cases = list(itertools.product(MODES, CODECS))
    judge(go_through(chaos, SHORT_RUNS, rng.sample(cases, SHORT_CASES)), SHORT_RUNS, SHORT_SLACK)


@pytest.mark.slow
def test_a_hundred_disturbed_answers_are_the_same(chaos: Chaos) -> None:
    judge(go_through(chaos, LONG_RUNS, list(itertools.product(MODES, CODECS))), LONG_RUNS, slack=1.0)
