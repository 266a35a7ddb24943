"""How many blocks fit: weights, caches and a margin, whatever the model's blocks and cuts are."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from peer.config import PeerConfig
from peer.gauge import probe_kv_bytes
from peer.loading import SpanLoader, cpu_dtype
from peer.memory import KV_TOKENS_MAX, KV_TOKENS_MIN, MARGIN_SHARE, blocks_that_fit, fewer_blocks, kv_tokens
from protocol.errors import ConfigError, UserError
from protocol.span import Span
from slicing import load_span, resolve
from slicing.quantized import Quantization
from tests.harness import served
from tests.slicing.architectures import make_checkpoint

EVEN = [100] * 24
ANYWHERE = range(25)


@pytest.mark.parametrize(
    ("free", "kv_bytes_per_block", "expected"),
    [
        (10_000, 0, 24),
        (1000, 0, 8),  # 800 can be used
        (1000, 100, 4),
        (1248, 0, 9),
        (1250, 0, 10),
        (125, 0, 1),
    ],
)
def test_weights_caches_and_a_margin_fit(free: int, kv_bytes_per_block: int, expected: int) -> None:
    assert blocks_that_fit(free, EVEN, ANYWHERE, kv_bytes_per_block) == expected


def test_the_heaviest_blocks_decide() -> None:
    uneven = [10] * 12 + [100] * 12
    assert blocks_that_fit(1250, uneven, ANYWHERE, 0) == 10
    assert blocks_that_fit(1650, uneven, ANYWHERE, 0) == 24, "all blocks together are no heavier than they are"


def test_only_lengths_between_legal_cuts_count() -> None:
    assert blocks_that_fit(1000, EVEN, (0, 6, 24), 0) == 6
    assert blocks_that_fit(100_000, EVEN, (0, 6, 24), 0) == 24


def test_too_little_memory_is_told_with_numbers() -> None:
    mib = 1 << 20
    with pytest.raises(
        UserError, match=r"not even 6 of the model's 24 blocks fit: weights of 600 MiB and caches of 60 MiB"
    ) as error:
        blocks_that_fit(500 * mib, [100 * mib] * 24, (0, 6, 24), 10 * mib, what="memory of cuda:0")
    assert "400 MiB of 500 MiB free memory of cuda:0" in error.value.message
    assert "--quantization int8" in error.value.message


CUTS = st.sets(st.integers(1, 23)).map(lambda inner: (0, *sorted(inner), 24))


@given(st.integers(0, 4000), st.lists(st.integers(1, 100), min_size=24, max_size=24), CUTS, st.integers(0, 50))
def test_what_is_chosen_fits_and_one_step_more_does_not(
    free: int, block_bytes: list[int], cuts: tuple[int, ...], kv: int
) -> None:
    def needed(n: int) -> int:
        return max(sum(block_bytes[a:b]) + (b - a) * kv for a in cuts for b in cuts if 0 < b - a <= n)

    usable = free - int(free * MARGIN_SHARE)
    lengths = sorted({b - a for a in cuts for b in cuts if a < b})
    try:
        chosen = blocks_that_fit(free, block_bytes, cuts, kv)
    except UserError:
        assert needed(lengths[0]) > usable
        return
    assert needed(chosen) <= usable
    longer = [length for length in lengths if length > chosen]
    assert not longer or needed(longer[0]) > usable


@given(CUTS)
def test_shrinking_comes_to_the_shortest_span_and_ends(cuts: tuple[int, ...]) -> None:
    sizes = [24]
    while (fewer := fewer_blocks(sizes[-1], cuts)) is not None:
        sizes.append(fewer)
    assert all(later < earlier for earlier, later in pairwise(sizes))
    assert sizes[-1] == min(b - a for a, b in pairwise(cuts))


def test_shrinking_is_gentle() -> None:
    assert [fewer_blocks(n, ANYWHERE) for n in (24, 19, 10, 2, 1)] == [19, 15, 8, 1, None]
    assert fewer_blocks(24, (0, 23, 24)) == 1


def test_room_for_tokens() -> None:
    assert kv_tokens(1000 * 40_000, 1000) == 10_000, "a quarter"
    assert kv_tokens(1000 * 20_000, 1000) == 8192, "as planned"
    assert kv_tokens(1000 * 10_000, 1000) == 5000, "half at most"
    assert kv_tokens(0, 1000) == KV_TOKENS_MIN
    assert kv_tokens(1 << 60, 1) == KV_TOKENS_MAX


def test_a_loader_goes_by_the_memory_that_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    config = PeerConfig(kv_tokens=100, device="cpu", dtype="bfloat16")
    loader = SpanLoader.choose(config, resolve(str(tmp_path)), served(tmp_path))
    model = load_span(loader.source, Span(0, 3), dtype=loader.dtype)
    needed = sum(p.nbytes for block in model.blocks.values() for p in block.parameters()) + 100 * probe_kv_bytes(model)
    enough = int(needed / (1 - MARGIN_SHARE)) + 2
    monkeypatch.setattr("peer.memory.free_bytes", lambda device: enough)
    assert loader.num_blocks() == 3
    monkeypatch.setattr("peer.memory.free_bytes", lambda device: int(enough * 0.98))
    assert loader.num_blocks() == 2
    assert loader.fits_beside(Span(3, 6), Span(0, 3)) and not loader.fits_beside(Span(2, 6), Span(0, 2))
    monkeypatch.setattr("peer.memory.free_bytes", lambda device: 1000)
    with pytest.raises(UserError, match="not even 1 of the model's 6 blocks fits"):
        loader.num_blocks()


def test_quantised_blocks_take_less_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_checkpoint("llama", tmp_path)
    monkeypatch.setattr("peer.memory.free_bytes", lambda device: 400_000)
    source, fits = resolve(str(tmp_path)), {}
    kinds: tuple[Quantization, ...] = ("none", "int8", "nf4")
    for quantization in kinds:
        config = PeerConfig(kv_tokens=10, device="cpu", quantization=quantization)
        fits[quantization] = SpanLoader.choose(config, source, served(tmp_path)).num_blocks()
    assert fits["none"] < fits["int8"] <= fits["nf4"], fits


def test_a_device_without_kernels_for_quantised_weights_is_refused(tmp_path: Path) -> None:
    make_checkpoint("llama", tmp_path)
    config = PeerConfig(device="meta", quantization="int8")
    with pytest.raises(ConfigError, match="--quantization int8 works on cpu and cuda, not on meta"):
        SpanLoader.choose(config, resolve(str(tmp_path)), served(tmp_path))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("multiplies_bfloat16", [True, False])
def test_auto_computes_in_bfloat16_only_where_nothing_is_lost(
    stored: torch.dtype | None, multiplies_bfloat16: bool
) -> None:
    expected = torch.bfloat16 if stored == torch.bfloat16 and multiplies_bfloat16 else torch.float32
    assert cpu_dtype(stored, multiplies_bfloat16=multiplies_bfloat16) == expected
