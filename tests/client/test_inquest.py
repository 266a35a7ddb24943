"""Where a late step is, judged from what the hops say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.inquest import Finding, Report, judge, signs_of_life
from protocol.errors import PeerError, PeerLost, SessionLost
from protocol.messages import Progress

STEP = 7
SILENT = PeerLost("does not answer")
FORGOT = SessionLost("does not hold the session any more")


def at(received: int, next_step: int, sent: int, expected_ms: float = 0.0) -> Progress:
    return Progress(1, received, next_step, sent, expected_ms=expected_ms)


WAITS = at(7, 7, 7)  # has seen nothing of the step
BUSY = at(8, 7, 7, expected_ms=1500.0)
COMPUTED = at(8, 8, 7)  # and not handed on
DONE = at(8, 8, 8)

CASES: dict[str, tuple[list[Report], Finding]] = {
    "one hop, the step has not arrived": ([WAITS], Finding(stuck=0)),
    "one hop, at work": ([BUSY], Finding(busy=0, expected_s=1.5)),
    "one hop, its result is not handed on": ([COMPUTED], Finding(stuck=1)),
    "one hop, everything is sent": ([DONE], Finding(stuck=1)),
    "one silent hop": ([SILENT], Finding(lost=(0,))),
    "one hop that forgot": ([FORGOT], Finding(lost=(0,))),
    "all done, but no result": ([DONE, DONE, DONE], Finding(stuck=3)),
    "between the client and the first hop": ([WAITS, WAITS, WAITS], Finding(stuck=0)),
    "between the first two": ([DONE, WAITS, WAITS], Finding(stuck=1)),
    "between the first two, and the first still tries": ([COMPUTED, WAITS, WAITS], Finding(stuck=1)),
    "between the last two": ([DONE, DONE, WAITS], Finding(stuck=2)),
    "the first hop is at work": ([BUSY, WAITS, WAITS], Finding(busy=0, expected_s=1.5)),
    "the second hop is at work": ([DONE, BUSY, WAITS], Finding(busy=1, expected_s=1.5)),
    "the second has it, though the first does not know": ([COMPUTED, BUSY, WAITS], Finding(busy=1, expected_s=1.5)),
    "the second is done, though the first does not know": ([COMPUTED, DONE, WAITS], Finding(stuck=2)),
    "the first is silent": ([SILENT, WAITS, WAITS], Finding(lost=(0,))),
    "the second is silent, and has the step": ([DONE, SILENT, WAITS], Finding(lost=(1,))),
    "the second is silent, and cannot be told": ([COMPUTED, SILENT, WAITS], Finding(lost=(1,))),
    "the last is silent": ([DONE, DONE, SILENT], Finding(lost=(2,))),
    "the last is silent, and cannot be told": ([DONE, COMPUTED, SILENT], Finding(lost=(2,))),
    "two neighbours are silent": ([DONE, SILENT, SILENT], Finding(lost=(1, 2))),
    "two that are no neighbours are silent": ([SILENT, WAITS, SILENT], Finding(lost=(0, 2))),
    "all are silent": ([SILENT, SILENT, SILENT], Finding(lost=(0, 1, 2))),
    "one is silent, one forgot": ([DONE, FORGOT, SILENT], Finding(lost=(1, 2))),
    "the first is at work, later ones are silent": ([BUSY, SILENT, SILENT], Finding(busy=0, expected_s=1.5)),
    "the step is stuck before the silent one": ([DONE, WAITS, SILENT], Finding(stuck=1)),
    "a late hop has more than was sent to it": ([WAITS, DONE, DONE], Finding(stuck=0)),
}


@pytest.mark.parametrize("what", CASES)
def test_where_the_step_is(what: str) -> None:
    reports, verdict = CASES[what]
    assert judge(reports, STEP) == verdict


reports = st.lists(
    st.one_of(
        st.sampled_from([SILENT, FORGOT]),
        st.builds(at, *(st.integers(STEP - 1, STEP + 1) for _ in range(3)), st.floats(0, 1e6)),
    ),
    min_size=1,
    max_size=5,
)


@given(reports)
def test_there_is_one_verdict_and_it_accuses_nobody_who_answers(found: list[Report]) -> None:
    verdict = judge(found, STEP)
    assert [bool(verdict.lost), verdict.stuck is not None, verdict.busy is not None].count(True) == 1
    assert all(isinstance(found[index], PeerError) for index in verdict.lost)
    if verdict.lost:
        rest = range(verdict.lost[0], len(found))
        assert [i for i in rest if isinstance(found[i], PeerError)] == list(verdict.lost), "all from there on"
    if verdict.busy is not None:
        busy = found[verdict.busy]
        assert isinstance(busy, Progress)
        assert busy.received > STEP >= busy.next_step
    if verdict.stuck is not None:
        assert 0 <= verdict.stuck <= len(found)
        for index in {max(0, verdict.stuck - 1), min(verdict.stuck, len(found) - 1)}:
            assert isinstance(found[index], Progress), "both ends of the edge answer"


def test_bytes_that_arrive_show_that_a_line_is_slow_and_not_cut() -> None:
    stuck, busy = Finding(stuck=1), Finding(busy=1)
    first = [DONE, Progress(1, 7, 7, 7, arriving_bytes=1000, queue=3), SILENT]
    same = [DONE, Progress(1, 7, 7, 7, arriving_bytes=1000, queue=2), SILENT]
    moved = [DONE, Progress(1, 7, 7, 7, arriving_bytes=2000, queue=3), SILENT]
    assert signs_of_life(first, stuck) == signs_of_life(same, stuck), "others' steps say nothing of a line"
    assert signs_of_life(first, stuck) != signs_of_life(moved, stuck)
    assert signs_of_life(first, busy) != signs_of_life(same, busy), "a queue that shrinks is a peer at work"
    assert signs_of_life(first, stuck) != signs_of_life(first, busy)
