"""How a pass travels: tensors become entries of bytes, and results become tensors again. Not for an event loop."""

from __future__ import annotations

from torch import Tensor

from client.batches import Portion
from protocol.errors import PeerFault
from protocol.journal import Entry, Part
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, StepResult, TensorSpec, token_axis
from protocol.messages import CacheOp as WireOp
from slicing import CacheOp
from tensor_codecs import codec, dtype_name, dtype_of


def chunk_of(tensors: dict[str, Tensor], start: int, offset: int, length: int) -> dict[str, Tensor]:
    """The tokens `[offset, offset + length)` of a prompt that begins at token `start`; masks cover the past too."""
    return {
        name: tensor[:, : start + offset + length]
        if name == ATTENTION_MASK
        else tensor.narrow(token_axis(name), offset, length)
        for name, tensor in tensors.items()
    }


def row_axis(name: str) -> int:
    """Where a step's tensor counts its rows: [..., rows, tokens, width], or for positions [..., rows, tokens]."""
    return {HIDDEN: -3, POSITION_IDS: -2}.get(name, 0)


def rows_of(tensors: dict[str, Tensor], portion: Portion) -> dict[str, Tensor]:
    """The portion's rows of each tensor; what is the same for all rows goes to all portions."""
    start, count = portion.start, portion.stop - portion.start
    return {
        name: tensor if tensor.shape[row_axis(name)] == 1 else tensor.narrow(row_axis(name), start, count)
        for name, tensor in tensors.items()
    }


def entry_of(tensors: dict[str, Tensor], position: int, ops: tuple[WireOp, ...], codec_name: str) -> Entry:
    """A step of these tensors, encoded; its first token is at `position` of the caches."""
    hidden = tensors[HIDDEN]
    parts = tuple(_part(name, tensor, codec_name) for name, tensor in tensors.items())
    return Entry(position, tokens=hidden.shape[-2], rows=hidden.shape[-3], parts=parts, ops=ops)


def _part(name: str, tensor: Tensor, codec_name: str) -> Part:
    # Masks and positions must arrive as they are; what blocks compute with is compressed.
    chosen = codec(codec_name if tensor.is_floating_point() else "none")
    payload = chosen.encode(tensor)
    spec = TensorSpec(name, chosen.name, dtype_name(tensor.dtype), tuple(tensor.shape), len(payload))
    return Part(spec, payload)


def decoded(result: StepResult, like: Tensor) -> Tensor:
    """The hidden states that came out of the last block, in the number format and on the device of `like`.

    Raises:
        PeerFault: there are none.
        ValueError: they cannot be read.
    """
    for spec, payload in result.step.parts():
        if spec.name == HIDDEN:
            hidden = codec(spec.codec).decode(payload, spec.shape, dtype_of(spec.dtype), like.device)
            return hidden.to(like.dtype)
    raise PeerFault("the last peer of the chain gave no hidden states")


def wire_ops(ops: tuple[CacheOp, ...], position: int, tokens: int) -> tuple[WireOp, ...]:
    """The operations as they travel. A session that is ahead of the head (a step was given up half-way) is cropped.

    Args:
        position: tokens per row in the peers' caches.
        tokens: as many of them as the head knows of.
    """
    wire: list[WireOp] = []
    for op in ops:
        value = op.value
        wire.append(WireOp(op.kind, () if value is None else value if isinstance(value, tuple) else (value,)))
    if position > tokens and not any(op.kind in ("crop", "reset") for op in wire):
        wire.append(WireOp("crop", (tokens,)))
    return tuple(wire)
