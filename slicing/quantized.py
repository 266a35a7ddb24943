"""Weights of blocks in 8 or 4 bits: linear layers replaced by ones that keep them so, and compute as before.

`int8` has a scale per output row (absmax); on a CPU the activations are in bfloat16, on a GPU bitsandbytes rounds each
row of them to 8 bits by a scale of its own (LLM.int8(), arXiv:2208.07339, without its outlier columns, which would be
chosen by all rows of a batch together). `nf4` is that of QLoRA (arXiv:2305.14314), by bitsandbytes, 64 weights to a
scale. With both, what one row of a batch holds changes nothing for another.

Only linear layers are replaced. What is fused in other parameters (experts of most mixtures) stays as it is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Quantization = Literal["none", "int8", "nf4"]

NF4_BLOCK = 64
"""So many weights, in the order of memory, share a scale."""
SMALLEST = 32
"""A layer with fewer inputs or outputs stays as it is: routers and gates, where errors cost most and memory least."""


class QuantizedLinear(nn.Module):
    """What stands for `nn.Linear`: y = x W^T + b.

    Attributes:
        weight: W as it was, but for the rounding; made anew when asked for, by architectures that reach into layers.
    """

    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.register_buffer("bias", None if bias is None else bias.detach().clone())

    @property
    def weight(self) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., in_features] -> [..., out_features]."""
        if torch.is_grad_enabled():  # the kernels have no derivatives
            return functional.linear(x, self.weight, self.bias)
        y = self._product(x.reshape(-1, self.in_features).contiguous()).view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        """x: [n, in_features] -> x W^T, [n, out_features]."""
        raise NotImplementedError


class Int8Linear(QuantizedLinear):
    """Buffers: packed int8 [out_features, in_features]; scale bfloat16 [out_features]."""

    packed: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        values = weight.detach().float().contiguous()
        scale = (values.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny).bfloat16()
        packed = (values / scale.float()[:, None]).round_().clamp_(-127, 127).to(torch.int8)
        self.register_buffer("packed", packed)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        return self.packed.to(self.dtype) * self.scale.to(self.dtype)[:, None]

    def _product(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu":
            # In bfloat16 whatever x is: torch's kernel for float32 is a plain loop, ten times slower and more.
            product: Tensor = torch.ops.aten._weight_int8pack_mm(x.bfloat16(), self.packed, self.scale)
            return product.to(x.dtype)
        return int8_rows(x, self.packed, self.scale)


class Nf4Linear(QuantizedLinear):
    """Buffers: packed uint8 [ceil(out * in / 2), 1]; scale float32, one per `NF4_BLOCK` weights; code float32 [16]."""

    packed: Tensor
    scale: Tensor
    code: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__(weight, bias)
        packed, state = quantize_4bit(weight.detach().contiguous(), blocksize=NF4_BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("scale", state.absmax)
        self.register_buffer("code", state.code)

    @property
    def weight(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return cast(Tensor, dequantize_4bit(self.packed, self._state()))

    def _product(self, x: Tensor) -> Tensor:
        from bitsandbytes import matmul_4bit

        return cast(Tensor, matmul_4bit(x, self.packed.t(), quant_state=self._state()))

    def _state(self) -> QuantState:
        from bitsandbytes.functional import QuantState

        return QuantState(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )


def int8_rows(x: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
    """x W^T of x [n, in] with W = packed [out, in] int8 * scale [out], by bitsandbytes: x rounded to 8 bits by rows."""
    from bitsandbytes import functional as bnb

    rows, row_absmax, _ = bnb.int8_vectorwise_quant(x.to(torch.float16))
    product = bnb.int8_linear_matmul(rows, packed)
    return cast(Tensor, bnb.int8_mm_dequant(product, row_absmax, scale.float() * 127)).to(x.dtype)


def quantize(module: nn.Module, kind: Quantization) -> None:
    """Replace the linear layers inside `module`, one after the other; their full-size weights are free then."""
    if kind == "none":
        return
    made = Int8Linear if kind == "int8" else Nf4Linear
    for name, layer in list(linear_layers(module)):
        parent, _, attribute = name.rpartition(".")
        weight = layer.weight if isinstance(layer, nn.Linear) else cast(Tensor, layer.weight).t()
        setattr(module.get_submodule(parent), attribute, made(weight, cast("Tensor | None", layer.bias)))


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the layers inside `module` that `quantize` replaces. Conv1D is gpt2's, W transposed."""
    from transformers.pytorch_utils import Conv1D

    for name, layer in module.named_modules():
        if type(layer) in (nn.Linear, Conv1D) and min(cast(Tensor, layer.weight).shape) >= SMALLEST:
            yield name, layer


def quantized_nbytes(module: nn.Module, kind: Quantization, itemsize: int) -> tuple[int, int]:
    """Of the parameters of `module`, on the meta device too: bytes after `quantize`, and how many of these stay in
    floating point.

    Args:
        itemsize: bytes of a floating-point number.
    """
    total = sum(p.numel() * (itemsize if p.is_floating_point() else p.itemsize) for p in module.parameters())
    if kind == "none":
        return total, total
    packed = 0
    for _, layer in linear_layers(module):
        weight = cast(Tensor, layer.weight)
        total -= weight.numel() * itemsize
        rows = weight.shape[0] if isinstance(layer, nn.Linear) else weight.shape[1]
        if kind == "int8":
            packed += weight.numel() + rows * 2
        else:
            packed += -(-weight.numel() // 2) + -(-weight.numel() // NF4_BLOCK) * 4 + 16 * 4
    return total + packed, total
