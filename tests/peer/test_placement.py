"""Where a newcomer goes, and when a peer moves."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.swarm_optimum import Case, joined, optimum, rebalanced, weakest
from dht.record import PeerRecord
from peer.board import REPLICAS_WANTED
from peer.placement import (
    MovePolicy,
    Placed,
    better_span,
    choose_span,
    could_help,
    lack,
    may_move,
    next_check_s,
    outlook,
    placed,
)
from protocol.errors import ConfigError
from protocol.span import Span
from tests.dht.support import peer

N_BLOCKS = 24
ANYWHERE = tuple(range(N_BLOCKS + 1))
SPEED = 100.0  # block-tokens per second
POLICY = MovePolicy()


def others(*spans: str, speed: float = SPEED) -> list[Placed]:
    return [Placed(f"peer-{index}", Span.parse(span), speed) for index, span in enumerate(spans)]


def throughput(peers: list[Placed], n_blocks: int) -> list[float]:
    """Tokens per second of each block."""
    return [sum(p.blocks_per_s / len(p.span) for p in peers if block in p.span) for block in range(n_blocks)]


@pytest.mark.parametrize(
    ("served", "num_blocks", "expected"),
    [
        ([], 24, "0:24"),
        ([], 8, "0:8"),
        (["0:8"], 8, "8:16"),
        (["0:8", "16:24"], 8, "8:16"),
        (["0:24", "0:12"], 4, "12:16"),
        (["0:24"], 99, "0:24"),
    ],
)
def test_the_weakest_blocks_are_chosen(served: list[str], num_blocks: int, expected: str) -> None:
    assert str(choose_span(N_BLOCKS, ANYWHERE, others(*served), num_blocks, SPEED)) == expected


def test_throughput_decides_among_blocks_with_as_many_peers() -> None:
    slow, fast = Placed("slow", Span(0, 8), 10.0), Placed("fast", Span(8, 16), 1000.0)
    assert choose_span(16, tuple(range(17)), [slow, fast], 8, SPEED) == Span(0, 8)


def test_legal_cuts_are_kept() -> None:
    assert choose_span(N_BLOCKS, (0, 6, 24), [], 8, SPEED) == Span(0, 6)
    with pytest.raises(ConfigError, match="--num-blocks 6 at least"):
        choose_span(N_BLOCKS, (0, 6, 24), [], 5, SPEED)


@given(
    st.lists(st.tuples(st.integers(0, 22), st.integers(1, 24)).filter(lambda p: p[0] < p[1])),
    st.integers(1, 24),
)
@settings(deadline=None, max_examples=30)
def test_peers_that_come_one_after_the_other_cover_everything(served: list[tuple[int, int]], num_blocks: int) -> None:
    peers = [Placed(f"old-{index}", Span(*pair), SPEED) for index, pair in enumerate(served)]
    for number in range(N_BLOCKS):
        span = choose_span(N_BLOCKS, ANYWHERE, peers, num_blocks, SPEED)
        peers.append(Placed(f"new-{number}", span, SPEED))
    assert all(any(block in peer.span for peer in peers) for block in range(N_BLOCKS))


@pytest.mark.parametrize(("n_blocks", "num_blocks", "count"), [(24, 8, 6), (24, 8, 9), (24, 6, 12), (80, 10, 16)])
def test_equal_peers_that_join_one_by_one_come_close_to_the_best(n_blocks: int, num_blocks: int, count: int) -> None:
    """Where the blocks can be shared out evenly, the best is known."""
    peers: list[Placed] = []
    for number in range(count):
        span = choose_span(n_blocks, tuple(range(n_blocks + 1)), peers, num_blocks, SPEED)
        peers.append(Placed(f"peer-{number}", span, SPEED))
    best = (count * num_blocks // n_blocks) * SPEED / num_blocks
    assert min(throughput(peers, n_blocks)) >= 0.9 * best


def test_nobody_moves_in_a_balanced_swarm() -> None:
    peers = others("0:8", "8:16", "16:24", "0:8", "8:16", "16:24")
    for me in peers:
        rest = [peer for peer in peers if peer is not me]
        assert better_span(me, rest, N_BLOCKS, ANYWHERE, 8, POLICY, rng=random.Random(1)) is None


def test_a_gap_is_filled_by_exactly_one() -> None:
    """All see the same hole; who has to go is the same for all."""
    peers = others("0:8", "0:8", "0:8", "8:16", "8:16")
    policy = MovePolicy(stand_in=0.0)
    movers = {}
    for me in peers:
        rest = [peer for peer in peers if peer is not me]
        span = better_span(me, rest, N_BLOCKS, ANYWHERE, 8, policy, rng=random.Random(1))
        if span is not None:
            movers[me.peer_id] = span
    assert list(movers.values()) == [Span(16, 24)]
    assert set(movers) < {"peer-0", "peer-1", "peer-2"}, "where there are three, one can go"


def test_the_only_peer_of_a_block_stays_where_its_leaving_would_gain_nothing() -> None:
    peers = others("0:12", "12:24")
    assert better_span(peers[0], peers[1:], N_BLOCKS, ANYWHERE, 12, POLICY, rng=random.Random(1)) is None


@given(st.lists(st.integers(0, 4), min_size=4, max_size=8), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=40)
def test_moves_come_to_rest_with_all_blocks_served(places: list[int], rng: random.Random) -> None:
    """Peers of four blocks in a model of twelve, at least one more than it takes.

    With none to spare they can come to rest where only two moves at once would help.
    """
    n_blocks, cuts = 12, tuple(range(13))
    peers = [Placed(f"peer-{i}", Span(place * 2, place * 2 + 4), SPEED) for i, place in enumerate(places)]
    for _ in range(40):
        moved = False
        for index in range(len(peers)):
            me, rest = peers[index], peers[:index] + peers[index + 1 :]
            span = better_span(me, rest, n_blocks, cuts, 4, POLICY, rng=rng)
            if span is not None:
                peers[index], moved = Placed(me.peer_id, span, SPEED), True
        if not moved:
            break
    assert not moved, "they move for ever"
    assert min(throughput(peers, n_blocks)) > 0


def test_a_peer_that_has_just_come_stays_unless_blocks_lack_peers() -> None:
    assert not may_move(POLICY, 1.0, gap=False)
    assert may_move(POLICY, POLICY.min_stay_s, gap=False)
    assert may_move(POLICY, 1.0, gap=True)


@given(st.integers())
def test_checks_are_spread(seed: int) -> None:
    rng = random.Random(seed)
    for gap, mean_s in ((False, POLICY.check_every_s), (True, POLICY.gap_check_every_s)):
        assert (1 - POLICY.jitter) * mean_s <= next_check_s(POLICY, rng, gap=gap) <= (1 + POLICY.jitter) * mean_s


def records(*values: dict[str, Any]) -> list[PeerRecord]:
    return [peer(index, **{"tokens_per_s": None, "step_ms": None, **each}) for index, each in enumerate(values)]


def test_peers_count_where_they_will_be() -> None:
    found = placed(
        records(
            {"span": "0:8"},
            {"span": "0:8", "state": "joining"},
            {"span": "0:8", "moving_to": Span(8, 16)},
            {"span": "0:8", "state": "draining", "moving_to": Span(8, 16)},
            {"span": "0:8", "state": "draining"},
            {"span": "0:8", "state": "offline"},
            {"span": "0:8", "pinned": True},
        ),
        prior_blocks_per_s=5.0,
    )
    assert [(str(p.span), p.serves, p.pinned) for p in found] == [
        ("0:8", True, False),
        ("0:8", False, False),
        ("8:16", False, False),
        ("8:16", False, False),
        ("0:8", True, True),
    ]


def test_throughput_comes_from_what_was_measured() -> None:
    found = placed(
        records(
            {"span": "0:8", "tokens_per_s": 10.0, "step_ms": 1.0},
            {"span": "0:8", "step_ms": 20.0},
            {"span": "0:8"},
            {"span": "0:8", "tokens_per_s": 0.0},
        ),
        prior_blocks_per_s=5.0,
    )
    assert [p.blocks_per_s for p in found] == [80.0, 400.0, 5.0, 5.0]


def movers(peers: list[Placed], n_blocks: int, policy: MovePolicy = POLICY) -> dict[str, Span]:
    """Who would move, and where to, if all looked at this moment. Each holds as many blocks as it has now."""
    found = {}
    for index, me in enumerate(peers):
        rest = peers[:index] + peers[index + 1 :]
        span = better_span(me, rest, n_blocks, tuple(range(n_blocks + 1)), len(me.span), policy)
        if span is not None:
            found[me.peer_id] = span
    return found


def test_of_many_who_see_one_hole_as_many_go_as_it_lacks_replicas() -> None:
    peers = [Placed(f"peer-{n}", Span(8 * (n % 9), 8 * (n % 9) + 8), SPEED) for n in range(150)]
    assert list(movers(peers, 80).values()) == [Span(72, 80)] * REPLICAS_WANTED


def test_several_holes_are_filled_by_as_many_at_the_same_time() -> None:
    going = movers(others(*["0:8"] * 20, *["16:24"] * 20), 40)
    assert sorted(going.values()) == sorted([Span(8, 16), Span(24, 32), Span(32, 40)] * REPLICAS_WANTED)


def test_those_that_load_or_are_pinned_are_not_waited_for() -> None:
    loading = Placed("a", Span(0, 8), SPEED, serves=False)
    pinned = Placed("b", Span(0, 8), SPEED, pinned=True)
    peers = [loading, pinned, *others("0:8", "0:8", "8:16")]
    assert could_help(N_BLOCKS, ANYWHERE, peers) == {"peer-0", "peer-1"}
    going = movers(peers, N_BLOCKS)
    assert list(going.values()) == [Span(16, 24)]
    assert set(going) < {"peer-0", "peer-1"}


def test_nobody_leaves_blocks_to_a_peer_that_still_loads() -> None:
    """Far more throughput at one end, but the only other peer there does not serve yet."""
    slow = [Placed(f"slow-{n}", Span(8, 16), 10.0) for n in range(2)]
    fast, loading = Placed("fast", Span(0, 8), 1000.0), Placed("loading", Span(0, 8), 1000.0, serves=False)
    assert "fast" not in movers([fast, loading, *slow], 16)
    ready = replace(loading, serves=True)
    assert movers([fast, ready, *slow], 16), "with both serving, one of the two goes"


def test_a_chain_of_moves_closes_a_hole_that_no_single_move_could() -> None:
    peers = others("0:4", "2:6", "6:10")
    for _ in range(4):
        going = movers(peers, 12)
        if not going:
            break
        name, span = next(iter(going.items()))
        peers = [replace(peer, span=span) if peer.peer_id == name else peer for peer in peers]
    assert [str(peer.span) for peer in peers] == ["0:4", "4:8", "8:12"]


def test_one_that_came_lately_moves_for_replicas_only() -> None:
    unequal = [Placed("fast", Span(0, 8), 1000.0), Placed("fast-too", Span(0, 8), 1000.0), *others("8:16", "8:16")]
    for me in unequal[:2]:
        rest = [peer for peer in unequal if peer is not me]
        assert not outlook(me, rest, 16, ANYWHERE[:17], 8, POLICY, settled=False).span
    assert any(
        outlook(me, [p for p in unequal if p is not me], 16, ANYWHERE[:17], 8, POLICY, settled=True).span
        for me in unequal
    )
    hole = others("0:8", "0:8")
    assert any(
        outlook(me, [p for p in hole if p is not me], 16, ANYWHERE[:17], 8, POLICY, settled=False).span for me in hole
    )


def test_it_is_the_turn_of_one_who_can_leave() -> None:
    """Of these two the short one would lose less meanwhile, but nobody else has its first block."""
    peers = others("0:3", "1:10")
    assert movers(peers, 12) == {"peer-1": Span(3, 12)}


def test_another_stands_in_for_one_that_does_not_go_but_rarely() -> None:
    peers = others("0:8", "0:8", "0:8", "8:16", "8:16")
    (first,) = movers(peers, N_BLOCKS)
    late = next(peer for peer in peers[:3] if peer.peer_id != first)
    rest = [peer for peer in peers if peer is not late]
    rng = random.Random(3)
    gone = [better_span(late, rest, N_BLOCKS, ANYWHERE, 8, POLICY, rng=rng) for _ in range(2000)]
    share = sum(span is not None for span in gone) / len(gone)
    assert 0.01 < share < 2 * POLICY.stand_in / 3


def test_records_that_do_not_fit_the_model_are_ignored() -> None:
    absurd = [Placed("far", Span(4000, 4096), 1e12), Placed("nothing", Span(0, 8), 0.0)]
    assert choose_span(N_BLOCKS, ANYWHERE, absurd, 8, SPEED) == Span(8, 16)
    assert lack(N_BLOCKS, absurd[:1]) == lack(N_BLOCKS, [])


small = st.tuples(st.integers(3, 9), st.integers(2, 5)).flatmap(
    lambda sizes: st.tuples(
        st.just(sizes[0]),
        st.lists(st.integers(1, sizes[0]), min_size=sizes[1], max_size=sizes[1]),
        st.lists(st.sampled_from([50.0, 100.0, 170.0]), min_size=sizes[1], max_size=sizes[1]),
    )
)


@pytest.mark.slow
@given(small.filter(lambda case: sum(case[1]) >= case[0]), st.randoms(use_true_random=False))
@settings(deadline=None, max_examples=30)
def test_small_swarms_come_close_to_the_optimum(sizes: tuple[int, list[int], list[float]], rng: random.Random) -> None:
    """No placement beats the brute-forced optimum; nobody moves for ever; and little is left to gain."""
    case = Case(sizes[0], tuple(sizes[1]), tuple(sizes[2]))
    best, before = optimum(case), joined(case)
    after, moves = rebalanced(case, before, POLICY, rng)
    lacks = [lack(case.n_blocks, peers) for peers in (before, after)]
    assert moves <= 10 * len(after)
    assert lacks[1] <= lacks[0]
    if best:
        assert weakest(case.n_blocks, after) <= optimum(case, replicas_first=False) + 1e-6
        assert weakest(case.n_blocks, after) >= 0.5 * best


@given(st.integers(3, 12), st.integers(2, 8), st.integers(1, 12))
@settings(deadline=None, max_examples=40)
def test_equal_peers_that_joined_one_by_one_are_at_the_optimum(n_blocks: int, peers: int, num_blocks: int) -> None:
    case = Case(n_blocks, (min(num_blocks, n_blocks),) * peers, (SPEED,) * peers)
    try:
        best = optimum(case)
    except ValueError:
        assume(False)
    assert weakest(n_blocks, joined(case)) >= 0.95 * best


@given(
    st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda p: p[0] < p[1]), min_size=1, max_size=9)
)
@settings(deadline=None, max_examples=60)
def test_no_single_move_uncovers_a_block(spans: list[tuple[int, int]]) -> None:
    """Blocks that have a peer still have one while the mover is away, unless others have none anyway."""
    peers = [Placed(f"peer-{n}", Span(*span), SPEED) for n, span in enumerate(spans)]
    covered = {block for peer in peers for block in range(peer.span.start, peer.span.stop)}
    for name, target in movers(peers, 12).items():
        rest = {block for peer in peers if peer.peer_id != name for block in range(peer.span.start, peer.span.stop)}
        if len(covered) == 12:
            assert rest == covered
        else:
            assert len(rest | set(range(target.start, target.stop))) >= len(covered)
