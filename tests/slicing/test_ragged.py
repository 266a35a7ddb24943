"""Packed passes: exact for the architectures for which that is claimed, and refused for the others."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import slicing.proof
from protocol.errors import BadMessage
from protocol.span import Span
from slicing import CacheOp, ModelSource, PagedCache, RaggedSpan, SpanModel, Stretch, load_span, trouble
from slicing.paged import PAGE_TOKENS
from slicing.rows import TURNED_ROWS, Ways, hasten
from tests.slicing.architectures import N_BLOCKS

WHOLE = Span(0, N_BLOCKS)
BATCHED = (
    "llama",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen3",
    "qwen3_moe",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "gpt_oss",
    "deepseek_v3",
    "gpt2",
    "gpt_neox",
    "opt",
    "granite",
    "cohere2",
    "starcoder2",
)
SINGLE = ("bloom", "gptj", "llama4_text", "qwen3_next", "jamba", "nemotron_h", "falcon", "gemma3n", "mamba2")
WINDOWED = ("mistral", "gemma3_text")


@pytest.mark.parametrize("name", BATCHED)
def test_these_are_exact(name: str, source: Callable[[str], ModelSource]) -> None:
    """A session's tokens, in any company and in any pieces, are what it would get alone: within 1e-4 in float32."""
    model = load_span(source(name), WHOLE)
    assert trouble(model) == ""
    check(model, lengths=(21, 5, 1, 13), seed=1)
    hasten(model.model, 2, lambda layers, threads: Ways(threads, (TURNED_ROWS, 4, 4)))
    check(model, lengths=(21, 5, 1, 13), seed=2)


@pytest.mark.parametrize("name", SINGLE)
def test_these_fall_back(name: str, source: Callable[[str], ModelSource]) -> None:
    assert trouble(load_span(source(name), WHOLE))


@pytest.mark.parametrize("name", ["llama", *WINDOWED])
def test_alone_in_its_pass_a_session_gets_the_same_bits(name: str, source: Callable[[str], ModelSource]) -> None:
    model = load_span(source(name), WHOLE)
    ragged, cache = RaggedSpan(model), PagedCache(WHOLE)
    (hidden,) = prompts((24,), model)
    for start, stop in [(0, 9), (9, 10), (10, 11), (11, 15), (15, 24)]:
        (found,) = ragged.run([Stretch(cache, hidden[:, start:stop], start)])
        cache.advance(stop - start)
        wanted = [alone(model, [hidden[:, :9], hidden[:, 9:10], hidden[:, 10:11], hidden[:, 11:15], hidden[:, 15:]])]
        assert torch.equal(found, wanted[0][:, start:stop])


@settings(max_examples=15, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=5), seed=st.integers(0, 10_000))
def test_any_company_in_any_pieces(lengths: list[int], seed: int, llama: SpanModel) -> None:
    check(llama, tuple(lengths), seed)


@pytest.mark.parametrize("value", [1e30, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_what_one_session_sends_does_not_reach_the_others(
    name: str, value: float, source: Callable[[str], ModelSource]
) -> None:
    """Law 7."""
    model = load_span(source(name), WHOLE)
    ragged = RaggedSpan(model)
    good = prompts((5, 1), model)

    def outputs(company: Tensor) -> list[Tensor]:
        stretches = [Stretch(PagedCache(WHOLE), hidden, 0) for hidden in (good[0], company, good[1])]
        first, _, last = ragged.run(stretches)
        return [first, last]

    shape = (1, 3, model.hidden_size)
    for quiet, loud in zip(outputs(torch.ones(shape)), outputs(torch.full(shape, value)), strict=True):
        assert torch.allclose(quiet, loud, atol=1e-5)


def test_a_pass_that_fails_leaves_every_cache_as_it_was(llama: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    ragged, caches = RaggedSpan(llama), [PagedCache(WHOLE), PagedCache(WHOLE)]
    hidden = prompts((6, 6), llama)
    ragged.run([Stretch(cache, h[:, :5], 0) for cache, h in zip(caches, hidden, strict=True)])
    for cache in caches:
        cache.advance(5)
    with monkeypatch.context() as patch:
        patch.setattr(llama.blocks[4].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ragged.run([Stretch(cache, torch.ones_like(h[:, :1]), 5) for cache, h in zip(caches, hidden, strict=True)])
    outputs = ragged.run([Stretch(cache, h[:, 5:], 5) for cache, h in zip(caches, hidden, strict=True)])
    for output, h in zip(outputs, hidden, strict=True):
        assert torch.allclose(output, alone(llama, [h])[:, 5:], atol=1e-5)


@pytest.mark.parametrize("name", ["llama", *WINDOWED])
def test_a_session_can_go_on_by_itself(name: str, source: Callable[[str], ModelSource]) -> None:
    """Whether it has been longer than a window of the model, or not."""
    model = load_span(source(name), WHOLE)
    ragged = RaggedSpan(model)
    for tokens in (0, 3, 20):
        hidden, more = prompts((tokens + 1, 2), model)
        cache = PagedCache(WHOLE)
        if tokens:
            ragged.run([Stretch(cache, hidden[:, :tokens], 0)])
            cache.advance(tokens)
        single = ragged.unpacked(cache)
        single.apply(CacheOp("repeat", 2))
        found = model.step(more.expand(2, -1, -1), single)
        wanted = alone(model, [*([hidden[:, :tokens]] if tokens else []), more])[:, tokens:]
        assert torch.allclose(found, wanted.expand(2, -1, -1), atol=1e-5)


def test_a_proof_that_finds_a_difference_says_so(llama: SpanModel, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RaggedSpan.run
    monkeypatch.setattr(RaggedSpan, "run", lambda self, stretches: [out * 1.001 for out in run(self, stretches)])
    assert "differ" in trouble(llama)
    monkeypatch.setattr(RaggedSpan, "run", lambda self, stretches: [out * torch.nan for out in run(self, stretches)])
    assert "differ" in trouble(llama)


def test_the_proof_looks_at_every_kind_of_block(source: Callable[[str], ModelSource]) -> None:
    """gemma3's blocks: windows, and every sixth without; qwen3_moe's: experts in every second."""
    part = slicing.proof._one_of_each_kind
    assert part(load_span(source("llama"), WHOLE)) == Span(0, 1)
    assert part(load_span(source("qwen3_moe"), WHOLE)).stop == 2
    assert part(load_span(source("qwen3_moe"), Span(2, 5))) == Span(2, 4)


@pytest.mark.parametrize(
    ("hidden", "start"),
    [((2, 1, 64), 0), ((1, 0, 64), 0), ((1, 1, 63), 0), ((1, 64), 0)],
    ids=["rows", "no tokens", "width", "dimensions"],
)
def test_a_stretch_that_does_not_fit_is_refused(hidden: tuple[int, ...], start: int, llama: SpanModel) -> None:
    with pytest.raises(BadMessage):
        RaggedSpan(llama).check(Stretch(PagedCache(WHOLE), torch.zeros(hidden), start))


def test_a_stretch_beyond_the_models_positions_is_refused(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("gpt2"), WHOLE)
    ragged = RaggedSpan(model)
    ragged.check(Stretch(PagedCache(WHOLE), torch.zeros(1, 1, 64), 127))
    with pytest.raises(BadMessage, match="128"):
        ragged.check(Stretch(PagedCache(WHOLE), torch.zeros(1, 1, 64), 128))


# ---------------------------------------------------------------------- pages


def test_pages_grow_when_told_and_keep_what_was_written() -> None:
    cache = PagedCache(Span(3, 4))
    cache.reserve(1)
    assert cache.capacity == PAGE_TOKENS and cache.nbytes() == 0
    first = torch.randn(2, PAGE_TOKENS, 4)
    keys, values = cache.write(3, 0, first, first[..., :3])
    cache.advance(PAGE_TOKENS)
    assert cache.nbytes() == 2 * PAGE_TOKENS * (4 + 3) * 4
    cache.reserve(PAGE_TOKENS + 1)
    keys, values = cache.write(3, PAGE_TOKENS, first[:, :1], first[:, :1, :3])
    assert cache.nbytes() == 2 * 2 * PAGE_TOKENS * (4 + 3) * 4
    assert torch.equal(keys, torch.cat([first, first[:, :1]], dim=1)) and values.shape == (2, PAGE_TOKENS + 1, 3)


def test_operations_of_one_row() -> None:
    cache = PagedCache(Span(0, 1))
    cache.write(0, 0, torch.ones(1, 5, 2), torch.ones(1, 5, 2))
    cache.advance(5)
    for op in (CacheOp("crop", 3), CacheOp("reorder", (0,)), CacheOp("select", (0,)), CacheOp("repeat", 1)):
        cache.apply(op)
        assert cache.n_tokens == 3
    for bad in (CacheOp("crop", 4), CacheOp("crop", -1), CacheOp("crop", True), CacheOp("repeat", 2)):
        with pytest.raises(BadMessage):
            cache.apply(bad)
    cache.apply(CacheOp("reset"))
    assert cache.n_tokens == 0


# ---------------------------------------------------------------------- what they are compared with


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> SpanModel:
    from slicing import resolve
    from tests.slicing.architectures import make_checkpoint

    folder = tmp_path_factory.mktemp("llama")
    make_checkpoint("llama", folder)
    return load_span(resolve(str(folder)), WHOLE)


def prompts(lengths: tuple[int, ...], model: SpanModel, seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, length, model.hidden_size, generator=generator) for length in lengths]


def alone(model: SpanModel, pieces: list[Tensor]) -> Tensor:
    cache = model.new_cache()
    return torch.cat([model.step(piece, cache) for piece in pieces], dim=-2)


def check(model: SpanModel, lengths: tuple[int, ...], seed: int) -> None:
    """Passes of random pieces of all sessions that are not at their end, against each session at once. Some pieces end
    a step: only then its tokens are seen, as peers have it."""
    random = torch.Generator().manual_seed(seed)
    ragged, hidden = RaggedSpan(model), prompts(lengths, model, seed)
    caches = [PagedCache(WHOLE) for _ in lengths]
    outputs: list[list[Tensor]] = [[] for _ in lengths]
    written = [0] * len(lengths)
    while any(cache.n_tokens < length for cache, length in zip(caches, lengths, strict=True)):
        stretches: dict[int, Stretch] = {}
        for i, (cache, length) in enumerate(zip(caches, lengths, strict=True)):
            if (left := length - written[i]) and int(torch.randint(4, (), generator=random)):
                tokens = 1 + int(torch.randint(left, (), generator=random))
                stretches[i] = Stretch(cache, hidden[i][:, written[i] : written[i] + tokens], written[i])
        if stretches:
            for (i, stretch), output in zip(stretches.items(), ragged.run(list(stretches.values())), strict=True):
                outputs[i].append(output)
                written[i] += stretch.tokens
                if written[i] == lengths[i] or int(torch.randint(2, (), generator=random)):
                    caches[i].advance(written[i] - caches[i].n_tokens)
    for found, h in zip(outputs, hidden, strict=True):
        assert torch.allclose(torch.cat(found, dim=-2), alone(model, [h]), atol=1e-4, rtol=0)
