"""Law 1: a chain computes what the unsplit model computes, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protocol.span import Span
from slicing import ModelSource, is_proven, legal_cuts, load_config, load_head, load_span
from slicing.config import part_that_writes
from slicing.cuts import PROVEN, REFUSED
from tests.slicing.architectures import ARCHITECTURES, MORE, N_BLOCKS, RARE, REQUIRED, make_config
from tests.slicing.chain import LocalChain
from tests.slicing.steps import assert_same_bits, logits_of

ALL = [pytest.param(name, marks=[pytest.mark.slow] if name in MORE | RARE else []) for name in ARCHITECTURES]


FEW = {"llama", "gemma3_text", "qwen3_next", "jamba", "gpt2", "bloom", "deepseek_v3"}
"""Of which the rest is proven with each change, too."""


def inner_cuts(source: ModelSource) -> list[int]:
    return [cut for cut in legal_cuts(load_config(source)) if 0 < cut < N_BLOCKS]


@pytest.mark.parametrize("name", ALL)
def test_a_chain_computes_what_the_unsplit_model_computes(
    name: str, source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]
) -> None:
    model, head, inner = unsplit(name), load_head(source(name)), inner_cuts(source(name))
    in_two = LocalChain.load(source(name), [0, inner[len(inner) // 2], N_BLOCKS])
    in_three = LocalChain.load(source(name), [0, inner[0], inner[-1], N_BLOCKS])
    for padded in (False, True):
        expected = logits_of(model, padded=padded)
        for chain in (in_two, in_three):
            head.attach(chain)
            assert_same_bits(expected, logits_of(head, padded=padded))


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FEW else [pytest.mark.slow]) for name in sorted(REQUIRED)]
)
def test_a_chain_may_use_less_than_its_peers_have_loaded(
    name: str, source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]
) -> None:
    inner = inner_cuts(source(name))
    left = load_span(source(name), Span(0, inner[-1]))
    right = load_span(source(name), Span(inner[0], N_BLOCKS))
    head = load_head(source(name))
    expected = logits_of(unsplit(name), padded=True)
    for cut in dict.fromkeys((inner[0], inner[-1])):
        head.attach(LocalChain([(left, Span(0, cut)), (right, Span(cut, N_BLOCKS))]))
        assert_same_bits(expected, logits_of(head, padded=True))


@pytest.mark.parametrize("name", ["llama", "gptj", "qwen3_next", "mamba2"])
def test_a_chain_that_skips_a_block_is_noticed(
    name: str, source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]
) -> None:
    """The control of the tests above: the tiny models are not so degenerate that a wrong chain passes."""
    chain = LocalChain.load(source(name), range(N_BLOCKS + 1))
    head = load_head(source(name))
    expected = logits_of(unsplit(name), padded=False)
    for skipped in range(N_BLOCKS):
        head.attach(LocalChain([hop for i, hop in enumerate(chain.hops) if i != skipped]))
        found = logits_of(head, padded=False)
        assert not any(torch.allclose(a, b, atol=1e-3) for a, b in zip(expected, found, strict=True))


def test_spans_and_head_together_hold_each_parameter_of_the_unsplit_model(
    source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]
) -> None:
    whole = dict(unsplit("llama").named_parameters())
    chain = LocalChain.load(source("llama"), [0, 2, N_BLOCKS])
    head = load_head(source("llama"))
    parts = [dict(model.model.named_parameters()) for model, _ in chain.hops] + [dict(head.named_parameters())]
    assert set().union(*parts) == whole.keys()
    for part in parts:
        for name, parameter in part.items():
            assert torch.equal(parameter, whole[name]), name


def test_what_is_called_proven_is_what_is_tested_here() -> None:
    assert len(REQUIRED) == 29
    assert {part_that_writes(make_config(name)).model_type for name in ARCHITECTURES} == PROVEN
    assert not PROVEN & REFUSED.keys()
    assert is_proven(make_config("llama"))


def test_the_page_on_architectures_names_each_of_them() -> None:
    page = Path(__file__).parents[2].joinpath("docs", "architectures.md").read_text(encoding="utf-8")
    assert not [name for name in [*ARCHITECTURES, *REFUSED] if f"`{name}`" not in page]


def test_an_architecture_that_nobody_tested_is_warned_of(
    source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    load_head(source("llama"))
    assert not caplog.records
    monkeypatch.setattr("slicing.cuts.PROVEN", frozenset())
    load_span(source("llama"), Span(0, 1))
    assert "llama" in caplog.text
