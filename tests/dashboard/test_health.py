"""How a swarm is: what counts as served, how fast it is, and since when."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dashboard.health import Reach, Standing, assess, standing, used_tokens_per_s, weakest
from protocol.span import Span
from tests.dashboard.support import MODEL, NOW, health, peer, view


def test_a_peer_that_does_not_answer_serves_nothing() -> None:
    (model,) = health(peer("a", "0:12"), peer("b", "12:24"), silent="b").models
    assert model.missing == (Span(12, 24),)
    assert model.blocks_served == 12
    assert [p.standing for p in model.peers] == [Standing.SERVING, Standing.SILENT]
    assert model.answering == 1


def test_a_peer_that_was_not_asked_counts() -> None:
    (model,) = assess(view(peer("a", "0:24")), {}, {}, {}).models
    assert model.is_complete
    assert model.peers[0].standing is Standing.UNASKED


@pytest.mark.parametrize(
    ("state", "answers", "expected"),
    [
        ("online", True, Standing.SERVING),
        ("online", None, Standing.UNASKED),
        ("online", False, Standing.SILENT),
        ("draining", True, Standing.DRAINING),
        ("draining", False, Standing.SILENT),
        ("joining", None, Standing.JOINING),
        ("joining", False, Standing.JOINING),
    ],
)
def test_what_a_peer_is(state: str, answers: bool | None, expected: Standing) -> None:
    assert standing(peer("a", "0:24", state=state), Reach(answers)) is expected


def test_a_peer_of_another_wire_version_serves_nobody() -> None:
    (model,) = health(peer("a", "0:24", wire_version=99)).models
    assert model.missing == (Span(0, 24),)


def test_throughput_is_the_weakest_blocks() -> None:
    peers = (peer("a", "0:12", tokens_per_s=100.0), peer("b", "8:24", tokens_per_s=30.0))
    (model,) = health(*peers, used={"Qmb": 10.0}).models
    assert model.tokens_per_s == 30.0
    assert model.free_tokens_per_s == 20.0


def test_more_use_than_throughput_leaves_nothing_free() -> None:
    (model,) = health(peer("a", "0:24", tokens_per_s=30.0), used={"Qma": 900.0}).models
    assert model.free_tokens_per_s == 0.0


def test_a_throughput_that_one_peer_does_not_know_is_not_known() -> None:
    (model,) = health(peer("a", "0:12"), peer("b", "12:24", tokens_per_s=None)).models
    assert model.tokens_per_s is None


def test_latency_is_computing_and_the_way() -> None:
    (model,) = health(peer("a", "0:12", step_ms=12.0), peer("b", "12:24", step_ms=6.0, queue_ms=4.0)).models
    assert model.token_ms == pytest.approx(12 + 6 + 4 + 3 * 10)  # half a round trip of 20 ms to each, and one back


def test_the_fastest_chain_counts() -> None:
    slow = peer("slow", "0:24", step_ms=240.0)
    (alone,) = health(slow).models
    (helped,) = health(slow, peer("fast", "4:20", step_ms=16.0)).models
    assert alone.token_ms == pytest.approx(240 + 20)
    assert helped.token_ms == pytest.approx(8 * 10 + 16 + 4 * 10)
    assert health(peer("a", "0:12")).models[0].token_ms is None


def test_free_cache_is_the_fullest_blocks() -> None:
    (model,) = health(peer("a", "0:24", kv_tokens_left=100), peer("b", "0:12", kv_tokens_left=5)).models
    assert (model.kv_tokens_left, model.kv_tokens_total) == (100, 4000)


def test_since_when_is_carried_on_as_long_as_nothing_changes() -> None:
    since = {MODEL: ("complete", NOW - 500), "Qma": ("serving", NOW - 300), "Qmb": ("serving", NOW - 300)}
    (model,) = health(peer("a", "0:24"), peer("b", "0:24"), silent="b", since=since).models
    assert model.complete_since == NOW - 500
    assert [p.standing_since for p in model.peers] == [NOW - 300, NOW]


def test_use_is_told_by_two_records_of_one_life() -> None:
    before = peer("a", "0:24", tokens_served=100, sequence=int(NOW * 1e9))
    after = peer("a", "0:24", tokens_served=300, sequence=int((NOW + 20) * 1e9))
    assert used_tokens_per_s(before, after) == pytest.approx(10.0)
    assert used_tokens_per_s(before, peer("a", "0:24", tokens_served=None)) is None
    again = peer("a", "0:24", tokens_served=5, sequence=int((NOW + 20) * 1e9), started_at=NOW)
    assert used_tokens_per_s(before, again) is None


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_the_weakest_run(replicas: list[int]) -> None:
    found = weakest(replicas)
    run = replicas[found.start : found.stop]
    assert set(run) == {min(replicas)}
    assert found.start == 0 or replicas[found.start - 1] > run[0]
    assert found.stop == len(replicas) or replicas[found.stop] > run[0]
