"""Moving a span: what is in memory already is not read again, and what comes out is what a fresh load computes."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from protocol.errors import BrokenCheckpoint, IllegalCut
from protocol.span import Span
from slicing import ModelSource, SpanModel, block_bytes, block_digests, legal_cuts, load_config, load_span, move_span
from slicing import checkpoint as checkpoint_module
from slicing.checkpoint import StoredTensor
from tests.slicing.architectures import MORE, N_BLOCKS, RARE, REQUIRED

ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in MORE | RARE else []) for name in REQUIRED | MORE | RARE]


def outputs(model: SpanModel) -> list[torch.Tensor]:
    """A prefill of random hidden states and two decode steps."""
    cache = model.new_cache()
    found = []
    for tokens in (5, 1, 1):
        zeros, extras = model.example_inputs(tokens)
        hidden = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(tokens)).to(zeros.dtype)
        found.append(model.step(hidden, cache, extras=extras))
    return found


def windows(source: ModelSource) -> tuple[Span, Span]:
    """Two legal spans that overlap, as far as the architecture has such: all but the last piece, all but the first."""
    cuts = legal_cuts(load_config(source))
    return Span(0, cuts[-2] or N_BLOCKS), Span(cuts[1] if cuts[1] < N_BLOCKS else 0, N_BLOCKS)


@pytest.mark.parametrize("name", ALL)
def test_a_moved_span_computes_what_a_fresh_one_does(name: str, source: Callable[[str], ModelSource]) -> None:
    before, after = windows(source(name))
    old = load_span(source(name), before)
    undisturbed = outputs(old)
    moved = move_span(old, source(name), after)
    fresh = load_span(source(name), after)
    for a, b in zip(outputs(fresh), outputs(moved), strict=True):
        assert torch.equal(a, b)
    for a, b in zip(undisturbed, outputs(old), strict=True):
        assert torch.equal(a, b), "the old model was changed"
    assert block_digests(moved) == block_digests(fresh)
    assert moved.dtype == fresh.dtype and moved.hidden_dtypes == fresh.hidden_dtypes


@pytest.mark.parametrize(("before", "after"), [("0:4", "2:6"), ("2:6", "0:3"), ("0:6", "2:4"), ("2:4", "0:6")])
def test_what_is_in_memory_is_not_read_again(
    before: str, after: str, source: Callable[[str], ModelSource], read: list[StoredTensor]
) -> None:
    old = load_span(source("llama"), Span.parse(before))
    read.clear()
    moved = move_span(old, source("llama"), Span.parse(after))
    new_blocks = set(range(*map(int, after.split(":")))) - set(range(*map(int, before.split(":"))))
    assert {int(name.split(".")[2]) for t in read if ".layers." in (name := t.name)} == new_blocks
    assert moved.report.n_bytes == sum(t.nbytes for t in read)
    per_block = block_bytes(source("llama"), torch.float32)
    norm = moved.hidden_size * 4
    assert moved.report.n_bytes == sum(per_block[i] for i in new_blocks) + norm


def test_what_only_the_old_span_needs_is_freed(source: Callable[[str], ModelSource]) -> None:
    old = load_span(source("llama"), Span(0, 4))
    outputs(old)
    dropped, kept = (weakref.ref(next(old.blocks[i].parameters())) for i in (0, 2))
    moved = move_span(old, source("llama"), Span(2, 6))
    del old
    gc.collect()
    assert dropped() is None
    assert kept() is next(moved.blocks[2].parameters())


def test_a_move_elsewhere_reads_all(source: Callable[[str], ModelSource]) -> None:
    old = load_span(source("llama"), Span(0, 2), dtype=torch.bfloat16)
    moved = move_span(old, source("llama"), Span(4, 6))
    assert moved.dtype == torch.bfloat16
    assert moved.report.n_bytes == load_span(source("llama"), Span(4, 6)).report.n_bytes


def test_a_move_where_the_model_cannot_be_cut(source: Callable[[str], ModelSource]) -> None:
    with pytest.raises(IllegalCut):
        move_span(load_span(source("llama"), Span(0, 2)), source("llama"), Span(4, 9))


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3_moe", "gemma3n", "jamba"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_blocks_is_known_beforehand(
    name: str, dtype: torch.dtype, source: Callable[[str], ModelSource]
) -> None:
    model = load_span(source(name), Span(0, N_BLOCKS), dtype=dtype)
    exact = tuple(sum(p.nbytes for p in model.blocks[i].parameters()) for i in range(N_BLOCKS))
    found = block_bytes(source(name), dtype)
    assert len(found) == N_BLOCKS
    # Some architectures keep a few parameters in float32, whatever the model is in.
    assert all(0.95 * a <= b <= a for a, b in zip(exact, found, strict=True)), (exact, found)


class Stopped(Exception):
    pass


def test_a_load_can_be_stopped(source: Callable[[str], ModelSource], read: list[StoredTensor]) -> None:
    def stop(done_bytes: int, total_bytes: int, what: str, /) -> None:
        raise Stopped

    with pytest.raises(Stopped):
        load_span(source("llama"), Span(0, N_BLOCKS), progress=stop)
    assert len(read) < 20, "it went on"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_too_little_memory_is_told_as_that(
    error: Exception, source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, stored: StoredTensor) -> torch.Tensor:
        raise error

    monkeypatch.setattr("slicing.loading.read_tensor", full)
    with pytest.raises(MemoryError):
        load_span(source("llama"), Span(0, 2))


def test_a_broken_file_is_still_a_broken_checkpoint(
    source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, stored: StoredTensor) -> torch.Tensor:
        raise BrokenCheckpoint("ended early")

    monkeypatch.setattr("slicing.loading.read_tensor", broken)
    with pytest.raises(BrokenCheckpoint, match="ended early"):
        move_span(load_span_unbroken(source("llama"), monkeypatch), source("llama"), Span(2, 6))


def load_span_unbroken(source: ModelSource, monkeypatch: pytest.MonkeyPatch) -> SpanModel:
    with monkeypatch.context() as whole:
        whole.setattr("slicing.loading.read_tensor", checkpoint_module.read_tensor)
        return load_span(source, Span(0, 4))
