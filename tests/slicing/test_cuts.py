"""Where models may be cut, and which may not be cut at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig

from protocol.errors import IllegalCut, ModelError, NoBlockStack
from protocol.span import Span
from slicing import (
    check_architecture,
    check_span,
    hidden_size,
    is_routed,
    legal_cuts,
    model_class,
    n_blocks,
    nearest_spans,
)
from slicing.config import part_that_writes
from slicing.cuts import REFUSED
from tests.slicing.architectures import ARCHITECTURES, N_BLOCKS, make_config

NAMES_EXPERTS = {"doge", "nemotron_h", "youtu"}  # though these have none
EVERYWHERE = tuple(range(N_BLOCKS + 1))


@pytest.mark.parametrize("name", sorted(set(ARCHITECTURES) - {"gemma3n", "gemma4_text"}))
def test_most_architectures_can_be_cut_everywhere(name: str) -> None:
    assert legal_cuts(make_config(name)) == EVERYWHERE
    assert n_blocks(make_config(name)) == N_BLOCKS
    assert hidden_size(make_config(name)) == 64


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
def test_models_whose_tokens_choose_experts_are_known(name: str) -> None:
    """By what their blocks are made of, not by what their configuration calls it."""
    with torch.device("meta"):
        model = model_class(config := part_that_writes(make_config(name)))(config)
    made_of = {part for module in model.modules() for part in type(module).__name__.lower().split("_")}
    has_experts = any("experts" in part or "topkrouter" in part for part in made_of)
    if name == "hunyuan_v1_moe":
        assert config.num_experts == 1
        assert not is_routed(config), "there is nothing to choose"
        config.num_experts = 2
    assert is_routed(config) == (has_experts or name in NAMES_EXPERTS), made_of


def test_a_tail_that_shares_keys_and_values_stays_with_its_source() -> None:
    # blocks 4 and 5 read what 2 (sliding) and 3 (full) stored
    assert legal_cuts(make_config("gemma3n")) == legal_cuts(make_config("gemma4_text")) == (0, 1, 2, 6)


def test_sources_named_one_by_one_bind_only_what_lies_between() -> None:
    class Config:
        model_type = "sharing"
        num_hidden_layers = 7
        kv_source_layers = (0, 0, 2, 3, 3, 3, 6)
        kv_sharing_modes = ("store", "reuse", None, "store", "reuse", "reuse_but_indexer", None)

        def get_text_config(self, decoder: bool = False) -> Config:
            return self

    config: Any = Config()
    assert legal_cuts(config) == (0, 2, 3, 6, 7)


def test_a_block_that_shares_its_neighbours_indexer_stays_with_it() -> None:
    config = make_config("glm_moe_dsa")
    config.indexer_types = ["full", "shared", "full", "full", "shared", "shared"]
    assert legal_cuts(config) == (0, 2, 3, 6)


@pytest.mark.parametrize(
    ("wanted", "nearest"),
    [
        (Span(0, 4), ("0:2", "0:6")),
        (Span(1, 5), ("1:2", "1:6")),
        (Span(3, 5), ("2:6",)),
        (Span(0, 9), ("0:6",)),
        (Span(1, 9), ("1:6",)),
        (Span(7, 9), ("2:6",)),
    ],
)
def test_an_illegal_cut_names_the_nearest_legal_ones(wanted: Span, nearest: tuple[str, ...]) -> None:
    with pytest.raises(IllegalCut) as refused:
        check_span(make_config("gemma3n"), wanted)
    assert refused.value.nearest == nearest
    assert all(name in refused.value.message for name in nearest)


def test_every_span_between_legal_cuts_is_legal_and_no_other() -> None:
    config = make_config("gemma3n")
    cuts = legal_cuts(config)
    for start in range(N_BLOCKS):
        for stop in range(start + 1, N_BLOCKS + 1):
            span = Span(start, stop)
            if start in cuts and stop in cuts:
                check_span(config, span)
            else:
                with pytest.raises(IllegalCut):
                    check_span(config, span)
                for near in nearest_spans(cuts, span):
                    assert near.start in cuts and near.stop in cuts
                    assert near.covers(span) or span.covers(near)


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_architectures_that_would_compute_something_else_are_refused(model_type: str) -> None:
    with pytest.raises(ModelError, match="cannot be sliced"):
        check_architecture(AutoConfig.for_model(model_type))


@pytest.mark.parametrize("model_type", ["t5", "bart", "vit", "clip"])
def test_models_that_do_not_continue_text_have_no_block_stack(model_type: str) -> None:
    with pytest.raises(NoBlockStack):
        model_class(AutoConfig.for_model(model_type))
