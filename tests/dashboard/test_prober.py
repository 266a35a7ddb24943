"""Whom the page asks when there are too many to ask them all. That a lost peer is seen soon: see test_site."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from dashboard.prober import stalest
from tests.dashboard.support import peer


@given(st.integers(1, 40), st.integers(1, 20), st.randoms(use_true_random=False))
def test_everybody_has_a_turn(number: int, at_once: int, rng: random.Random) -> None:
    peers = [peer(f"p{index}", "0:24") for index in range(number)]
    asked_s: dict[str, float] = {}
    rounds = -(-number // at_once)
    for turn in range(rounds):
        chosen = stalest(peers, asked_s, at_once, rng)
        assert len(chosen) == min(number, at_once)
        asked_s |= {one.peer_id: turn + 1.0 for one in chosen}
    assert len(asked_s) == number


def test_no_room_means_nobody() -> None:
    assert stalest([peer("a", "0:24")], {}, -1, random.Random(0)) == []
