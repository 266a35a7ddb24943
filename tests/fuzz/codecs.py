"""Payloads of tensors, as strangers send them: every codec, every dtype, any shape, any bytes.

Allowed: `BadPayload`. What decodes has the shape and the dtype that were named, and a size that follows from these; it
can be encoded again. What `_check_rows` says of int8 for other devices is what the CPU's kernel says.
"""

from __future__ import annotations

import math
import warnings

import torch

from protocol.errors import BadPayload
from tensor_codecs import codec, dtype_of, names
from tensor_codecs.base import Codec
from tensor_codecs.dtypes import ALL
from tests.fuzz.source import Source
from tests.fuzz.target import Target

DTYPES = tuple(sorted(ALL, key=str))
DTYPE_NAMES = ("float32", "bfloat16", "bool", "float8_e4m3fn", "", "torch.float32", "complex64")
MOST_BYTES = 1 << 16  # of a payload that is made to fit: larger ones only take longer


def run(data: bytes) -> None:
    """One payload: which codec, dtype and shape its first bytes say, its own bytes are the rest, repeated."""
    source = Source(data)
    chosen, dtype = codec(source.pick(names())), source.pick(DTYPES)
    if source.byte() % 16 == 0:
        try:
            dtype = dtype_of(source.pick(DTYPE_NAMES))
        except BadPayload:
            return
    shape = tuple(source.number() for _ in range(source.byte() % 6))
    fits = source.byte() % 8 != 0
    payload = _payload(chosen, shape, dtype, source.rest()) if fits else source.rest()
    try:
        decoded = chosen.decode(payload, shape, dtype)
    except BadPayload:
        return
    assert tuple(decoded.shape) == shape
    assert decoded.dtype == dtype
    assert chosen.nbytes(shape, dtype) == len(payload)
    _check_for_others(chosen, payload, shape, dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numbers that strangers make up may overflow
        assert len(chosen.encode(decoded)) == len(payload)


def _payload(chosen: Codec, shape: tuple[int, ...], dtype: torch.dtype, data: bytes) -> bytes:
    """As many bytes as such a tensor has, if these are not too many."""
    try:
        nbytes = chosen.nbytes(shape, dtype)
    except BadPayload:
        return data
    if nbytes > MOST_BYTES:
        return data
    return (data * (nbytes // max(1, len(data)) + 1))[:nbytes] if data else bytes(nbytes)


def _check_for_others(chosen: Codec, payload: bytes, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """What was decoded here must pass the checks for devices that cannot refuse."""
    if payload:
        width = shape[-1] if shape else 1
        packed = torch.frombuffer(bytearray(payload), dtype=torch.uint8).view(math.prod(shape) // width, -1)
        chosen._check_rows(packed, width, dtype)


def seeds() -> list[bytes]:
    """Encoded tensors of each codec."""
    made = []
    for index, name in enumerate(names()):
        for dtype in (torch.float32, torch.bfloat16):
            tensor = torch.linspace(-3, 3, 2 * 65).view(2, 65).to(dtype)
            header = bytes((index, DTYPES.index(dtype), 1, 2, 2, 65, 0))
            made.append(header + codec(name).encode(tensor))
            made.append(bytes((index, DTYPES.index(dtype), 1, 0, 1)))
            made.append(bytes((index, DTYPES.index(dtype), 1, 3, 1, 3, 128, 1)) + codec(name).encode(tensor)[:100])
    return made


TARGET = Target(
    "codecs",
    run,
    seeds,
    modules=(
        "tensor_codecs.base",
        "tensor_codecs.int8",
        "tensor_codecs.blockwise8",
        "tensor_codecs.cast",
        "tensor_codecs.none",
        "tensor_codecs.dtypes",
    ),
    longest=2048,
    short=1200,
)
