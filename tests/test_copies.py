"""How often a tensor is copied between the wire and the device: once on each side, and what gRPC's messages need."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from protocol import potluck_pb2 as pb
from protocol.frames import RequestAssembler, step_frames
from protocol.limits import CHUNK_BYTES
from protocol.messages import HIDDEN, Step, TensorSpec
from tensor_codecs import codec

TOKENS, WIDTH = 1024, 1024
PAYLOAD_BYTES = 4 * TOKENS * WIDTH
SLACK = 1.1
COPIES = ("aten.copy_", "aten.clone", "aten.cat", "aten._to_copy", "aten.stack")


class CopyCounter(TorchDispatchMode):
    """Counts torch's copies of tensors as large as the payload."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if str(func).startswith(COPIES) and isinstance(result, torch.Tensor) and result.nbytes >= PAYLOAD_BYTES:
            self.copies.append(str(func))
        return result


@contextmanager
def allocating(most_bytes: float) -> Iterator[None]:
    """Python's own memory, which holds what is on its way to or from the wire, grows by no more meanwhile."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield
        grown = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert grown <= most_bytes * SLACK


def test_from_the_device_to_the_wire_and_back() -> None:
    hidden = torch.randn(1, TOKENS, WIDTH)
    none = codec("none")
    with CopyCounter() as counter:
        none.decode(none.encode(hidden[:, :1]), (1, 1, WIDTH), torch.float32)  # torch imports modules of its own here
        with allocating(PAYLOAD_BYTES):
            payload = none.encode(hidden)
        spec = TensorSpec(HIDDEN, "none", "float32", tuple(hidden.shape), len(payload))
        step = Step(1, 0, 0, (spec,), payload)
        frames: list[bytes] = []
        with allocating(3 * CHUNK_BYTES):  # the chunk, the message's own copy of it, and what is written
            for frame in step_frames(step):
                frames = [frame.SerializeToString()]
        assert frames
        messages = [frame.SerializeToString() for frame in step_frames(step)]
        assembler = RequestAssembler(PAYLOAD_BYTES)
        with allocating(2 * PAYLOAD_BYTES):  # the chunks, and the whole
            arrived = [assembler.feed(pb.InferRequest.FromString(message)) for message in messages][-1]
        assert isinstance(arrived, Step)
        with allocating(PAYLOAD_BYTES):  # memory of the tensor's own
            ((_, view),) = arrived.parts()
            decoded = none.decode(view, spec.shape, torch.float32)
    assert torch.equal(decoded, hidden)
    assert counter.copies == [], "torch copies nothing beside"


def test_the_counters_count() -> None:
    """Else the test above could not fail."""
    with CopyCounter() as counter:
        torch.zeros(1, TOKENS, WIDTH).clone()
    assert counter.copies == ["aten.clone.default"]
    with pytest.raises(AssertionError), allocating(PAYLOAD_BYTES):
        copies = [bytes(PAYLOAD_BYTES) for _ in range(2)]
    del copies
