"""Which rows of a session's tokens are padding: what comes out for these means nothing. Not for an event loop.

It is read off what the client itself sent: what peers pass on of it, they may have changed.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from protocol.journal import Entry
from protocol.messages import ATTENTION_MASK
from tensor_codecs import codec, dtype_of


def meaningful_rows(sent: Iterable[Entry]) -> dict[int, Tensor]:
    """For the positions of steps that came with a mask, which rows are no padding: int64 [some of the rows]. One that
    was taken back gives way to what came in its place.

    Args:
        sent: what entered the first block, step by step.
    """
    found: dict[int, Tensor] = {}
    for entry in sent:
        for part in entry.parts:
            if part.spec.name == ATTENTION_MASK:
                mask = codec(part.spec.codec).decode(part.payload, part.spec.shape, dtype_of(part.spec.dtype))
                kept = mask.to(torch.bool).expand(entry.rows, -1)
                for position in range(entry.position, entry.position + entry.tokens):
                    found[position] = kept[:, position].nonzero().flatten()
                break
        else:
            for position in range(entry.position, entry.position + entry.tokens):
                found.pop(position, None)
    return found
