"""Claims and moves as pure decisions: who came first, who gives way, and that no move leaves a hole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dht.record import PeerRecord
from peer.balance import is_safe, may_go
from peer.claim import came_first, claimed, rivals
from peer.host import HANDED_OVER_S, holding_up
from protocol.span import Span
from tests.dht.support import peer


def record(index: int, span: str, state: Any = "online", moving_to: str | None = None, sequence: int = 1) -> PeerRecord:
    target = None if moving_to is None else Span.parse(moving_to)
    return peer(index, span, state, moving_to=target, sequence=sequence)


def test_what_a_record_claims() -> None:
    assert claimed(record(0, "0:3")) is None
    assert claimed(record(0, "0:3", "draining")) is None
    assert claimed(record(0, "0:3", "joining")) == Span(0, 3)
    assert claimed(record(0, "0:3", "online", "3:6")) == Span(3, 6)
    assert claimed(record(0, "0:3", "draining", "3:6")) == Span(3, 6)


def test_of_two_that_join_at_once_the_later_one_gives_way() -> None:
    first, second = record(0, "0:3", "joining", sequence=5), record(1, "2:6", "joining", sequence=6)
    assert rivals(first, [second]) == ()
    assert rivals(second, [first]) == (first,)


def test_at_the_same_nanosecond_the_peer_id_decides() -> None:
    one, other = record(0, "0:3", "joining", sequence=5), record(1, "0:3", "joining", sequence=5)
    assert came_first(one, other) != came_first(other, one)


def test_no_claims_no_rivals() -> None:
    mine = record(0, "0:3", "joining", sequence=5)
    assert rivals(mine, [record(1, "3:6", "joining", sequence=1)]) == (), "other blocks"
    assert rivals(mine, [record(1, "0:3", "online", sequence=1)]) == (), "serves already, which choosing took in"
    assert rivals(mine, [record(1, "0:3", "online", "6:9", sequence=1)]) == (), "goes elsewhere"
    assert rivals(record(0, "0:3"), [record(1, "0:3", "joining", sequence=0)]) == (), "claims nothing itself"


def test_who_drains_to_move_has_settled() -> None:
    mine = record(0, "0:3", "online", "3:6", sequence=5)
    drains = record(1, "0:3", "draining", "3:6", sequence=9)
    assert rivals(mine, [drains]) == (drains,)
    assert not may_go(mine, Span(3, 6), [drains])


CLAIMS = st.lists(
    st.tuples(st.integers(0, 20), st.integers(1, 8), st.integers(1, 3)).map(
        lambda c: (f"{c[0]}:{min(24, c[0] + c[1])}", c[2])
    ),
    min_size=2,
    max_size=5,
)


@settings(deadline=None)  # identities are slow to make
@given(CLAIMS)
def test_of_any_claims_that_overlap_one_stands(claims: list[tuple[str, int]]) -> None:
    records = [record(i, span, "joining", sequence=sequence) for i, (span, sequence) in enumerate(claims)]
    stands = [mine for mine in records if not rivals(mine, [other for other in records if other is not mine])]
    assert stands
    for one, other in permutations(stands, 2):
        assert one.span.overlap(other.span) is None


# ---------------------------------------------------------------------- moves


@pytest.mark.parametrize(
    ("others", "safe"),
    [
        ([], False),
        ([record(1, "0:3")], True),
        ([record(1, "0:1"), record(2, "1:3")], True),
        ([record(1, "0:2")], False),
        ([record(1, "0:3", "joining")], False),
        ([record(1, "0:3", "draining")], False),
        ([record(1, "0:3", "online", "6:9", sequence=1)], False),
    ],
    ids=lambda value: " ".join(f"{r.span} {r.state}" for r in value) if isinstance(value, list) else str(value),
)
def test_no_block_is_left_alone(others: list[PeerRecord], safe: bool) -> None:
    assert is_safe(record(0, "0:3"), Span(3, 6), others) is safe
    assert is_safe(record(0, "0:3", "online", "3:6", sequence=5), Span(3, 6), others) is safe


def test_blocks_that_are_kept_need_another_only_while_answers_can_be_made() -> None:
    assert is_safe(record(0, "0:3"), Span(1, 4), [record(1, "0:1")]), "23 blocks have no peer"
    assert not is_safe(record(0, "0:3"), Span(1, 4), [record(1, "0:1"), record(2, "3:24")])
    assert is_safe(record(0, "0:3"), Span(1, 4), [record(1, "0:3"), record(2, "3:24")])


def test_of_two_that_would_leave_the_same_blocks_the_later_one_stays() -> None:
    first = record(0, "0:3", "online", "3:6", sequence=5)
    second = record(1, "0:3", "online", "6:9", sequence=6)
    assert may_go(first, Span(3, 6), [second])
    assert not may_go(second, Span(6, 9), [first])
    draining = record(1, "0:3", "draining", "6:9", sequence=6)
    assert not may_go(first, Span(3, 6), [draining]), "it cannot be stopped any more"


@st.composite
def swarms(draw: st.DrawFn) -> list[PeerRecord]:
    """Peers of a model of six blocks, some of which want to move."""
    spans = [f"{a}:{b}" for a in range(6) for b in range(a + 1, 7)]
    records = []
    for index in range(draw(st.integers(2, 6))):
        target = draw(st.sampled_from([None, *spans]))
        wanted = record(index, draw(st.sampled_from(spans)), "online", target, draw(st.integers(1, 3)))
        records.append(replace(wanted, n_blocks=6))
    return records


def blocks_of(spans: Iterable[Span]) -> set[int]:
    return {block for span in spans for block in range(span.start, span.stop)}


@settings(deadline=None)
@given(swarms())
def test_all_moves_that_may_be_made_at_once_lose_no_block(records: list[PeerRecord]) -> None:
    moves = {
        mine.peer_id: mine.moving_to
        for mine in records
        if mine.moving_to is not None
        and may_go(mine, mine.moving_to, [other for other in records if other is not mine])
    }
    before = blocks_of(record.span for record in records)
    meanwhile = blocks_of(record.span for record in records if record.peer_id not in moves)
    after = blocks_of(moves.get(record.peer_id, record.span) for record in records)
    assert before <= after
    if len(before) == 6:
        assert len(meanwhile) == 6, "answers go on while peers move"


# ---------------------------------------------------------------------- sessions that hold up a leaver


def test_a_session_holds_up_a_leaver_while_it_steps() -> None:
    now_s = 100.0
    assert holding_up([(now_s, False), (now_s - HANDED_OVER_S / 2, False)], now_s) == 2
    assert holding_up([(now_s - HANDED_OVER_S, False), (0.0, False)], now_s) == 0, "they only rest"
    assert holding_up([(0.0, True)], now_s) == 1, "a long prefill is under way"
    assert holding_up([], now_s) == 0
