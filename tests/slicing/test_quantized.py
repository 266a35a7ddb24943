"""Quantised blocks: how far off they are, that rows stay apart, that they take less memory and keep it when moved."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from protocol.span import Span
from slicing import ModelSource, SpanModel, block_bytes, block_digests, load_span, move_span
from slicing.quantized import (
    Int8DeviceLinear,
    Int8Linear,
    Nf4Linear,
    Quantization,
    QuantizedLinear,
    int8_rows,
    packed_nbytes,
)
from tests.slicing.architectures import N_BLOCKS

KINDS: tuple[Quantization, ...] = ("int8", "nf4")
FAMILIES = ("llama", "qwen3_moe", "gpt2", "gemma3_text", "jamba")
LAYERS = (Int8Linear, Nf4Linear)
ERROR = {"int8": 0.06, "nf4": 0.35}
"""Relative to what the blocks add to the hidden states."""


def run(model: SpanModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Random hidden states of a prefill and two decode steps; and what the blocks added to them."""
    cache = model.new_cache()
    given, added = [], []
    for tokens in (7, 1, 1):
        zeros, extras = model.example_inputs(tokens)
        hidden = torch.randn(zeros.shape, generator=torch.Generator().manual_seed(tokens)).to(zeros.dtype)
        given.append(hidden)
        added.append(model.step(hidden, cache, extras=extras) - hidden)
    return torch.cat(given, -2), torch.cat(added, -2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_quantised_span_is_smaller_and_close(
    name: str, kind: Quantization, source: Callable[[str], ModelSource], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, small = (load_span(source(name), Span(0, 2), quantization=k) for k in ("none", kind))
    assert any(isinstance(module, QuantizedLinear) for module in small.model.modules())
    assert small.nbytes() < whole.nbytes()
    assert "stay in floating point" in caplog.text
    (_, exact), (_, rough) = run(whole), run(small)
    error = (exact - rough).norm() / exact.norm()
    assert 0 < error < ERROR[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAMILIES)
def test_the_memory_of_quantised_blocks_is_known_beforehand(
    name: str, kind: Quantization, source: Callable[[str], ModelSource]
) -> None:
    blocks = load_span(source(name), Span(0, N_BLOCKS), quantization=kind).blocks
    exact = [
        sum(t.nbytes for t in [*blocks[i].parameters(), *blocks[i].buffers()]) + packed_nbytes(blocks[i])
        for i in range(N_BLOCKS)
    ]
    assert block_bytes(source(name), torch.float32, kind) == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("kind", KINDS)
def test_a_move_keeps_the_quantisation(kind: Quantization, source: Callable[[str], ModelSource]) -> None:
    old = load_span(source("llama"), Span(0, 4), quantization=kind)
    moved, fresh = (
        move_span(old, source("llama"), Span(2, 6)),
        load_span(source("llama"), Span(2, 6), quantization=kind),
    )
    assert moved.quantization == kind
    assert torch.equal(run(moved)[1], run(fresh)[1])
    assert block_digests(moved) == block_digests(fresh)
    assert moved.report.n_bytes < fresh.report.n_bytes


def test_blocks_are_quantised_a_few_at_a_time(
    source: Callable[[str], ModelSource], monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = load_span(source("llama"), Span(0, 4), quantization="int8")
    monkeypatch.setattr("slicing.blocks.QUANTIZED_AT_ONCE_BYTES", 1)
    one_by_one = load_span(source("llama"), Span(0, 4), quantization="int8")
    assert torch.equal(run(at_once)[1], run(one_by_one)[1])
    blocks: dict[int, Any] = dict(one_by_one.blocks)
    assert all(block.self_attn.config is one_by_one.model.config for block in blocks.values())


def weights(rows: int = 96, columns: int = 64, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("other", [1e30, float("nan")])
@torch.inference_mode()
def test_a_row_does_not_change_another(layer: type[QuantizedLinear], other: float) -> None:
    made = layer(weights(), None)
    x = torch.randn(3, 1, 64, generator=torch.Generator().manual_seed(2))
    expected = made(x)[0]
    x[1:] = other
    assert torch.equal(made(x)[0], expected)


@torch.inference_mode()
def test_int8_rounds_a_row_alone_as_in_a_batch() -> None:
    made = Int8Linear(weights(), None)
    x = torch.randn(9, 64, generator=torch.Generator().manual_seed(2))
    together = made(x)
    for row in range(9):
        assert torch.equal(made(x[row : row + 1])[0], together[row])


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_multiplies_by_the_weight_that_the_layer_shows(
    layer: type[QuantizedLinear], dtype: torch.dtype
) -> None:
    bias = torch.ones(96, dtype=dtype)
    made = layer(weights(dtype=dtype), bias)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2)).to(dtype)
    with torch.inference_mode():
        product = made(x)
    expected = nn.functional.linear(x, made.weight, bias)
    assert product.dtype == dtype
    assert (product - expected).float().norm() / expected.float().norm() < 0.03


@torch.inference_mode()
def test_what_a_gpu_computes_rounds_each_row_by_itself() -> None:
    made = Int8DeviceLinear(weights(), None)
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(2))
    expected = x @ weights().T
    product = int8_rows(x, made.values, made.scale)
    assert (product - expected).norm() / expected.norm() < 0.02
    x[1:] = 1e4
    assert torch.equal(int8_rows(x, made.values, made.scale)[0], product[0])


def test_zeros_stay_zeros() -> None:
    for layer in LAYERS:
        with torch.inference_mode():
            assert not layer(torch.zeros(64, 64), None)(torch.ones(1, 64)).any()


def test_gradients_pass_through(source: Callable[[str], ModelSource]) -> None:
    model = load_span(source("llama"), Span(0, 2), quantization="int8")
    hidden = model.example_inputs(3)[0].normal_(generator=torch.Generator().manual_seed(3)).requires_grad_()
    (gradient,) = torch.autograd.grad(model.step(hidden, grad=True).square().sum(), hidden)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


def test_small_layers_and_others_than_linear_ones_stay() -> None:
    from slicing.quantized import quantize

    module: Any = nn.ModuleDict({"router": nn.Linear(64, 8), "norm": nn.LayerNorm(64), "gpt2": Conv1D(96, 64)})
    transposed = module["gpt2"].weight.detach().t()
    quantize(module, "int8")
    assert isinstance(module["router"], nn.Linear) and isinstance(module["norm"], nn.LayerNorm)
    assert isinstance(module["gpt2"], Int8Linear)
    assert (module["gpt2"].weight - transposed).abs().max() < 0.01 * transposed.abs().max()
