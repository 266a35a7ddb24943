"""The dtypes that may cross the wire, and what they are called there."""

from __future__ import annotations

from typing import Final

import torch

from protocol.errors import BadPayload

_BY_NAME: Final = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
    "int64": torch.int64,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}
_BY_DTYPE: Final = {dtype: name for name, dtype in _BY_NAME.items()}

FLOATS: Final = frozenset({torch.float32, torch.float16, torch.bfloat16, torch.float64})
"""What the lossy codecs accept."""

ALL: Final = frozenset(_BY_DTYPE)
"""What `none` accepts."""


def dtype_name(dtype: torch.dtype) -> str:
    """`torch.bfloat16` -> `"bfloat16"`.

    Raises:
        BadPayload: this dtype does not cross the wire.
    """
    try:
        return _BY_DTYPE[dtype]
    except (KeyError, TypeError):
        raise BadPayload(f"{dtype} does not cross the wire; known: {', '.join(_BY_NAME)}") from None


def dtype_of(name: str) -> torch.dtype:
    """`"bfloat16"` -> `torch.bfloat16`.

    Raises:
        BadPayload: no dtype has that name.
    """
    try:
        return _BY_NAME[name]
    except (KeyError, TypeError):
        raise BadPayload(f"unknown dtype {str(name)[:40]!r}; known: {', '.join(_BY_NAME)}") from None
