"""Choosing chains, against brute force."""

import itertools
import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.chain import Link, agreed_codec, choose_chain
from client.rules import Rules
from client.times import PeerTimes, Times
from dht.record import PeerRecord
from protocol.errors import BlocksMissing
from protocol.span import Span

BLANK = PeerRecord(
    peer_id="", fingerprint="f", n_blocks=12, span=Span(0, 1), state="online", addresses=("127.0.0.1:1",),
    certificate_der=b"", kv_tokens_left=100, kv_tokens_total=100,
)  # fmt: skip


def peers(*spans: str) -> list[PeerRecord]:
    return [replace(BLANK, peer_id=f"peer-{i}", span=Span.parse(span)) for i, span in enumerate(spans)]


class NoChance(random.Random):
    """No peer counts as slower than another at random."""

    def random(self) -> float:
        return 0.0


def cost_ms(chain: tuple[Link, ...], ways_ms: dict[tuple[str, str], float]) -> float:
    """What a chain costs, written down plainly. The client is ""; no queues, full KV budgets."""
    total_ms, before = 0.0, ""
    for link in chain:
        assert link.peer.step_ms is not None
        total_ms += ways_ms[before, link.peer.peer_id] + 1.0 + (link.peer.queue_ms or 0.0)
        total_ms += link.peer.step_ms / len(link.peer.span) * len(link.span)
        before = link.peer.peer_id
    return total_ms + ways_ms[before, ""]


def all_chains(known: list[PeerRecord], wanted: Span, cuts: set[int]) -> list[tuple[Link, ...]]:
    """Every chain there is. One that uses a peer twice in a row is none."""
    if not wanted.start < wanted.stop:
        return [()]
    found: list[tuple[Link, ...]] = []
    for peer in known:
        stops = [b for b in range(wanted.start + 1, peer.span.stop + 1) if b in cuts or b == wanted.stop]
        for stop in stops if wanted.start in peer.span else []:
            if stop > wanted.stop:
                continue
            rest = all_chains(known, Span(stop, wanted.stop), cuts) if stop < wanted.stop else [()]
            found += [(Link(peer, Span(wanted.start, stop)), *r) for r in rest if not r or r[0].peer is not peer]
    return found


@st.composite
def swarms(draw: st.DrawFn) -> tuple[list[PeerRecord], Times, dict[tuple[str, str], float]]:
    """Up to five peers of six blocks with times, and the one-way times between all of them and the client."""
    known = [
        replace(
            peer,
            n_blocks=6,
            step_ms=draw(st.integers(1, 60)),
            queue_ms=draw(st.none() | st.integers(0, 20)),
        )
        for peer in peers(*draw(st.lists(spans(6), min_size=1, max_size=5)))
    ]
    rtts_ms = {peer.peer_id: float(draw(st.integers(1, 80))) for peer in known}
    ways_ms = {(p, q): max(rtts_ms[p], rtts_ms[q]) / 2 for p, q in itertools.permutations(rtts_ms, 2)}
    ways_ms |= {("", p): ms / 2 for p, ms in rtts_ms.items()} | {(p, ""): ms / 2 for p, ms in rtts_ms.items()}
    for i, j in draw(st.sets(st.sampled_from(list(itertools.combinations(range(len(known)), 2)) or [(0, 0)]))):
        if i != j:
            one, other, ms = known[i].peer_id, known[j].peer_id, float(draw(st.integers(1, 200)))
            known[i] = replace(known[i], rtts_ms=(*known[i].rtts_ms, (other, ms)))
            ways_ms[one, other] = ways_ms[other, one] = ms / 2
    return known, Times(rtts_ms), ways_ms


@settings(deadline=None)  # brute force takes its time
@given(swarms(), st.sets(st.integers(1, 5)))
def test_a_chain_is_the_fastest_of_all(
    swarm: tuple[list[PeerRecord], Times, dict[tuple[str, str], float]], cuts: set[int]
) -> None:
    known, times, ways_ms = swarm
    possible = [cost_ms(chain, ways_ms) for chain in all_chains(known, Span(0, 6), cuts)]
    if not possible:
        with pytest.raises(BlocksMissing):
            choose_chain(known, Span(0, 6), times=times, cuts=cuts, rng=NoChance())
        return
    chain = choose_chain(known, Span(0, 6), times=times, cuts=cuts, rng=NoChance())
    assert {link.span.stop for link in chain[:-1]} <= cuts
    assert cost_ms(chain, ways_ms) == pytest.approx(min(possible))
    spread = choose_chain(known, Span(0, 6), times=times, cuts=cuts)
    assert cost_ms(spread, ways_ms) <= 1.1 * min(possible) + 1e-6, "chance costs a tenth at most"


@settings(deadline=None)
@given(swarms())
def test_where_spans_begin_and_end_a_chain_may_always_be_cut(
    swarm: tuple[list[PeerRecord], Times, dict[tuple[str, str], float]],
) -> None:
    known, times, ways_ms = swarm
    edges = {edge for peer in known for edge in (peer.span.start, peer.span.stop)}
    possible = [cost_ms(chain, ways_ms) for chain in all_chains(known, Span(0, 6), edges)]
    if possible:
        chain = choose_chain(known, Span(0, 6), times=times, rng=NoChance())
        assert cost_ms(chain, ways_ms) == pytest.approx(min(possible))


def spans(n_blocks: int = 12) -> st.SearchStrategy[str]:
    pairs = st.tuples(st.integers(0, n_blocks - 1), st.integers(1, n_blocks)).filter(lambda p: p[0] < p[1])
    return pairs.map(lambda p: f"{p[0]}:{p[1]}")


def fewest_hops(spans: list[Span], n_blocks: int) -> int | None:
    for count in range(1, len(spans) + 1):
        for chosen in itertools.permutations(spans, count):
            reached = 0
            for span in chosen:
                if reached in span:
                    reached = span.stop
            if reached >= n_blocks:
                return count
    return None


@given(st.lists(spans(), max_size=5))
def test_a_chain_is_whole_and_as_short_as_can_be(texts: list[str]) -> None:
    known = peers(*texts)
    expected = fewest_hops([p.span for p in known], 12)
    if expected is None:
        with pytest.raises(BlocksMissing) as caught:
            choose_chain(known, Span(0, 12))
        gaps = [Span.parse(text) for text in caught.value.missing]
        served = {b for p in known for b in range(p.span.start, p.span.stop)}
        assert {b for gap in gaps for b in range(gap.start, gap.stop)} == set(range(12)) - served
        return
    chain = choose_chain(known, Span(0, 12))
    assert [link.span.start for link in chain] == [0, *(link.span.stop for link in chain[:-1])]
    assert chain[-1].span.stop == 12
    assert all(link.peer.span.covers(link.span) for link in chain)
    assert len(chain) == expected


def test_a_part_of_the_model_is_routed_within_it() -> None:
    chain = choose_chain(peers("0:8", "4:12"), Span(5, 7))
    assert [link.span for link in chain] == [Span(5, 7)]


def test_the_less_loaded_of_equals_is_taken() -> None:
    busy, free = peers("0:12", "0:12")
    busy = replace(busy, kv_tokens_left=10)
    assert {choose_chain([busy, free], Span(0, 12))[0].peer.peer_id for _ in range(20)} == {free.peer_id}


def test_clients_spread_over_equals() -> None:
    rng = random.Random(0)
    chosen = {choose_chain(peers("0:12", "0:12"), Span(0, 12), rng=rng)[0].peer.peer_id for _ in range(50)}
    assert chosen == {"peer-0", "peer-1"}


def test_an_avoided_peer_is_used_only_where_there_is_no_other() -> None:
    known = peers("0:12", "0:6", "6:12")
    assert [link.peer.peer_id for link in choose_chain(known, Span(0, 12), avoid={"peer-0"})] == ["peer-1", "peer-2"]
    assert [link.peer.peer_id for link in choose_chain(known[:1], Span(0, 12), avoid={"peer-0"})] == ["peer-0"]


def test_the_chain_speaks_one_codec() -> None:
    new, old, odd = (replace(p, codecs=c) for p, c in zip(
        peers("0:12", "0:6", "6:12"), [("int8", "none"), ("none",), ("zip",)], strict=True
    ))  # fmt: skip
    assert agreed_codec([new, old, odd], 12, ["int8", "none"]) == "int8"
    assert agreed_codec([replace(new, span=Span(6, 12)), old, odd], 12, ["int8", "none"]) == "none"
    assert agreed_codec([odd], 12, ["int8", "none"]) == "int8", "then no chain is found, and that is said"


@pytest.mark.parametrize("state", ["joining", "draining", "offline"])
def test_only_online_peers_are_used(state: str) -> None:
    away = replace(peers("0:12")[0], state=state)  # type: ignore[arg-type]
    with pytest.raises(BlocksMissing, match="blocks 0:12 have no peer"):
        choose_chain([away], Span(0, 12))


def ids(chain: tuple[Link, ...]) -> list[str]:
    return [link.peer.peer_id for link in chain]


def chosen(known: list[PeerRecord], **how: Any) -> list[str]:
    return ids(choose_chain(known, Span(0, 12), rng=NoChance(), **how))


def test_a_near_peer_is_taken_before_a_far_one() -> None:
    known = peers("0:12", "0:12")
    assert chosen(known, times=Times({"peer-0": 80.0, "peer-1": 10.0})) == ["peer-1"]
    assert chosen(known, times=Times({"peer-0": 10.0, "peer-1": 80.0})) == ["peer-0"]


def test_a_peer_that_nobody_has_pinged_is_as_far_as_the_others() -> None:
    times = Times({"peer-0": 10.0, "peer-1": 30.0, "peer-2": 80.0})
    assert chosen(peers("0:12", "0:12", "0:12", "0:12")[1:], times=times) == ["peer-1"]
    assert chosen(peers("0:12", "0:12", "0:12", "0:12")[2:], times=times) == ["peer-3"]


def test_what_the_client_saw_itself_counts_more_than_the_record() -> None:
    known = [replace(peer, step_ms=12.0, queue_ms=0.0, tokens_per_s=100.0) for peer in peers("0:12", "0:12")]
    slow, busy = Times({}, {"peer-0": PeerTimes(block_ms=2.0)}), Times({}, {"peer-0": PeerTimes(queue_ms=5.0)})
    full = Times({}, {"peer-0": PeerTimes(kv_tokens_left=9)})
    for times in (slow, busy, full):
        assert chosen(known, times=times, kv_tokens=10) == ["peer-1"]
    assert chosen(known, times=Times({}, {"peer-0": PeerTimes(block_ms=0.5)})) == ["peer-0"]
    fast = Times({}, {"peer-0": PeerTimes(block_ms=2.0, token_ms=0.1)})
    assert chosen(known, times=fast, tokens=100) == ["peer-0"]


def test_of_a_batch_throughput_counts_more_than_the_time_of_one_token() -> None:
    quick, wide = peers("0:12", "0:12")
    quick, wide = replace(quick, step_ms=10.0, tokens_per_s=100.0), replace(wide, step_ms=20.0, tokens_per_s=5000.0)
    assert chosen([quick, wide]) == ["peer-0"]
    assert chosen([quick, wide], tokens=64) == ["peer-1"]


def test_a_chain_leaves_a_slow_peer_for_a_faster_one_and_comes_back() -> None:
    slow, fast = replace(peers("0:12")[0], step_ms=240.0), replace(peers("1:2", "4:8")[1], step_ms=4.0)
    assert [(link.peer.peer_id, str(link.span)) for link in choose_chain([slow, fast], Span(0, 12))] == [
        ("peer-0", "0:4"), ("peer-1", "4:8"), ("peer-0", "8:12"),
    ]  # fmt: skip
    assert [str(link.span) for link in choose_chain([slow, fast], Span(0, 12), cuts={6})] == ["0:12"]


def test_peers_that_do_not_reach_each_other_are_joined_only_if_nothing_else_is_faster() -> None:
    known = peers("0:6", "6:12", "6:12")
    known[0] = replace(known[0], rtts_ms=(("peer-1", 2.0), ("peer-2", 12.0)))
    times = Times(dict.fromkeys(("peer-0", "peer-1", "peer-2"), 20.0))
    assert chosen(known, times=times) == ["peer-0", "peer-1"]
    assert chosen(known, times=times, relayed={("peer-1", "peer-0")}) == ["peer-0", "peer-2"]
    assert chosen(known[:2], times=times, relayed={("peer-1", "peer-0")}) == ["peer-0", "peer-1"]


def test_the_longer_of_two_published_round_trips_counts() -> None:
    known = peers("0:6", "6:12", "6:12")
    known[0] = replace(known[0], rtts_ms=(("peer-1", 50.0), ("peer-2", 40.0)))
    known[1] = replace(known[1], rtts_ms=(("peer-0", 1.0),))
    assert chosen(known) == ["peer-0", "peer-2"]


def test_a_lost_part_is_replaced_by_peers_near_its_neighbours() -> None:
    known = peers("0:4", "4:8", "4:8", "8:12")
    known[0] = replace(known[0], rtts_ms=(("peer-1", 100.0), ("peer-2", 4.0)))
    known[3] = replace(known[3], rtts_ms=(("peer-1", 100.0), ("peer-2", 4.0)))
    times = Times({"peer-0": 50.0, "peer-1": 20.0, "peer-2": 60.0, "peer-3": 50.0})
    lost: dict[str, Any] = {"wanted": Span(4, 8), "times": times, "rng": NoChance()}
    assert ids(choose_chain(known, **lost, previous="peer-0", following="peer-3")) == ["peer-2"]
    assert ids(choose_chain(known, **lost)) == ["peer-1"], "as near the client as can be, where it stands alone"
    # 50 + 2 ms in and out for peer-2, 10 + 50 ms for peer-1
    assert ids(choose_chain(known, **lost, following="peer-3")) == ["peer-2"]


def test_a_peer_without_room_is_used_only_where_there_is_no_other() -> None:
    full, roomy = peers("0:12", "0:12")
    full = replace(full, kv_tokens_left=63, step_ms=1.0)
    roomy = replace(roomy, kv_tokens_left=64, step_ms=500.0)
    assert chosen([full, roomy], kv_tokens=64) == ["peer-1"]
    assert chosen([full, roomy], kv_tokens=63) == ["peer-0"]
    assert chosen([full], kv_tokens=64) == ["peer-0"]


def test_the_same_seed_gives_the_same_chain() -> None:
    known = peers(*["0:6", "6:12", "3:9"] * 10)
    first = choose_chain(known, Span(0, 12), rng=random.Random(7))
    assert choose_chain(known, Span(0, 12), rng=random.Random(7)) == first


def test_clients_spread_evenly_over_equals() -> None:
    known = peers(*["0:12"] * 8)
    counts = Counter(ids(choose_chain(known, Span(0, 12), rng=random.Random(seed)))[0] for seed in range(800))
    assert all(60 <= counts[peer.peer_id] <= 140 for peer in known)  # 100 and four standard deviations


def test_of_many_peers_good_ones_are_found() -> None:
    """More peers than are considered for each block: the fastest are among them."""
    rng = random.Random(3)
    slow = [replace(peer, step_ms=rng.uniform(500, 900)) for peer in peers(*["0:6", "6:12"] * 300)]
    fast = [replace(p, peer_id=f"fast-{i}", step_ms=5.0) for i, p in enumerate(peers("0:6", "6:12"))]
    assert ids(choose_chain([*slow, *fast], Span(0, 12))) == ["fast-0", "fast-1"]


def test_pinned_peers_are_used_wherever_they_serve() -> None:
    known = [replace(peer, step_ms=1.0) for peer in peers("0:12", "4:8", "6:12")]
    known[1] = replace(known[1], step_ms=1000.0)
    assert chosen(known) == ["peer-0"]
    pinned = choose_chain(known, Span(0, 12), rules=Rules(route=("peer-1",)))
    assert [str(link.span) for link in pinned if link.peer.peer_id == "peer-1"] == ["4:8"]
    assert chosen(known, rules=Rules(route=("peer-1",)), avoid={"peer-1"}) == ["peer-0"], "it has just failed"
    assert chosen(known, rules=Rules(route=("peer-1", "peer-2"), avoid=("peer-1",)))[-1] == "peer-2"


def test_rules_leave_peers_out_and_say_so() -> None:
    known = peers("0:12", "0:6", "6:12")
    assert chosen(known, rules=Rules(avoid=("peer-0",))) == ["peer-1", "peer-2"]
    assert chosen(known, rules=Rules(trust=("peer-0",), trusted_only=True)) == ["peer-0"]
    assert chosen(known, rules=Rules(trust=("peer-1",))) == ["peer-0"], "who is trusted matters only with trusted-only"
    with pytest.raises(BlocksMissing) as caught:
        chosen(known, rules=Rules(trust=("peer-1",), trusted_only=True))
    assert caught.value.missing == ("6:12",)
    assert caught.value.message == "blocks 6:12 are served only by peers that --trusted-only leaves out: peer-0, peer-2"
    with pytest.raises(BlocksMissing, match="served only by peers that --avoid leaves out"):
        chosen(known, rules=Rules(avoid=("peer-0", "peer-2")))
    with pytest.raises(BlocksMissing, match="blocks 0:6 have no peer"):
        chosen(known[2:], rules=Rules(avoid=("peer-2",)))
