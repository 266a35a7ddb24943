"""The head: a model without blocks, and what it does when its blocks fail."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, LlamaForCausalLM

from protocol.errors import PeerFault, PeerLost
from slicing import CacheOp, Head, ModelSource, RemoteCache, load_head
from slicing.skeleton import Hole
from tests.slicing.architectures import N_BLOCKS
from tests.slicing.chain import LocalChain

IDS = torch.arange(3, 15)[None]


@pytest.fixture
def head(source: Callable[[str], ModelSource]) -> Head:
    head = load_head(source("llama"))
    head.attach(LocalChain.load(source("llama"), [0, 3, N_BLOCKS]))
    return head


def test_it_is_the_architecture_s_own_class_and_has_no_blocks(source: Callable[[str], ModelSource]) -> None:
    head = load_head(source("llama"))
    assert isinstance(head, Head)
    assert isinstance(head, LlamaForCausalLM)
    assert type(head).__name__ == "LlamaForCausalLM"
    layers = head.get_submodule("model.layers")
    assert len(list(layers.children())) == N_BLOCKS
    assert all(isinstance(layer, Hole) for layer in layers.children())
    assert not list(layers.parameters())
    assert {name for name, _ in head.named_parameters()} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    }


def test_tied_weights_stay_tied(source: Callable[[str], ModelSource]) -> None:
    head: Any = load_head(source("llama-tied"))
    assert head.lm_head.weight is head.model.embed_tokens.weight


def test_transformers_own_classes_stay_as_they_are(source: Callable[[str], ModelSource]) -> None:
    load_head(source("llama"))
    assert not hasattr(LlamaForCausalLM, "attach")
    assert load_head(source("llama")).config is not load_head(source("llama")).config


def test_without_blocks_it_says_so(source: Callable[[str], ModelSource]) -> None:
    with pytest.raises(RuntimeError, match="attach"):
        load_head(source("llama"))(IDS)


def test_generation_settings_come_with_the_model(source: Callable[[str], ModelSource]) -> None:
    head = load_head(source("llama"))
    assert head.generation_config is not None
    assert head.generation_config.eos_token_id == 2


@torch.no_grad()
def test_a_failed_step_can_be_tried_again(head: Head, source: Callable[[str], ModelSource]) -> None:
    chain: Any = head._remote_stack.remote
    cache = RemoteCache()
    head(IDS, past_key_values=cache)
    cache.crop(-2)

    class Failing:
        def run(self, hidden: Tensor, **given: Any) -> Tensor:
            raise PeerLost("gone")

    head.attach(Failing())
    with pytest.raises(PeerLost):
        head(IDS[:, :1], past_key_values=cache)
    assert cache.n_tokens == 10
    assert cache.pending == [CacheOp("crop", 10)]
    head.attach(chain)
    again = head(IDS[:, :1], past_key_values=cache).logits
    assert cache.n_tokens == 11
    assert not cache.pending
    expected = head(torch.cat([IDS[:, :10], IDS[:, :1]], dim=1)).logits[:, -1:]
    torch.testing.assert_close(again, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_chain_that_gives_something_else_is_at_fault(head: Head) -> None:
    class Wrong:
        def run(self, hidden: Tensor, **given: Any) -> Tensor:
            return hidden[..., :-1]

    head.attach(Wrong())
    with pytest.raises(PeerFault):
        head(IDS)


@torch.no_grad()
def test_a_plain_forward_has_a_cache_to_go_on_with(head: Head) -> None:
    output = head(IDS)
    assert isinstance(output.past_key_values, RemoteCache)
    assert output.past_key_values.n_tokens == IDS.shape[1]
    assert head(IDS, use_cache=False).past_key_values is None


@torch.no_grad()
def test_other_caches_are_refused(head: Head) -> None:
    with pytest.raises(TypeError, match="RemoteCache"):
        head(IDS, past_key_values=DynamicCache())


def test_a_remote_cache_notes_what_is_done_to_it() -> None:
    cache = RemoteCache()
    cache.n_tokens = 9
    cache.crop(-2)
    cache.crop(-1)
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3]))
    cache.crop(0)
    assert cache.pending == [
        CacheOp("crop", 6),
        CacheOp("reorder", (1, 0)),
        CacheOp("repeat", 2),
        CacheOp("select", (3,)),
        CacheOp("crop", 6),
    ]
    assert cache.get_seq_length() == cache.n_tokens == 6
    for wrong in (1, -7):
        with pytest.raises(ValueError, match="cannot be cropped"):
            cache.crop(wrong)
    cache.reset()
    assert cache.n_tokens == 0


def test_a_remote_cache_cannot_be_copied() -> None:
    with pytest.raises(TypeError, match="copied"):
        copy.deepcopy(RemoteCache())
