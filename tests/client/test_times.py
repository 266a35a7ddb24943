"""What a client remembers of peers' times, with a clock that the test turns."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.times import FORGET_S, LIVE_S, SAMPLES, PeerTimes, Stopwatch


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stopwatch(clock: Clock) -> Stopwatch:
    return Stopwatch(clock)


def decode(stopwatch: Stopwatch, compute_ms: float, queue_ms: float = 0.0, blocks: int = 4) -> None:
    stopwatch.note("p", blocks, 1, compute_ms, queue_ms, 50)


def test_nothing_is_known_at_first(stopwatch: Stopwatch) -> None:
    times = stopwatch.snapshot()
    assert (dict(times.rtts_ms), times.of("p"), times.expected_ms("p", 4, 1)) == ({}, PeerTimes(), None)
    assert stopwatch.rtt_age_s("p") == math.inf


def test_round_trips_are_smoothed_and_forgotten(stopwatch: Stopwatch, clock: Clock) -> None:
    stopwatch.note_rtt("p", 10.0)
    assert stopwatch.snapshot().rtts_ms == {"p": 10.0}
    clock.now_s += FORGET_S
    stopwatch.note_rtt("p", 20.0)
    assert stopwatch.snapshot().rtts_ms == {"p": pytest.approx(13.0)}
    clock.now_s += 1.0
    assert stopwatch.rtt_age_s("p") == 1.0
    clock.now_s += FORGET_S
    assert stopwatch.snapshot().rtts_ms == {}
    stopwatch.note_rtt("p", 30.0)
    assert stopwatch.snapshot().rtts_ms == {"p": 30.0}, "what is forgotten does not come back in the mean"


def test_an_old_round_trip_is_forgotten_though_steps_go_on(stopwatch: Stopwatch, clock: Clock) -> None:
    stopwatch.note_rtt("p", 10.0)
    clock.now_s += FORGET_S + 1
    decode(stopwatch, 8.0)
    times = stopwatch.snapshot()
    assert times.rtts_ms == {}
    assert times.of("p").block_ms == 2.0


def test_steps_are_live_for_a_minute(stopwatch: Stopwatch, clock: Clock) -> None:
    decode(stopwatch, 8.0, queue_ms=3.0)
    stopwatch.note("p", 4, 100, 40.0, 3.0, 49)
    known = stopwatch.snapshot().of("p")
    assert (known.block_ms, known.token_ms, known.queue_ms, known.kv_tokens_left) == (2.0, 0.1, 3.0, 49)
    clock.now_s += LIVE_S + 1
    later = stopwatch.snapshot()
    assert later.of("p") == PeerTimes(decode=known.decode, prefill=known.prefill), "deadlines remember for longer"
    assert later.expected_ms("p", 4, 1) == 11.0
    decode(stopwatch, 80.0)
    assert stopwatch.snapshot().of("p").block_ms == 20.0, "what is no longer live does not come back in the mean"
    clock.now_s += FORGET_S + 1
    assert stopwatch.snapshot().by_peer == {}
    decode(stopwatch, 4.0)
    assert stopwatch.snapshot().expected_ms("p", 4, 1) == 4.0


def test_a_snapshot_stays_as_it_was(stopwatch: Stopwatch) -> None:
    decode(stopwatch, 8.0)
    before = stopwatch.snapshot()
    decode(stopwatch, 800.0)
    assert before.expected_ms("p", 4, 1) == 8.0


@given(st.lists(st.tuples(st.floats(0, 50), st.floats(0.1, 500)), min_size=1, max_size=2 * SAMPLES))
def test_all_but_one_in_twenty_steps_were_within_what_is_expected(steps: list[tuple[float, float]]) -> None:
    stopwatch = Stopwatch(Clock())
    for queue_ms, compute_ms in steps:
        stopwatch.note("p", 4, 1, compute_ms, queue_ms, 50)
    totals = [queue_ms + compute_ms for queue_ms, compute_ms in steps[-SAMPLES:]]
    expected_ms = stopwatch.snapshot().expected_ms("p", 4, 1)
    assert expected_ms is not None
    assert sum(total > expected_ms + 1e-6 for total in totals) <= len(totals) / 20
    assert any(total == pytest.approx(expected_ms) for total in totals)


def test_expectations_scale_with_blocks_and_tokens(stopwatch: Stopwatch) -> None:
    stopwatch.note("p", 4, 100, 40.0, 6.0, 50)
    assert stopwatch.snapshot().expected_ms("p", 4, 1) is None, "a prefill says nothing of decode steps"
    assert stopwatch.snapshot().expected_ms("p", 2, 300) == pytest.approx(6.0 + 60.0)
    decode(stopwatch, 8.0, queue_ms=1.0)
    times = stopwatch.snapshot()
    assert times.expected_ms("p", 2, 1) == 5.0
    assert times.expected_ms("p", 4, 2) == 9.0, "two tokens take no less than one"


def test_without_a_prefill_as_long_as_so_many_decode_steps(stopwatch: Stopwatch) -> None:
    decode(stopwatch, 8.0, queue_ms=1.0)
    assert stopwatch.snapshot().expected_ms("p", 4, 10) == 81.0


def test_memory_is_bounded(stopwatch: Stopwatch, clock: Clock) -> None:
    for i in range(1000):
        stopwatch.note_rtt(f"peer-{i}", 1.0)
        clock.now_s += 1.0
        stopwatch.snapshot()
    assert len(stopwatch._by_peer) <= FORGET_S + 1
