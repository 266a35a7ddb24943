"""Whatever the hops of a chain have and lack, the plan tells each what it lacks, and renews no more than must.

The chain here is made of real logs and fake caches; routes and pushes go as `client.session` and `peer.pump` send them.
"""

from __future__ import annotations

import copy
import itertools
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from client.recovery import lacking, to_renew
from protocol.errors import SessionLost
from protocol.journal import Entry, StepLog
from protocol.limits import IN_FLIGHT
from protocol.messages import Opened
from tests.protocol.entries import FakeCache, hidden, part, steps

REPLAY_TOKENS = 7  # rows x tokens: small, so that most replays are of several parts


def passed(entry: Entry, n_hops: int) -> Entry:
    """What becomes of a step on its way through so many hops."""
    return replace(entry, parts=(part([[(value + n_hops) % 256 for value in row] for row in hidden(entry)]),))


@dataclass
class FakeHop:
    """A hop that adds one to each token. It takes steps as a peer does: in order, none twice, and no gaps."""

    is_last: bool
    cache: FakeCache = field(default_factory=FakeCache)
    next_step: int = 0
    log: StepLog = field(init=False)
    sent: int | None = None  # None: there is no route yet

    def __post_init__(self) -> None:
        self.log = StepLog(keeps_all=not self.is_last)

    def renewed(self) -> FakeHop:
        return FakeHop(self.is_last)

    def opened(self) -> Opened:
        return Opened(self.next_step, 0, 0, "uint8", self.log.kept_from)

    def take(self, entry: Entry) -> None:
        if entry.step_id < self.next_step:
            return
        self.cache.apply(entry)
        assert len(self.cache.rows[0]) == entry.position + entry.tokens, "a gap, or something twice"
        self.next_step = entry.step_id + 1
        self.log.put(passed(entry, 1))

    def lacking_outputs(self) -> list[Entry]:
        """What the next hop has not been told yet."""
        if self.sent is None or self.log.latest is None or self.log.latest.step_id < self.sent:
            return []
        told = self.log.since(self.sent, REPLAY_TOKENS)
        self.sent = told[-1].step_id + 1 if told else self.sent
        return told


class FakeChain:
    """The hops of a session, and its client.

    Attributes:
        log: the client's.
        step_id: the first step whose result the client lacks.
        results: ids of the steps that came out since the chain was connected (again).
    """

    def __init__(self, n_hops: int) -> None:
        self.hops = [FakeHop(is_last=i == n_hops - 1) for i in range(n_hops)]
        self.log = StepLog(keeps_all=True)
        self.step_id = 0
        self.results: list[int] = []

    def begin(self, entry: Entry) -> None:
        """The client's next step is on its way, and has reached nobody yet."""
        self.log.put(entry)

    def send(self, entry: Entry, reaches: int) -> None:
        """The step passes the first `reaches` hops."""
        for hop in self.hops[:reaches]:
            hop.take(entry)
            assert hop.log.latest is not None
            entry = hop.log.latest

    def lose(self, index: int) -> None:
        self.hops[index] = self.hops[index].renewed()

    def half_tell(self, index: int, parts: int) -> None:
        """That hop is a replacement, whose replay was broken off after so many parts."""
        told = self.log.since(0, REPLAY_TOKENS)
        self.lose(index)
        for entry in told[:parts]:
            self.hops[index].take(passed(entry, index))

    def states(self) -> list[Opened]:
        return [hop.opened() for hop in self.hops]

    def connect(self, renewed: tuple[int, ...]) -> None:
        """The plan is carried out: see `Mender._connect`."""
        self.results = []
        for index in renewed:
            self.lose(index)
        for hop in self.hops:
            hop.sent = None
        lacks = [lacking(state, self.step_id, stateless=False) for state in self.states()]
        for hop, next_step in zip(self.hops, [*lacks[1:], self.step_id], strict=True):
            hop.sent = next_step
            self.flow()
        for entry in self.log.since(lacks[0], REPLAY_TOKENS):
            self.hops[0].take(entry)
            self.flow()

    def flow(self) -> None:
        """What hops have and may hand on goes on its way."""
        for index, hop in enumerate(self.hops):
            for entry in hop.lacking_outputs():
                if index + 1 < len(self.hops):
                    self.hops[index + 1].take(entry)
                else:
                    self.results.append(entry.step_id)


def undisturbed(entries: list[Entry], n_hops: int) -> FakeChain:
    chain = FakeChain(n_hops)
    for entry in entries:
        chain.begin(entry)
        chain.send(entry, n_hops)
    return chain


def works(chain: FakeChain, renewed: tuple[int, ...]) -> bool:
    """Can the chain go on, if these hops begin anew?"""
    assert chain.log.latest is not None
    last = chain.log.latest.step_id
    tried = copy.deepcopy(chain)
    try:
        tried.connect(renewed)
    except (SessionLost, AssertionError):
        return False
    return tried.results == [*range(chain.step_id, last + 1)] and all(hop.next_step == last + 1 for hop in tried.hops)


@st.composite
def broken_chains(draw: st.DrawFn) -> tuple[list[Entry], FakeChain]:
    """A session's steps, the last ones on their way, and its chain after losses, evictions and half replays. All that
    may have happened before, too."""
    entries, n_hops = draw(steps(max_steps=2 * IN_FLIGHT)), draw(st.integers(1, 4))
    chain = FakeChain(n_hops)
    on_their_way: list[Entry] = []
    for breaks_at in sorted(draw(st.sets(st.integers(1, len(entries)), max_size=2)) | {len(entries)}):
        if on_their_way:  # then the chain was mended, and these came through
            chain.connect(to_renew(chain.states(), chain.step_id))
        through = entries[: draw(st.integers(max(0, breaks_at - IN_FLIGHT), breaks_at - 1), label="through")]
        for entry in through[chain.hops[-1].next_step :]:
            chain.begin(entry)
            chain.send(entry, n_hops)
        chain.step_id = max(len(through), chain.hops[-1].next_step)
        on_their_way = entries[chain.step_id : breaks_at]
        reaches = n_hops
        for entry in on_their_way:
            chain.begin(entry)
            reaches = draw(st.integers(0, reaches), label="hops that the step has passed")
            chain.send(entry, reaches)
        if not on_their_way:
            continue
        for index, hop in enumerate(chain.hops):
            match draw(st.sampled_from(["well", "well", "evicted", "lost", "half told"])):
                case "evicted":
                    hop.log.evict()
                case "lost":
                    chain.lose(index)
                case "half told":
                    chain.half_tell(index, draw(st.integers(1, 3), label="parts of the replay"))
    assume(on_their_way)
    return entries, chain


def half_told(chain: FakeChain) -> set[int]:
    return {index for index, hop in enumerate(chain.hops) if 0 < hop.next_step < chain.step_id}


@given(broken_chains())
@settings(max_examples=300, deadline=None)
def test_the_plan_makes_the_chain_as_if_nothing_had_happened(broken: tuple[list[Entry], FakeChain]) -> None:
    entries, chain = broken
    wanted = undisturbed(entries, len(chain.hops))
    chain.connect(to_renew(chain.states(), chain.step_id))
    assert [hop.cache.rows for hop in chain.hops] == [hop.cache.rows for hop in wanted.hops]
    assert [hop.next_step for hop in chain.hops] == [hop.next_step for hop in wanted.hops]
    assert chain.results == [*range(chain.step_id, len(entries))], "the client gets what it lacks, in order, once"
    for hop, other in zip(chain.hops, wanted.hops, strict=True):
        assert hop.log.latest is not None
        assert other.log.latest is not None
        assert hidden(hop.log.latest) == hidden(other.log.latest)


@given(broken_chains())
@settings(max_examples=150, deadline=None)
def test_no_plan_renews_fewer_hops(broken: tuple[list[Entry], FakeChain]) -> None:
    """Apart from hops that are half told: these always begin anew."""
    _, chain = broken
    must, plan = half_told(chain), to_renew(chain.states(), chain.step_id)
    assert must <= set(plan)
    indices = range(len(chain.hops))
    smaller = itertools.chain.from_iterable(itertools.combinations(indices, n) for n in range(len(plan)))
    assert works(chain, plan)
    assert not [other for other in smaller if must <= set(other) and works(chain, other)]


@given(broken_chains())
@settings(deadline=None)
def test_a_plan_that_was_carried_out_needs_no_other(broken: tuple[list[Entry], FakeChain]) -> None:
    """The session asks again after hops began anew, until there are none to renew."""
    _, chain = broken
    for index in to_renew(chain.states(), chain.step_id):
        chain.lose(index)
    assert to_renew(chain.states(), chain.step_id) == ()


WHOLE, LATEST = True, False


def opened(next_step: int, whole: bool) -> Opened:
    """`LATEST`: of a hop that was evicted, and keeps but the latest step since."""
    return Opened(next_step, 0, 0, "float32", kept_from=0 if whole else max(0, next_step - 1))


TABLE = {
    "nothing is wrong": ([(7, WHOLE), (7, LATEST)], ()),
    "all are new": ([(0, WHOLE), (0, WHOLE), (0, LATEST)], ()),
    "the first step of all": ([(0, WHOLE), (0, LATEST)], ()),
    "the step has passed the first hop": ([(8, WHOLE), (7, LATEST)], ()),
    "the result was lost": ([(8, WHOLE), (8, LATEST)], ()),
    "a new hop in the middle": ([(8, WHOLE), (0, WHOLE), (7, LATEST)], ()),
    "a new first hop": ([(0, WHOLE), (7, WHOLE), (7, LATEST)], ()),
    "a new last hop": ([(8, WHOLE), (8, WHOLE), (0, LATEST)], ()),
    "a new hop after one whose journal was evicted": ([(8, WHOLE), (8, LATEST), (0, WHOLE)], (1,)),
    "all journals were evicted": ([(8, LATEST), (8, LATEST), (0, LATEST)], (0, 1)),
    "evicted, but everybody has all but the latest": ([(8, LATEST), (8, LATEST), (7, LATEST)], ()),
    "the first hop is new, the second one's journal evicted": ([(0, WHOLE), (8, LATEST), (0, WHOLE)], (1,)),
    "half told": ([(8, WHOLE), (3, WHOLE), (7, LATEST)], (1,)),
    "half told after an evicted journal": ([(8, LATEST), (3, WHOLE), (7, LATEST)], (0, 1)),
    "several steps on their way": ([(12, WHOLE), (10, WHOLE), (9, WHOLE)], ()),
    "several, and a new hop in the middle": ([(12, WHOLE), (0, WHOLE), (9, WHOLE)], ()),
    "several, and a new hop that was told of some": ([(12, WHOLE), (8, WHOLE), (10, WHOLE)], ()),
    "several, but the second one's were evicted": ([(12, WHOLE), (10, LATEST), (7, WHOLE)], (1,)),
    "several results, but the last one's were evicted": ([(12, WHOLE), (11, WHOLE), (11, LATEST)], (2,)),
}


@pytest.mark.parametrize("what", TABLE)
def test_who_begins_anew(what: str) -> None:
    hops, renewed = TABLE[what]
    states = [opened(next_step, whole) for next_step, whole in hops]
    assert to_renew(states, 7) == renewed


def test_without_caches_nobody_begins_anew() -> None:
    states = [opened(0, WHOLE), opened(3, LATEST), opened(8, LATEST)]
    assert to_renew(states, 7, stateless=True) == ()
    assert [lacking(state, 7, stateless=True) for state in states] == [7, 7, 8]
