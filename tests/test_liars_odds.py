"""Drawn sessions with liars agree with arithmetic."""

from __future__ import annotations

import math

import numpy as np
import pytest

from benchmarks.liars_odds import Habit, Signs, odds
from client.sample import LEAST

NEVER, ALWAYS = np.zeros((1, 1), dtype=bool), np.ones((1, 1), dtype=bool)
NONE, ALL, FAINT = Signs(NEVER, NEVER), Signs(ALWAYS, NEVER), Signs(NEVER, ALWAYS)


def rng() -> np.random.Generator:
    return np.random.default_rng(1)


def test_a_constant_liar_is_found_by_the_first_audit() -> None:
    found = odds(ALL, Habit(), 0.05, 40_000, 40, rng())
    assert found.survives == found.survives_single == pytest.approx(0.95**40, abs=0.006)
    assert found.steps == pytest.approx(math.log(0.5) / math.log(0.95) - 1, abs=1)
    assert found.unseen == found.survives, "all of its tokens came after a lie"


def test_a_seldom_lie_is_found_by_any_later_audit() -> None:
    found = odds(ALL, Habit(share=0.01), 0.05, 4_000, 1_000, rng())
    assert found.survives_single == pytest.approx((1 - 0.0005) ** 1_000, abs=0.03)
    assert found.survives < 0.01
    assert found.shown == pytest.approx(19, abs=2), "until the next audit"


def test_who_is_always_a_little_off_is_found_by_what_is_typical() -> None:
    found = odds(FAINT, Habit(), 1.0, 10, 100, rng())
    assert (found.survives, found.steps, found.survives_single) == (0.0, LEAST - 1, 1.0)
    found = odds(FAINT, Habit(first=80), 1.0, 10, 200, rng())
    assert (found.survives, found.steps) == (0.0, 80 + 32), "when more than half of the last 64 are lies"


@pytest.mark.parametrize(
    ("signs", "habit", "blind"),
    [
        (NONE, Habit(), 0.0),
        (ALL, Habit(first=60), 0.0),
        (ALL, Habit(), 1.0),
        (FAINT, Habit(), 1.0),
        (FAINT, Habit(share=0.1), 0.0),
    ],
    ids=["within the tolerance", "not yet", "its auditor lies alike", "faintly, too", "faintly, and seldom"],
)
def test_what_is_not_noticed_is_not_found(signs: Signs, habit: Habit, blind: float) -> None:
    found = odds(signs, habit, 1.0, 100, 50, rng(), blind)
    assert found.survives == found.survives_single == 1.0
    assert found.steps == found.shown == np.inf
    if habit.share == 1:
        assert found.unseen == (0.0 if habit.first else 1.0)
