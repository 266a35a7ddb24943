"""Choosing chains, against brute force."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chain import agreed_codec, choose_chain
from dht.record import PeerRecord
from protocol.errors import BlocksMissing
from protocol.span import Span

BLANK = PeerRecord(
    peer_id="", fingerprint="f", n_blocks=12, span=Span(0, 1), state="online", addresses=("127.0.0.1:1",),
    certificate_der=b"", kv_tokens_left=100, kv_tokens_total=100,
)  # fmt: skip


def peers(*spans: str) -> list[PeerRecord]:
    return [replace(BLANK, peer_id=f"peer-{i}", span=Span.parse(span)) for i, span in enumerate(spans)]


def spans() -> st.SearchStrategy[str]:
    pairs = st.tuples(st.integers(0, 11), st.integers(1, 12)).filter(lambda p: p[0] < p[1])
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
