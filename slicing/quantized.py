"""Weights of blocks in 8 or 4 bits: linear layers replaced by ones that keep them so, and compute as before.

`int8` has a scale per output row (absmax), and rounds each row of activations to 8 bits (7 on a CPU) by a scale of its
own: on a CPU by fbgemm, on a GPU by bitsandbytes (LLM.int8(), arXiv:2208.07339, without its outlier columns, which
would be chosen by all rows of a batch together). `nf4` is that of QLoRA (arXiv:2305.14314), by bitsandbytes, 64 weights
to a scale. With both, what one row of a batch holds changes nothing for another.

Only linear layers are replaced. What is fused in other parameters (experts of most mixtures) stays as it is.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any, Final, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

if TYPE_CHECKING:
    from bitsandbytes.functional import QuantState

Quantization = Literal["none", "int8", "nf4"]

REDUCE_RANGE: Final = True
"""7 bits: without it the sums of two products overflow 16 bits on CPUs without VNNI."""
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
    """On a CPU, by fbgemm's kernel, for which it keeps the weights in an order of its own.

    That kernel rounds all rows of x to 8 bits by one scale, so that each would change the others. Here it is given rows
    of absmax 1, and one more, of 1 and -1: then the scale is always the same.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        values, scale = int8_weight(weight)
        zeros = torch.zeros_like(scale, dtype=torch.long)
        with warnings.catch_warnings():
            # torch means to drop tensors of quantised dtypes some day; its kernels take weights in no other form yet.
            warnings.filterwarnings("ignore", "torch.quantize_per_tensor", UserWarning)
            rounded = torch._make_per_channel_quantized_tensor(values, scale.double(), zeros, 0)
        self.packed: Any = torch.ops.quantized.linear_prepack(rounded, None)
        self.packed_nbytes = values.nbytes + scale.nbytes

    @property
    def weight(self) -> Tensor:
        return cast(Tensor, torch.ops.quantized.linear_unpack(self.packed)[0].dequantize()).to(self.dtype)

    def get_extra_state(self) -> Tensor:
        """For digests: the weights as they are in memory, but for their order."""
        return cast(Tensor, torch.ops.quantized.linear_unpack(self.packed)[0].int_repr())

    def _product(self, x: Tensor) -> Tensor:
        absmax = torch.linalg.vector_norm(x, torch.inf, dim=1, keepdim=True).float()
        # What is infinite, or no number, would be everybody's: it is left out, and comes back with absmax.
        rows = torch.cat([x / absmax, _fence(self.in_features)]).nan_to_num_(nan=0.0)
        product: Tensor = torch.ops.quantized.linear_dynamic(rows, self.packed, REDUCE_RANGE)[:-1] * absmax
        return product.to(x.dtype)


@cache
def _fence(width: int) -> Tensor:
    """float32 [1, width]: 1, -1, and zeros."""
    row = torch.zeros(1, width)
    row[0, 0], row[0, 1] = 1.0, -1.0
    return row


class Int8DeviceLinear(QuantizedLinear):
    """On a GPU. Buffers: values int8 [out_features, in_features]; scale float32 [out_features]."""

    values: Tensor
    scale: Tensor

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        values, scale = int8_weight(weight)
        self.register_buffer("values", values)
        self.register_buffer("scale", scale)

    @property
    def weight(self) -> Tensor:
        return self.values.to(self.dtype) * self.scale.to(self.dtype)[:, None]

    def _product(self, x: Tensor) -> Tensor:
        return int8_rows(x, self.values, self.scale)


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

        return dequantize_4bit(self.packed, self._state())

    def _product(self, x: Tensor) -> Tensor:
        from bitsandbytes.autograd._functions import matmul_4bit

        return cast(Tensor, matmul_4bit(x, self.packed.t(), quant_state=self._state()))

    def _state(self) -> QuantState:
        from bitsandbytes.functional import QuantState

        made: Any = QuantState  # it has no types
        state: QuantState = made(
            absmax=self.scale,
            shape=torch.Size((self.out_features, self.in_features)),
            code=self.code,
            blocksize=NF4_BLOCK,
            quant_type="nf4",
            dtype=self.dtype,
        )
        return state


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W [out, in] as whole numbers, int8 [out, in], and the scale of each row, float32 [out]: absmax / 127."""
    exact = weight.detach().float().contiguous()
    scale = (exact.abs().amax(dim=1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (exact / scale[:, None]).round_().clamp_(-127, 127).to(torch.int8), scale


def packed_objects(module: nn.Module) -> dict[int, Any]:
    """What layers inside `module` keep beside parameters and buffers, by id: to be shared by copies."""
    return {id(layer.packed): layer.packed for layer in module.modules() if isinstance(layer, Int8Linear)}


def packed_nbytes(module: nn.Module) -> int:
    """Memory of that, in bytes."""
    return sum(layer.packed_nbytes for layer in module.modules() if isinstance(layer, Int8Linear))


def int8_rows(x: Tensor, values: Tensor, scale: Tensor) -> Tensor:
    """x W^T of x [n, in] with W = values [out, in] int8 * scale [out], by bitsandbytes: x rounded to 8 bits by rows."""
    from bitsandbytes import functional as bnb

    rows, row_absmax, _ = bnb.int8_vectorwise_quant(x.to(torch.float16))
    product = bnb.int8_linear_matmul(rows, values)
    return cast(Tensor, bnb.int8_mm_dequant(product, row_absmax, scale.float() * 127)).to(x.dtype)


def quantize(module: nn.Module, kind: Quantization) -> None:
    """Replace the linear layers inside `module`, one after the other; their full-size weights are free then."""
    if kind == "none":
        return
    for name, layer in list(linear_layers(module)):
        parent, _, attribute = name.rpartition(".")
        weight = layer.weight if isinstance(layer, nn.Linear) else cast(Tensor, layer.weight).t()
        made = Nf4Linear if kind == "nf4" else Int8Linear if weight.device.type == "cpu" else Int8DeviceLinear
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
            packed += weight.numel() + rows * 4
        else:
            packed += -(-weight.numel() // 2) + -(-weight.numel() // NF4_BLOCK) * 4 + 16 * 4
    return total + packed, total
