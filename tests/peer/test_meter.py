"""What a peer says of its speed: prior, live steps, idle moments."""

from __future__ import annotations

import pytest

from peer.meter import OUTLIER, QUEUE_HALF_LIFE_S, Meter


def decode(
    meter: Meter, steps: int, *, blocks: int = 8, rows: int = 1, queue_ms: float = 0.0, ms: float = 10.0
) -> None:
    for step in range(steps):
        meter.note(blocks, 1, rows, queue_ms, ms, float(step))


def test_nothing_is_said_before_anything_is_known() -> None:
    meter = Meter(8)
    assert (meter.step_ms, meter.tokens_per_s, meter.queue_ms(0.0)) == (None, None, None)
    assert meter.idle_s(5.0) == float("inf")


def test_the_prior_is_said_at_once_and_live_steps_take_over() -> None:
    meter = Meter(8)
    meter.measured(40.0, 0.0)
    assert (meter.step_ms, meter.tokens_per_s) == (40.0, 25.0)
    decode(meter, 100, ms=10.0)
    assert meter.step_ms == pytest.approx(10.0, rel=0.01)
    assert meter.tokens_per_s == pytest.approx(100.0, rel=0.01)


def test_all_tokens_are_counted() -> None:
    meter = Meter(8)
    decode(meter, 5, rows=3)
    meter.note(8, 512, 1, 0.0, 900.0, 6.0)
    assert meter.tokens == 5 * 3 + 512


def test_a_chain_that_uses_a_part_is_scaled_to_the_span() -> None:
    meter = Meter(8)
    decode(meter, 50, blocks=2, ms=5.0)
    assert meter.step_ms == pytest.approx(20.0)
    assert meter.tokens_per_s == pytest.approx(50.0)


def test_throughput_does_not_depend_on_how_busy_the_peer_is() -> None:
    busy, calm = Meter(8), Meter(8)
    for step in range(50):
        busy.note(8, 1, 1, 0.0, 10.0, step * 0.01)
        calm.note(8, 1, 1, 0.0, 10.0, step * 10.0)
    assert busy.tokens_per_s == calm.tokens_per_s == pytest.approx(100.0)


def test_rows_add_up_in_the_throughput_and_not_in_the_step() -> None:
    meter = Meter(8)
    meter.measured(10.0, 0.0)
    decode(meter, 100, rows=4, ms=20.0)
    assert meter.tokens_per_s == pytest.approx(200.0, rel=0.01)
    assert meter.step_ms == 10.0


def test_prefills_tell_nothing_of_decoding_but_of_waiting() -> None:
    meter = Meter(8)
    meter.measured(10.0, 0.0)
    for _ in range(50):
        meter.note(8, 512, 1, 30.0, 900.0, 1.0)
    assert (meter.step_ms, meter.tokens_per_s) == (10.0, 100.0)
    assert meter.queue_ms(1.0) == pytest.approx(30.0)


def test_who_waits_is_forgotten_when_nobody_comes() -> None:
    meter = Meter(8)
    decode(meter, 10, queue_ms=40.0)
    assert meter.queue_ms(9.0) == pytest.approx(40.0)
    assert meter.queue_ms(9.0 + QUEUE_HALF_LIFE_S) == pytest.approx(20.0)
    assert meter.queue_ms(9.0 + 20 * QUEUE_HALF_LIFE_S) == pytest.approx(0.0, abs=1e-3)


def test_one_hiccup_moves_it_little() -> None:
    meter = Meter(8)
    decode(meter, 50)
    meter.note(8, 1, 1, 0.0, 30_000.0, 60.0)
    assert meter.step_ms is not None and meter.step_ms <= 10.0 * (1 + 0.1 * OUTLIER)


def test_idle_moments_refresh_it() -> None:
    meter = Meter(8)
    decode(meter, 50, ms=100.0)
    assert meter.idle_s(79.0) == 30.0
    for now_s in (80.0, 90.0, 100.0, 110.0):
        meter.measured(10.0, now_s)
    assert meter.step_ms is not None and meter.step_ms < 20.0
    assert meter.tokens_per_s == pytest.approx(1000.0 / meter.step_ms)
    assert meter.idle_s(115.0) == 5.0
