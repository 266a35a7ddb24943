"""Where a newcomer goes, and when a peer moves."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peer.placement import MovePolicy, Placed, better_span, choose_span, may_move, next_check_s
from protocol.errors import ConfigError
from protocol.span import Span

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
