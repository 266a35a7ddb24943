"""The messages of a session as frozen values, and their checks. Everything that arrives is checked here first (law 4).

`Step` and `StepResult` carry tensors as one payload of raw bytes, described by `TensorSpec`s; `protocol.frames` cuts
payloads into gRPC messages and puts them together again. What only a peer can know (its widths, its codecs' sizes, a
session's rows) is checked by the peer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from protocol import potluck_pb2 as pb
from protocol.errors import BadMessage, PotluckError, VersionMismatch, from_wire
from protocol.limits import (
    MAX_BATCH,
    MAX_CACHE_OPS,
    MAX_DIM,
    MAX_DIMS,
    MAX_ERROR_CHARS,
    MAX_NAME_CHARS,
    MAX_TENSORS,
    PAYLOAD_BYTES,
    SESSION_ID_BYTES,
    WIRE_VERSION,
)
from protocol.span import Span

HIDDEN = "hidden"
ATTENTION_MASK = "attention_mask"
POSITION_IDS = "position_ids"

CACHE_OPS = frozenset({"crop", "reorder", "repeat", "select", "reset", "record_past"})


def token_axis(name: str) -> int:
    """Where a step's tensor counts its tokens: hidden states are [..., rows, tokens, width], others [rows, tokens]."""
    return -2 if name == HIDDEN else 1


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """How `nbytes` of a payload become a tensor. `keep`: use only the first `keep` tokens (0: all of them)."""

    name: str
    codec: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    keep: int = 0

    def to_proto(self) -> pb.Tensor:
        return pb.Tensor(
            name=self.name, codec=self.codec, dtype=self.dtype, shape=self.shape, nbytes=self.nbytes, keep=self.keep
        )

    @classmethod
    def from_proto(cls, message: pb.Tensor) -> TensorSpec:
        shape = tuple(message.shape)
        if not message.name or any(len(t) > MAX_NAME_CHARS for t in (message.name, message.codec, message.dtype)):
            raise BadMessage("a tensor's name, codec or dtype is missing or too long")
        if len(shape) > MAX_DIMS or any(size > MAX_DIM for size in shape) or math.prod(shape) > PAYLOAD_BYTES:
            raise BadMessage(f"a tensor of shape {shape[:8]} is larger than a message may carry")
        if message.nbytes > PAYLOAD_BYTES:
            raise BadMessage(f"a tensor of {message.nbytes} bytes is larger than a message may carry")
        return cls(message.name, message.codec, message.dtype, shape, message.nbytes, message.keep)


@dataclass(frozen=True, slots=True)
class CacheOp:
    """An operation on the KV cache that rides on the next step: `crop` (tokens kept), `reorder` (row indices),
    `repeat` (times), `select` (row indices), `reset`, `record_past`."""

    kind: str
    values: tuple[int, ...] = ()

    @classmethod
    def from_proto(cls, message: pb.CacheOp) -> CacheOp:
        values = tuple(message.values)
        if message.kind not in CACHE_OPS:
            raise BadMessage(f"{message.kind[:MAX_NAME_CHARS]!r} is not a cache operation")
        wanted = {"crop": 1, "repeat": 1, "reset": 0, "record_past": 0}.get(message.kind)
        if (wanted is not None and len(values) != wanted) or len(values) > MAX_BATCH:
            raise BadMessage(f"cache operation {message.kind} with {len(values)} values")
        return cls(message.kind, values)


@dataclass(frozen=True, slots=True)
class Open:
    """Opens (or, with `resume`, takes up again) a session over `span` of the model with this fingerprint."""

    session_id: bytes
    epoch: int
    fingerprint: str
    span: Span
    codec: str
    batch: int
    max_tokens: int
    resume: bool = False
    stateless: bool = False

    def to_proto(self) -> pb.InferRequest:
        return pb.InferRequest(
            open=pb.Open(
                wire_version=WIRE_VERSION,
                session_id=self.session_id,
                epoch=self.epoch,
                fingerprint=self.fingerprint,
                start=self.span.start,
                stop=self.span.stop,
                codec=self.codec,
                batch=self.batch,
                max_tokens=self.max_tokens,
                resume=self.resume,
                stateless=self.stateless,
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Open) -> Open:
        check_version(message.wire_version)
        if len(message.session_id) != SESSION_ID_BYTES:
            raise BadMessage(f"a session id has {SESSION_ID_BYTES} bytes, not {len(message.session_id)}")
        if message.stop <= message.start:
            raise BadMessage(f"{message.start}:{message.stop} is not a span of blocks")
        if len(message.fingerprint) > MAX_NAME_CHARS * 2 or len(message.codec) > MAX_NAME_CHARS:
            raise BadMessage("a fingerprint or a codec's name is too long")
        if not 1 <= message.batch <= MAX_BATCH:
            raise BadMessage(f"a session has 1 to {MAX_BATCH} rows, not {message.batch}")
        return cls(
            message.session_id,
            message.epoch,
            message.fingerprint,
            Span(message.start, message.stop),
            message.codec,
            message.batch,
            message.max_tokens,
            message.resume,
            message.stateless,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer holds the session: `next_step` is the step id it expects, `tokens` what its cache has per row."""

    next_step: int
    tokens: int
    kv_tokens_left: int
    dtype: str

    def to_proto(self) -> pb.InferReply:
        return pb.InferReply(
            opened=pb.Opened(
                next_step=self.next_step, tokens=self.tokens, kv_tokens_left=self.kv_tokens_left, dtype=self.dtype
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Opened) -> Opened:
        return cls(message.next_step, message.tokens, message.kv_tokens_left, message.dtype)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of some tokens through the session's span.

    `position`: tokens per row in the cache before this step and before its `ops`. Several tensors of one name are parts
    of one input (a replay's), concatenated along tokens.
    """

    epoch: int
    step_id: int
    position: int
    tensors: tuple[TensorSpec, ...]
    payload: bytes
    ops: tuple[CacheOp, ...] = ()
    want_result: bool = True

    def header(self) -> pb.Step:
        return pb.Step(
            epoch=self.epoch,
            step_id=self.step_id,
            position=self.position,
            ops=[pb.CacheOp(kind=op.kind, values=op.values) for op in self.ops],
            tensors=[spec.to_proto() for spec in self.tensors],
            payload_bytes=len(self.payload),
            want_result=self.want_result,
        )

    @classmethod
    def from_proto(cls, message: pb.Step, payload: bytes) -> Step:
        tensors = check_tensors(message.tensors, message.payload_bytes)
        if len(message.ops) > MAX_CACHE_OPS:
            raise BadMessage(f"{len(message.ops)} cache operations on one step; {MAX_CACHE_OPS} at most")
        ops = tuple(CacheOp.from_proto(op) for op in message.ops)
        return cls(
            message.epoch, message.step_id, message.position, tensors, payload, ops, want_result=message.want_result
        )

    def parts(self) -> Iterator[tuple[TensorSpec, memoryview]]:
        """Each tensor's description with its bytes (views, no copies)."""
        return split_payload(self.tensors, self.payload)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What came out of a step: tensors as in `Step` (none if no result was wanted), and what it cost."""

    epoch: int
    step_id: int
    tensors: tuple[TensorSpec, ...]
    payload: bytes
    queue_ms: float = 0.0
    compute_ms: float = 0.0
    kv_tokens_left: int = 0

    def header(self) -> pb.StepResult:
        return pb.StepResult(
            epoch=self.epoch,
            step_id=self.step_id,
            tensors=[spec.to_proto() for spec in self.tensors],
            payload_bytes=len(self.payload),
            queue_ms=self.queue_ms,
            compute_ms=self.compute_ms,
            kv_tokens_left=self.kv_tokens_left,
        )

    @classmethod
    def from_proto(cls, message: pb.StepResult, payload: bytes) -> StepResult:
        tensors = check_tensors(message.tensors, message.payload_bytes)
        return cls(
            message.epoch,
            message.step_id,
            tensors,
            payload,
            message.queue_ms,
            message.compute_ms,
            message.kv_tokens_left,
        )

    def parts(self) -> Iterator[tuple[TensorSpec, memoryview]]:
        """Each tensor's description with its bytes (views, no copies)."""
        return split_payload(self.tensors, self.payload)


@dataclass(frozen=True, slots=True)
class Close:
    """The client is done: the peer frees the session's cache at once."""

    def to_proto(self) -> pb.InferRequest:
        return pb.InferRequest(close=pb.Close())


@dataclass(frozen=True, slots=True)
class Notice:
    """What a client should know while it waits: the peer is `draining`, or the step is `queued`."""

    state: str
    expected_ms: float = 0.0

    def to_proto(self) -> pb.InferReply:
        return pb.InferReply(notice=pb.Notice(state=self.state, expected_ms=self.expected_ms))


@dataclass(frozen=True, slots=True)
class Failure:
    """An error of the tree on its way to the other side. `fatal`: the session's stream ends with it."""

    error: PotluckError
    step_id: int = 0
    fatal: bool = False

    def to_proto(self) -> pb.InferReply:
        error = self.error
        return pb.InferReply(
            failure=pb.Failure(
                code=error.code,
                message=error.message[:MAX_ERROR_CHARS],
                retryable=error.retryable,
                retry_after_s=error.retry_after_s or 0.0,
                peer_id=error.peer_id or "",
                step_id=self.step_id,
                fatal=self.fatal,
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Failure) -> Failure:
        error = from_wire(
            message.code,
            message.message[:MAX_ERROR_CHARS],
            retryable=message.retryable,
            retry_after_s=message.retry_after_s or None,
            peer_id=message.peer_id or None,
        )
        return cls(error, message.step_id, message.fatal)


def check_version(theirs: int) -> None:
    """Raises VersionMismatch unless the other side speaks our wire version."""
    if theirs != WIRE_VERSION:
        older = "this side" if theirs > WIRE_VERSION else "the other side"
        raise VersionMismatch(
            f"wire version {theirs} met {WIRE_VERSION}; {older} is older: upgrade it with `pip install -U potluck`"
        )


def check_tensors(messages: Iterable[pb.Tensor], payload_bytes: int) -> tuple[TensorSpec, ...]:
    """The descriptions of a payload of `payload_bytes`.

    Raises:
        BadMessage: there are too many, one is malformed, or their sizes do not add up.
    """
    messages = list(messages)
    if len(messages) > MAX_TENSORS:
        raise BadMessage(f"{len(messages)} tensors in one message; {MAX_TENSORS} at most")
    specs = tuple(TensorSpec.from_proto(m) for m in messages)
    if sum(spec.nbytes for spec in specs) != payload_bytes:
        raise BadMessage("the tensors' sizes do not add up to the payload's")
    return specs


def split_payload(specs: Iterable[TensorSpec], payload: bytes) -> Iterator[tuple[TensorSpec, memoryview]]:
    """Each tensor's description with its slice of the payload."""
    view, offset = memoryview(payload), 0
    for spec in specs:
        yield spec, view[offset : offset + spec.nbytes]
        offset += spec.nbytes
