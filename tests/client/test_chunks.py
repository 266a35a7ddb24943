"""Chunks fill a chain's pipeline, and are not so small that their fixed costs eat the gain."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.chunks import LEAST_TOKENS, HopCost, chunk_tokens

MAX = 1024


def hops(count: int, step_ms: float = 7.0, token_ms: float = 0.4) -> list[HopCost]:
    return [HopCost(step_ms, token_ms, f"device {index}") for index in range(count)]


def passed_ms(tokens: int, size: int, chain: list[HopCost]) -> float:
    """Simulated: each hop takes chunks in order, as soon as it is free and the hop before it is done with them."""
    sizes = [min(size, tokens - offset) for offset in range(0, tokens, size)]
    free_ms = [0.0] * len(chain)
    for n in sizes:
        arrived_ms = 0.0
        for index, hop in enumerate(chain):
            free_ms[index] = arrived_ms = max(arrived_ms, free_ms[index]) + hop.step_ms + n * hop.token_ms
    return free_ms[-1]


def test_one_hop_is_sent_as_much_as_it_takes() -> None:
    assert chunk_tokens(1000, 1, hops(1), MAX) == 1000
    assert chunk_tokens(2000, 1, hops(1), MAX) == 1000, "in equal parts"
    assert chunk_tokens(1000, 4, hops(1), MAX) == 250, "rows count"


def test_short_prompts_are_not_cut() -> None:
    for tokens in (1, 5, LEAST_TOKENS, 2 * LEAST_TOKENS - 1):
        assert chunk_tokens(tokens, 1, hops(4), MAX) == tokens
    assert chunk_tokens(100, 1, (), MAX) == 100
    assert chunk_tokens(3000, 1, (), MAX) == 1000
    assert chunk_tokens(3, 2048, hops(2), MAX) == 1, "never less than one token"


def test_a_prompt_of_512_tokens_over_four_hops_that_read_their_weights_in_seven_milliseconds_each() -> None:
    """llama-small on four peers: 28 ms for a decode step, 0.8 s for the prompt in one piece."""
    size = chunk_tokens(512, 1, hops(4), MAX)
    assert 96 <= size <= 160
    assert passed_ms(512, size, hops(4)) < 0.5 * passed_ms(512, 512, hops(4))
    alone_ms = 4 * (7.0 + 512 * 0.4)
    assert 4 * -(-512 // size) * 7.0 < 0.15 * alone_ms, "what it costs at most where hops cannot work at once"


def test_hops_that_share_a_device_are_not_to_work_at_once() -> None:
    shared = [replace(hop, device="the only one") for hop in hops(4)]
    assert chunk_tokens(512, 1, shared, MAX) == 512
    assert chunk_tokens(2000, 1, shared, MAX) == 1000
    two = [replace(hop, device=f"device {index % 2}") for index, hop in enumerate(hops(4))]
    assert chunk_tokens(512, 1, hops(4), MAX) <= chunk_tokens(512, 1, two, MAX) < 512


@given(
    st.integers(1, 5000),
    st.integers(1, 4),
    st.lists(
        st.builds(HopCost, st.floats(0.1, 50.0), st.floats(0.01, 10.0), st.uuids().map(str)), min_size=1, max_size=6
    ),
    st.integers(64, 2048),
)
def test_no_other_chunks_are_clearly_better(tokens: int, rows: int, chain: list[HopCost], max_tokens: int) -> None:
    size = chunk_tokens(tokens, rows, chain, max_tokens)
    assert 1 <= size <= max(1, tokens)
    assert size * rows <= max(max_tokens, rows)
    scaled = [HopCost(hop.step_ms, rows * hop.token_ms, hop.device) for hop in chain]
    took_ms = passed_ms(tokens, size, scaled)
    for count in range(1, tokens * rows // LEAST_TOKENS + 1):
        other = -(-tokens // count)
        if other * rows <= max_tokens:
            assert took_ms <= 1.25 * passed_ms(tokens, other, scaled)


@pytest.mark.parametrize("tokens", [512, 2048])
def test_devices_without_fixed_costs_are_all_kept_busy(tokens: int) -> None:
    chain = hops(4, step_ms=0.5)
    one_device_ms = 4 * (0.5 + tokens * 0.4)
    size = chunk_tokens(tokens, 1, chain, MAX)
    assert passed_ms(tokens, size, chain) <= 0.5 * one_device_ms
