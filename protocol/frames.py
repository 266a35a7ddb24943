"""Framing: steps and results cut into gRPC messages of at most one chunk each, and put together again. No I/O.

A step's first message holds its header and the first chunk of its payload, `More` messages hold the rest. A decode
step is one message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage
from protocol.limits import CHUNK_BYTES, HEADER_BYTES, HEADER_WEIGHT
from protocol.messages import Close, Failure, Notice, Open, Opened, Route, Step, StepResult, check_tensors
from protocol.receipts import Receipt

Request = Open | Route | Step | Close
Reply = Opened | StepResult | Failure | Notice | Receipt


def step_frames(step: Step) -> Iterator[pb.InferRequest]:
    """The gRPC messages of a step, in order."""
    payload = step.payload
    yield pb.InferRequest(step=step.header(), chunk=payload[:CHUNK_BYTES])
    for offset in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        yield pb.InferRequest(more=pb.More(), chunk=payload[offset : offset + CHUNK_BYTES])


def result_frames(result: StepResult) -> Iterator[pb.InferReply]:
    """The gRPC messages of a step's result, in order."""
    payload = result.step.payload
    yield pb.InferReply(result=result.header(), chunk=payload[:CHUNK_BYTES])
    for offset in range(CHUNK_BYTES, len(payload), CHUNK_BYTES):
        yield pb.InferReply(more=pb.More(), chunk=payload[offset : offset + CHUNK_BYTES])


def held_bytes(header: pb.Step) -> int:
    """Memory that a step takes from its header on until it is done: its payload, and the header as objects."""
    return header.payload_bytes + HEADER_WEIGHT * header.ByteSize()


def _check_header(header: pb.Step) -> None:
    if header.ByteSize() > HEADER_BYTES:
        raise BadMessage(f"a step's header of {header.ByteSize()} bytes; {HEADER_BYTES} at most")


class _Gather:
    """Collects the chunks of one payload. Holds what has arrived, never more than the header declared."""

    def __init__(self, header: pb.Step, chunk: bytes) -> None:
        self.header = header
        self._chunks = [chunk]
        self._missing = header.payload_bytes - len(chunk)
        self._check(chunk)

    def add(self, chunk: bytes) -> None:
        if not chunk:
            raise BadMessage("an empty continuation")
        self._chunks.append(chunk)
        self._missing -= len(chunk)
        self._check(chunk)

    def _check(self, chunk: bytes) -> None:
        if len(chunk) > CHUNK_BYTES or self._missing < 0:
            raise BadMessage("more payload than announced")

    def payload(self) -> bytes | None:
        """The whole payload, or None while chunks are missing."""
        if self._missing:
            return None
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)


class RequestAssembler:
    """Turns the gRPC messages of a client into requests.

    Args:
        max_payload_bytes: a larger step is refused by its header, before its chunks are kept.
        admit: told what each step will take of memory when its header arrives; raises to refuse it.
    """

    def __init__(self, max_payload_bytes: int, admit: Callable[[int], None] = lambda nbytes: None) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._admit = admit
        self.refused = False  # the last step was refused by its header; the rest of it may still arrive
        self._gather: _Gather | None = None

    def feed(self, message: pb.InferRequest) -> Request | None:
        """The request that `message` completes, or None while its payload is incomplete.

        Raises:
            WireError: the message is malformed, too large, or out of order.
        """
        kind = message.WhichOneof("kind")
        if self._gather is not None:
            if kind != "more":
                raise BadMessage(f"a {kind} inside the payload of a step")
            self._gather.add(message.chunk)
            return self._finish()
        if kind == "step":
            if message.step.payload_bytes > self._max_payload_bytes:
                raise BadMessage(
                    f"a step of {message.step.payload_bytes} bytes; this peer takes {self._max_payload_bytes} at most: "
                    "send the prompt in smaller chunks"
                )
            _check_header(message.step)
            check_tensors(message.step.tensors, message.step.payload_bytes)
            self.refused = True
            self._admit(held_bytes(message.step))
            self.refused = False
            self._gather = _Gather(message.step, message.chunk)
            return self._finish()
        if kind == "open":
            return Open.from_proto(message.open)
        if kind == "route":
            return Route.from_proto(message.route)
        if kind == "close":
            return Close()
        raise BadMessage("an empty or unknown request" if kind is None else f"a {kind} out of order")

    def _finish(self) -> Step | None:
        assert self._gather is not None
        payload = self._gather.payload()
        if payload is None:
            return None
        header, self._gather = self._gather.header, None
        return Step.from_proto(header, payload)


class ReplyAssembler:
    """Turns the gRPC messages of a peer into replies; the mirror image of `RequestAssembler`."""

    def __init__(self, max_payload_bytes: int) -> None:
        self._max_payload_bytes = max_payload_bytes
        self._gather: _Gather | None = None
        self._result = pb.StepResult()  # whose payload is gathered

    def feed(self, message: pb.InferReply) -> Reply | None:
        """The reply that `message` completes, or None while its payload is incomplete.

        Raises:
            WireError: the message is malformed, too large, or out of order.
        """
        kind = message.WhichOneof("kind")
        if kind == "failure":
            self._gather = None
            return Failure.from_proto(message.failure)
        if kind == "notice":
            return Notice.from_proto(message.notice)
        if kind == "receipt":
            return Receipt.from_proto(message.receipt)
        if self._gather is not None:
            if kind != "more":
                raise BadMessage(f"a {kind} inside the payload of a result")
            self._gather.add(message.chunk)
            return self._finish()
        if kind == "result":
            header = message.result.step
            if header.payload_bytes > self._max_payload_bytes:
                raise BadMessage(f"a result of {header.payload_bytes} bytes, larger than asked for")
            _check_header(header)
            check_tensors(header.tensors, header.payload_bytes)
            self._result = message.result
            self._gather = _Gather(header, message.chunk)
            return self._finish()
        if kind == "opened":
            return Opened.from_proto(message.opened)
        raise BadMessage("an empty or unknown reply" if kind is None else f"a {kind} out of order")

    def _finish(self) -> StepResult | None:
        assert self._gather is not None
        payload = self._gather.payload()
        if payload is None:
            return None
        self._gather = None
        return StepResult.from_proto(self._result, payload)
