"""SpanCache: operations do what transformers' own do to a whole cache, and bad ones touch nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protocol.errors import BadMessage
from protocol.span import Span
from slicing import CacheOp, ModelSource, SpanCache, SpanModel, load_span

SPAN = Span(2, 5)


@pytest.fixture(scope="module")
def model(source: Callable[[str], ModelSource]) -> Callable[[str], SpanModel]:
    made: dict[str, SpanModel] = {}
    return lambda name: made.setdefault(name, load_span(source(name), SPAN))


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, 64, generator=torch.Generator().manual_seed(seed))


def seen(model: SpanModel, hidden: Tensor, *, record: bool = False) -> SpanCache:
    """A cache that has seen `hidden`, in one step."""
    cache = model.new_cache()
    if record:
        cache.apply(CacheOp("record_past"))
    model.step(hidden, cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "gpt2", "falcon"])
@pytest.mark.parametrize("kept", [12, 9, 3, 0])
def test_after_a_crop_it_is_as_if_the_rest_had_never_come(
    name: str, kept: int, model: Callable[[str], SpanModel]
) -> None:
    hidden, following = noise(2, 12), noise(2, 1, seed=1)
    cropped = model(name).new_cache()
    cropped.apply(CacheOp("record_past"))
    for i in range(12):  # token by token: so each crop goes over more than one step
        model(name).step(hidden[:, i : i + 1], cropped)
    cropped.apply(CacheOp("crop", kept))
    fresh = model(name).new_cache()
    for i in range(kept):
        model(name).step(hidden[:, i : i + 1], fresh)
    assert cropped.n_tokens == fresh.n_tokens == kept
    assert torch.equal(model(name).step(following, cropped), model(name).step(following, fresh))


def test_a_window_that_was_not_recorded_cannot_be_cropped(model: Callable[[str], SpanModel]) -> None:
    gemma = model("gemma3_text")
    cache = seen(gemma, noise(1, 12))
    with pytest.raises(BadMessage, match="not recorded"):
        cache.apply(CacheOp("crop", 11))
    cache.apply(CacheOp("record_past"))
    gemma.step(noise(1, 3), cache)
    cache.apply(CacheOp("crop", 12))
    with pytest.raises(BadMessage, match="not recorded"):
        cache.apply(CacheOp("crop", 10))
    assert cache.n_tokens == 12


def test_within_its_window_a_cache_can_be_cropped_without_recording(model: Callable[[str], SpanModel]) -> None:
    cache = seen(model("gemma3_text"), noise(1, 6))
    cache.apply(CacheOp("crop", 2))
    assert cache.n_tokens == cache.get_seq_length() == 2


@pytest.mark.parametrize("name", ["qwen3_next", "mamba2", "jamba"])
def test_a_running_state_cannot_be_cropped(name: str, model: Callable[[str], SpanModel]) -> None:
    cache = seen(model(name), noise(1, 6), record=True)
    with pytest.raises(BadMessage, match="not recorded"):
        cache.apply(CacheOp("crop", 5))
    cache.apply(CacheOp("crop", 6))
    assert cache.n_tokens == 6


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "bloom", "jamba", "mamba2", "qwen3_next", "deepseek_v3"])
@pytest.mark.parametrize(
    ("op", "rows"),
    [
        (CacheOp("reorder", (2, 0, 0)), [2, 0, 0]),
        (CacheOp("repeat", 2), [0, 0, 1, 1, 2, 2]),
        (CacheOp("select", (1,)), [1]),
    ],
)
def test_rows_go_where_the_operation_says(
    name: str, op: CacheOp, rows: list[int], model: Callable[[str], SpanModel]
) -> None:
    hidden, following = noise(3, 9), noise(len(rows), 1, seed=1)
    cache = seen(model(name), hidden)
    cache.apply(op)
    assert cache.batch == len(rows)
    expected = model(name).step(following, seen(model(name), hidden[rows]))
    # Other batch sizes take other kernels, which round otherwise.
    torch.testing.assert_close(model(name).step(following, cache), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "jamba", "mamba2"])
def test_after_a_reset_it_is_as_new_also_for_another_number_of_rows(
    name: str, model: Callable[[str], SpanModel]
) -> None:
    cache = seen(model(name), noise(2, 9))
    cache.apply(CacheOp("reset"))
    assert cache.n_tokens == 0
    assert cache.batch is None
    assert cache.nbytes() == model(name).new_cache().nbytes()
    hidden = noise(3, 4)
    assert torch.equal(model(name).step(hidden, cache), model(name).step(hidden, model(name).new_cache()))


BAD: list[tuple[Any, Any]] = [
    ("crop", 10),
    ("crop", -1),
    ("crop", True),
    ("crop", None),
    ("crop", (1,)),
    ("reorder", (0, 2)),
    ("reorder", (0, -1)),
    ("reorder", (0,)),
    ("reorder", (0, 1, 0)),
    ("reorder", (0.0, 1.0)),
    ("reorder", 1),
    ("repeat", 0),
    ("repeat", True),
    ("repeat", (1, 1)),
    ("select", ()),
    ("select", (2,)),
    ("select", (0, 1, 0)),
    ("reset", 1),
    ("record_past", 1),
    ("melt", None),
]


@pytest.mark.parametrize(("kind", "value"), BAD)
def test_bad_operations_touch_nothing(kind: Any, value: Any, model: Callable[[str], SpanModel]) -> None:
    hidden, following = noise(2, 9), noise(2, 1, seed=1)
    cache = seen(model("llama"), hidden)
    with pytest.raises(BadMessage):
        cache.apply(CacheOp(kind, value))
    assert torch.equal(
        model("llama").step(following, cache), model("llama").step(following, seen(model("llama"), hidden))
    )


def test_operations_before_the_first_step(model: Callable[[str], SpanModel]) -> None:
    cache = model("llama").new_cache()
    for op in (CacheOp("crop", 0), CacheOp("record_past"), CacheOp("repeat", 3), CacheOp("reset")):
        cache.apply(op)
    with pytest.raises(BadMessage):
        cache.apply(CacheOp("reorder", (0,)))
    assert cache.nbytes() == 0


def test_transformers_own_operations_are_refused(model: Callable[[str], SpanModel]) -> None:
    cache = seen(model("llama"), noise(1, 4))
    with pytest.raises(TypeError, match="apply"):
        cache.crop(-1)
    assert cache.n_tokens == 4


def test_memory_is_what_the_owned_blocks_hold(model: Callable[[str], SpanModel]) -> None:
    # keys and values of 3 blocks, 2 rows, 2 KV heads, 9 tokens, 16 wide, float32
    assert seen(model("llama"), noise(2, 9)).nbytes() == 3 * 2 * (2 * 2 * 9 * 16 * 4)
    assert seen(model("mamba2"), noise(2, 9)).nbytes() > 0
    part = model("llama").new_cache(Span(3, 4))
    model("llama").step(noise(2, 9), part)
    assert part.nbytes() == 2 * (2 * 2 * 9 * 16 * 4)


def test_memory_counts_whole_allocations(model: Callable[[str], SpanModel]) -> None:
    cache = seen(model("llama"), noise(1, 100))
    before = cache.nbytes()
    cache.apply(CacheOp("crop", 1))
    assert cache.nbytes() == before


@pytest.mark.parametrize("name", ["gemma3_text", "gpt_oss", "qwen3_next", "jamba", "nemotron_h", "gemma3n"])
def test_any_part_of_a_span_answers_for_the_kinds_of_blocks_that_it_lacks(
    name: str, source: Callable[[str], ModelSource]
) -> None:
    whole = load_span(source(name), Span(0, 6))
    for cut in sorted(whole.new_cache().span.start + i for i in range(6)):
        try:
            cache = whole.new_cache(Span(cut, cut + 1))
        except BadMessage:
            continue  # an illegal cut
        for n in (0, 5, 11):
            cache.n_tokens = n
            reference = whole.new_cache()
            for layer, expected in zip(cache.layers, reference.layers, strict=True):
                if type(layer).__name__ == "_Counter":
                    expected.cumulative_length = n
                    assert layer.get_seq_length() == n
                    if layer.is_sliding:
                        assert layer.get_mask_sizes(3) == expected.get_mask_sizes(3)
