"""The shared LM head: alone the layer's very bits, together the same rows, whoever computes them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from client.lm_head import SharedHead

WIDTH, VOCABULARY = 64, 300
CALLERS = 8
WAIT_S = 20.0


@pytest.fixture(params=[True, False], ids=["bias", "plain"])
def layer(request: pytest.FixtureRequest) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(WIDTH, VOCABULARY, bias=request.param).requires_grad_(False)


def at_once(shared: SharedHead, inputs: list[Tensor]) -> list[Tensor]:
    """Each input from a thread of its own, all of them expected before the first one comes."""
    ready, all_expected = threading.Barrier(len(inputs)), threading.Barrier(len(inputs))

    def call(hidden: Tensor) -> Tensor:
        ready.wait(WAIT_S)
        shared.expect(threading.get_ident())
        all_expected.wait(WAIT_S)
        return shared(hidden)

    with ThreadPoolExecutor(len(inputs)) as pool:
        return list(pool.map(call, inputs))


def test_alone_it_gives_the_very_bits(layer: nn.Linear) -> None:
    shared, hidden = SharedHead(layer), torch.randn(1, 3, WIDTH)
    assert torch.equal(shared(hidden), layer(hidden))


def test_together_the_same_rows(layer: nn.Linear) -> None:
    inputs = [torch.randn(1, 1 + i % 3, WIDTH) for i in range(CALLERS)]
    shared = SharedHead(layer)
    shared._product_s = WAIT_S  # so that all are waited for
    outputs = at_once(shared, inputs)
    assert shared.products == 1
    for hidden, output in zip(inputs, outputs, strict=True):
        expected = layer(hidden)
        assert output.shape == expected.shape
        assert torch.allclose(output, expected, rtol=0, atol=1e-4)


def test_what_comes_during_a_product_is_the_next_ones() -> None:
    """Nobody is expected, and still many share a product."""
    torch.manual_seed(0)
    layer = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    began, may_end = threading.Event(), threading.Event()
    plain = layer.forward

    def slow(hidden: Tensor) -> Tensor:
        began.set()
        assert may_end.wait(WAIT_S)
        return plain(hidden)

    cast(Any, layer).forward = slow
    shared, inputs = SharedHead(layer), [torch.randn(1, 1, WIDTH) for _ in range(CALLERS)]
    with ThreadPoolExecutor(CALLERS) as pool:
        first = pool.submit(shared, inputs[0])
        assert began.wait(WAIT_S)
        others = [pool.submit(shared, hidden) for hidden in inputs[1:]]
        while len(shared._waiting) < len(others):
            pass
        may_end.set()
        outputs = [each.result(WAIT_S) for each in (first, *others)]
    assert shared.products == 2
    for hidden, output in zip(inputs, outputs, strict=True):
        assert torch.allclose(output, plain(hidden), rtol=0, atol=1e-4)


def test_whoever_never_comes_is_not_waited_for(layer: nn.Linear) -> None:
    shared, hidden = SharedHead(layer), torch.randn(1, 1, WIDTH)
    shared.expect(-1)
    shared(hidden)
    shared.expect(-1)
    assert torch.equal(shared(hidden), layer(hidden))


def test_trouble_is_told_to_all_that_share_it(layer: nn.Linear) -> None:
    def broken(hidden: Tensor) -> Tensor:
        raise RuntimeError("no memory")

    cast(Any, layer).forward = broken
    shared = SharedHead(layer)
    for _ in range(2):  # and the next caller is not kept waiting
        with pytest.raises(RuntimeError, match="no memory"):
            shared(torch.randn(1, 1, WIDTH))


def test_gradients_pass() -> None:
    layer = nn.Linear(WIDTH, VOCABULARY)
    hidden = torch.randn(1, 1, WIDTH, requires_grad=True)
    SharedHead(layer)(hidden).sum().backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("head", [None, nn.Embedding(2, 2)])
def test_other_heads_are_left_alone(head: nn.Module | None) -> None:
    def get_output_embeddings() -> nn.Module | None:
        return head

    model: Callable[[], Any] = cast(Any, SimpleNamespace(get_output_embeddings=get_output_embeddings))
    assert SharedHead.of(cast(Any, model)) is None
