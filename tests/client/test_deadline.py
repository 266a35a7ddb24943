"""How long a step may take before the client asks."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.deadline import FACTOR, LEAST_S, REMEMBERED, SHARED, StepTimes

durations_s = st.floats(1e-4, 100.0)


def test_nothing_is_known() -> None:
    times = StepTimes()
    assert times.allowance_s(1) == times.allowance_s(1000) == LEAST_S


def test_the_prior_counts_until_there_are_measurements() -> None:
    times = StepTimes(prior_s=2.0)
    assert times.allowance_s(1) == FACTOR * 2.0
    assert times.allowance_s(160) == pytest.approx(FACTOR * (2.0 + 160 * 2.0 / SHARED))
    times.note(1, 0.5)
    assert times.allowance_s(1) == FACTOR * 0.5
    assert times.allowance_s(160) == pytest.approx(FACTOR * (0.5 + 160 * 0.5 / SHARED))


def test_quick_steps_still_have_a_second() -> None:
    times = StepTimes()
    for _ in range(10):
        times.note(1, 0.01)
    assert times.allowance_s(1) == LEAST_S


def test_a_prefill_is_allowed_time_by_its_size() -> None:
    times = StepTimes()
    times.note(1, 0.1)
    times.note(100, 10.0)  # 0.1 s a token
    assert times.allowance_s(1) == LEAST_S, "prefills say nothing of single tokens"
    assert times.allowance_s(50) == pytest.approx(FACTOR * (0.1 + 50 * 0.1))
    assert times.allowance_s(200) == pytest.approx(FACTOR * (0.1 + 200 * 0.1))


def test_one_slow_step_in_many_is_no_measure() -> None:
    times = StepTimes()
    for took_s in [0.5] * 38 + [60.0] + [0.5]:
        times.note(1, took_s)
    assert times.allowance_s(1) == FACTOR * 0.5
    for _ in range(3):
        times.note(1, 60.0)
    assert times.allowance_s(1) == FACTOR * 60.0, "more than one in twenty are"


def test_what_was_long_ago_is_forgotten() -> None:
    times = StepTimes()
    for took_s in [60.0] * 10 + [0.5] * REMEMBERED:
        times.note(1, took_s)
    assert times.allowance_s(1) == FACTOR * 0.5


@given(st.lists(st.tuples(st.integers(1, 500), durations_s), max_size=80), st.floats(0, 10), st.integers(1, 500))
def test_more_tokens_are_never_allowed_less(noted: list[tuple[int, float]], prior_s: float, tokens: int) -> None:
    times = StepTimes(prior_s)
    for count, took_s in noted:
        times.note(count, took_s)
    assert LEAST_S <= times.allowance_s(tokens) <= times.allowance_s(tokens + 1)


@given(st.lists(durations_s, min_size=1, max_size=REMEMBERED))
def test_nineteen_of_twenty_steps_stay_within_a_third(took_s: list[float]) -> None:
    times = StepTimes()
    for duration_s in took_s:
        times.note(1, duration_s)
    over = sum(1 for duration_s in took_s if FACTOR * duration_s > times.allowance_s(1) * (1 + 1e-9))
    assert over <= len(took_s) / 20
