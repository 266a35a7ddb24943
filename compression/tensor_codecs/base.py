"""What a codec is: the checks and the copies that all codecs share; each codec adds what one row becomes.

All codecs see a tensor as rows: `[..., width]` is `[rows, width]`, a scalar is one row of one value. Numbers lie on the
wire in little-endian order, which is that of every machine that torch runs on.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, Final, TypeAlias

import torch

from protocol.errors import BadPayload
from tensor_codecs.dtypes import FLOATS, dtype_name

Buffer: TypeAlias = bytes | bytearray | memoryview

_MOST_DIMS: Final = 16
# The product of a shape's non-zero dimensions stays under this, so that no stride or size overflows torch's 64 bits,
# not even in a tensor that a zero elsewhere in the shape makes empty.
_MOST_VALUES: Final = 2**56


class Codec(ABC):
    """One way to put a tensor into bytes. Stateless: one instance serves all threads."""

    name: ClassVar[str]
    dtypes: ClassVar[frozenset[torch.dtype]] = FLOATS

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype) -> int:
        """The exact size in bytes of the payload of any tensor of this shape and dtype.

        Raises:
            BadPayload: no tensor has such a shape, or this codec does not take the dtype.
        """
        rows, width = _rows_of(shape)
        self._check_dtype(dtype)
        return rows * self._row_nbytes(width, dtype) if width else 0

    def encode(self, tensor: torch.Tensor) -> bytes:
        """The tensor's payload: `nbytes(tensor.shape, tensor.dtype)` bytes, row after row.

        Args:
            tensor: any shape, any strides, CPU or CUDA. From CUDA there is one copy to the host, at the end.

        Raises:
            BadPayload: this codec does not take the tensor's dtype.
        """
        self._check_dtype(tensor.dtype)
        if tensor.numel() == 0:
            return b""
        width = tensor.shape[-1] if tensor.ndim else 1
        # `as_strided`, because a dimension of size 1 may have any stride, in a contiguous tensor too.
        rows = tensor.detach().contiguous().as_strided((tensor.numel() // width, width), (width, 1))
        packed = self._pack(rows)
        return packed.cpu().numpy().tobytes()

    def decode(
        self, payload: Buffer, shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
    ) -> torch.Tensor:
        """The tensor that `payload` was made of, as exactly as the codec keeps it, in memory of its own.

        Args:
            payload: what `encode` returned.
            shape, dtype: those of the encoded tensor; they travel beside the payload.
            device: where the result shall lie. To CUDA there is one copy from the host, of the payload.

        Raises:
            BadPayload: the shape, the dtype, the payload's size or what it holds is wrong. Shape, dtype and size are
                checked before any memory is taken.
        """
        self._check_dtype(dtype)
        rows, width = _rows_of(shape)
        expected = rows * self._row_nbytes(width, dtype) if width else 0
        received = payload.nbytes if isinstance(payload, memoryview) else len(payload)
        if received != expected:
            raise BadPayload(f"{self.name}: {received} bytes for {dtype_name(dtype)}{list(shape)}, expected {expected}")
        if expected == 0:
            return torch.empty(tuple(shape), dtype=dtype, device=device)
        # A copy: writable, aligned for every dtype, and independent of the message that it came in.
        packed = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(rows, -1)
        sent = packed.to(device)
        if not sent.is_cpu:
            self._check_rows(packed, width, dtype)
        return self._unpack(sent, width, dtype).view(tuple(shape))

    def _check_dtype(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            takes = ", ".join(sorted(dtype_name(each) for each in self.dtypes))
            raise BadPayload(f"{self.name} does not take {dtype}; it takes {takes}")

    @abstractmethod
    def _row_nbytes(self, width: int, dtype: torch.dtype) -> int:
        """The size in bytes of one row of `width >= 1` values."""

    @abstractmethod
    def _pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Contiguous `[rows, width]`, neither 0 -> contiguous uint8 `[rows, _row_nbytes]` on the same device."""

    @abstractmethod
    def _unpack(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> torch.Tensor:
        """uint8 `[rows, _row_nbytes]` -> contiguous `[rows, width]` of `dtype`, same device. May reuse `packed`.

        Raises:
            BadPayload: on a CPU, where bytes are wrong that `_check_rows` refuses for other devices.
        """

    def _check_rows(self, packed: torch.Tensor, width: int, dtype: torch.dtype) -> None:
        """Look on the host at bytes that are meant for another device, where a kernel could not refuse them.

        Args:
            packed: uint8 `[rows, _row_nbytes]` in the host's memory.

        Raises:
            BadPayload: no encoder writes such bytes.
        """
        return


def _rows_of(shape: Sequence[int]) -> tuple[int, int]:
    """`(2, 3, 5)` -> 6 rows of width 5; `()` -> 1 row of width 1.

    Raises:
        BadPayload: no tensor has such a shape.
    """
    if len(shape) > _MOST_DIMS:
        raise BadPayload(f"a shape of {len(shape)} dimensions, more than {_MOST_DIMS}")
    if not all(type(size) is int and size >= 0 for size in shape):
        raise BadPayload(f"{str(list(shape))[:200]} is not a shape")
    if math.prod(size for size in shape if size) >= _MOST_VALUES:
        raise BadPayload(f"{str(list(shape))[:200]} is more than a tensor can hold")
    return (math.prod(shape[:-1]), shape[-1]) if shape else (1, 1)
