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
    CLIENT_KEY_BYTES,
    DIGEST_BYTES,
    EDGE_BYTES,
    MAX_BATCH,
    MAX_CACHE_OPS,
    MAX_COUNT,
    MAX_DIM,
    MAX_DIMS,
    MAX_ERROR_CHARS,
    MAX_NAME_CHARS,
    MAX_PEER_ID_CHARS,
    MAX_RETRY_S,
    MAX_STEP_MS,
    MAX_TENSORS,
    MAX_TRACE,
    PAYLOAD_BYTES,
    PROOF_BYTES,
    SESSION_ID_BYTES,
    SIGNATURE_BYTES,
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
    """Opens (or, with `resume`, takes up again) a session over `span` of the model with this fingerprint.

    `session_id` is known to the client and this peer alone, `edge` also to the peer before it, which shows it with each
    step that it pushes (law 7). From now on only steps of `epoch` are taken. Outputs wait for a `Route`.
    The last four fields say who opens it: see `protocol.credentials`.
    """

    session_id: bytes
    epoch: int
    fingerprint: str
    span: Span
    codec: str
    batch: int
    max_tokens: int
    resume: bool = False
    stateless: bool = False
    edge: bytes = b""
    client_key: bytes = b""
    signature: bytes = b""
    signed_at_ms: int = 0
    membership: bytes = b""

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
                edge=self.edge,
                client_key=self.client_key,
                signature=self.signature,
                signed_at_ms=self.signed_at_ms,
                membership=self.membership,
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Open) -> Open:
        check_version(message.wire_version)
        if len(message.session_id) != SESSION_ID_BYTES:
            raise BadMessage(f"a session id has {SESSION_ID_BYTES} bytes, not {len(message.session_id)}")
        _check_edge(message.edge, optional=True)
        _check_counts(message.epoch, message.max_tokens, message.signed_at_ms)
        signed = (len(message.client_key), len(message.signature))
        if signed not in ((0, 0), (CLIENT_KEY_BYTES, SIGNATURE_BYTES)):
            raise BadMessage("a session's key and signature are not of the sizes that they have")
        if len(message.membership) not in (0, PROOF_BYTES):
            raise BadMessage(f"a proof has {PROOF_BYTES} bytes, not {len(message.membership)}")
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
            message.edge,
            message.client_key,
            message.signature,
            message.signed_at_ms,
            message.membership,
        )


@dataclass(frozen=True, slots=True)
class Opened:
    """The peer holds the session: `next_step` is the step id it expects, `tokens` what its cache has per row.

    `kept_from`: the outputs of steps before this one cannot be sent again; 0: all can, so that a new peer after it can
    be told.
    """

    next_step: int
    tokens: int
    kv_tokens_left: int
    dtype: str
    kept_from: int = 0

    def to_proto(self) -> pb.InferReply:
        return pb.InferReply(
            opened=pb.Opened(
                next_step=self.next_step,
                tokens=self.tokens,
                kv_tokens_left=self.kv_tokens_left,
                dtype=self.dtype,
                kept_from=self.kept_from,
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Opened) -> Opened:
        _check_counts(message.next_step, message.tokens, message.kept_from)
        if len(message.dtype) > MAX_NAME_CHARS:
            raise BadMessage("a dtype's name is too long")
        return cls(message.next_step, message.tokens, message.kv_tokens_left, message.dtype, message.kept_from)


@dataclass(frozen=True, slots=True)
class Route:
    """Where a session's outputs go, from the step `next_step` on; those that are kept are sent again as needed.

    `peer_id` and `edge`: the next peer of the chain and the token that it asks for; empty: the client takes them.
    """

    epoch: int
    next_step: int
    peer_id: str = ""
    edge: bytes = b""

    def to_proto(self) -> pb.InferRequest:
        return pb.InferRequest(
            route=pb.Route(
                epoch=self.epoch,
                peer_id=self.peer_id,
                edge=self.edge,
                next_step=self.next_step,
            )
        )

    @classmethod
    def from_proto(cls, message: pb.Route) -> Route:
        if len(message.peer_id) > MAX_PEER_ID_CHARS:
            raise BadMessage("a peer id is too long")
        _check_edge(message.edge, optional=not message.peer_id)
        _check_counts(message.epoch, message.next_step)
        return cls(message.epoch, message.next_step, message.peer_id, message.edge)


@dataclass(frozen=True, slots=True)
class HopTrace:
    """What a step met at the hop whose first block is `start`. The hop's own word: of use for choosing, no proof."""

    start: int
    queue_ms: float
    compute_ms: float
    kv_tokens_left: int
    epoch: int = 0  # in which it was computed
    received: bytes = b""  # digests: see `protocol.receipts`
    sent: bytes = b""

    def to_proto(self) -> pb.HopTrace:
        return pb.HopTrace(
            start=self.start,
            queue_ms=self.queue_ms,
            compute_ms=self.compute_ms,
            kv_tokens_left=self.kv_tokens_left,
            epoch=self.epoch,
            received=self.received,
            sent=self.sent,
        )

    @classmethod
    def from_proto(cls, message: pb.HopTrace) -> HopTrace:
        times = (message.queue_ms, message.compute_ms)
        if not all(0 <= time <= MAX_STEP_MS for time in times):
            raise BadMessage("a step's times are no times")
        if not {len(message.received), len(message.sent)} <= {0, DIGEST_BYTES}:
            raise BadMessage("a step's digests are none")
        _check_counts(message.epoch)
        return cls(message.start, *times, message.kv_tokens_left, message.epoch, message.received, message.sent)


@dataclass(frozen=True, slots=True)
class Step:
    """One pass of some tokens through the session's span.

    `position`: tokens per row in the cache before this step's own, its `ops` applied. Several tensors of one name are
    parts of one input (a replay's), concatenated along tokens. `trace`: of the hops that the step has passed, in order.
    """

    epoch: int
    step_id: int
    position: int
    tensors: tuple[TensorSpec, ...]
    payload: bytes
    ops: tuple[CacheOp, ...] = ()
    trace: tuple[HopTrace, ...] = ()

    def header(self) -> pb.Step:
        return pb.Step(
            epoch=self.epoch,
            step_id=self.step_id,
            position=self.position,
            ops=[pb.CacheOp(kind=op.kind, values=op.values) for op in self.ops],
            tensors=[spec.to_proto() for spec in self.tensors],
            payload_bytes=len(self.payload),
            trace=[hop.to_proto() for hop in self.trace],
        )

    @classmethod
    def from_proto(cls, message: pb.Step, payload: bytes) -> Step:
        tensors = check_tensors(message.tensors, message.payload_bytes)
        if len(message.ops) > MAX_CACHE_OPS:
            raise BadMessage(f"{len(message.ops)} cache operations on one step; {MAX_CACHE_OPS} at most")
        if len(message.trace) > MAX_TRACE:
            raise BadMessage(f"a step that passed {len(message.trace)} hops; {MAX_TRACE} at most")
        _check_counts(message.epoch, message.step_id, message.position)
        ops = tuple(CacheOp.from_proto(op) for op in message.ops)
        trace = tuple(HopTrace.from_proto(hop) for hop in message.trace)
        return cls(message.epoch, message.step_id, message.position, tensors, payload, ops, trace)

    def parts(self) -> Iterator[tuple[TensorSpec, memoryview]]:
        """Each tensor's description with its bytes (views, no copies)."""
        return split_payload(self.tensors, self.payload)


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a hop gives the client: the last one's hidden states, or a whole step to be carried to the next hop.

    `undelivered`: why the step comes to the client, where the next peer should have had it.
    """

    step: Step
    undelivered: str = ""

    def header(self) -> pb.StepResult:
        return pb.StepResult(step=self.step.header(), undelivered=self.undelivered[:MAX_ERROR_CHARS])

    @classmethod
    def from_proto(cls, message: pb.StepResult, payload: bytes) -> StepResult:
        return cls(Step.from_proto(message.step, payload), shown(message.undelivered, MAX_ERROR_CHARS))


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a session is at a peer. Steps count from zero; each number is that of the step after the last one that
    has `received` (arrived whole), been computed (`next_step`), or had its output handed on (`sent`)."""

    epoch: int
    received: int
    next_step: int
    sent: int
    arriving_bytes: int = 0
    queue: int = 0
    expected_ms: float = 0.0

    def to_proto(self) -> pb.ProgressReply:
        return pb.ProgressReply(
            epoch=self.epoch,
            received=self.received,
            next_step=self.next_step,
            sent=self.sent,
            arriving_bytes=self.arriving_bytes,
            queue=self.queue,
            expected_ms=self.expected_ms,
        )

    @classmethod
    def from_proto(cls, message: pb.ProgressReply) -> Progress:
        expected_ms = message.expected_ms if math.isfinite(message.expected_ms) else 0.0
        return cls(
            message.epoch,
            message.received,
            message.next_step,
            message.sent,
            message.arriving_bytes,
            message.queue,
            max(0.0, expected_ms),
        )


@dataclass(frozen=True, slots=True)
class Close:
    """The client is done: the peer frees the session's cache at once."""

    def to_proto(self) -> pb.InferRequest:
        return pb.InferRequest(close=pb.Close())


@dataclass(frozen=True, slots=True)
class Notice:
    """What a client should know without having asked: the peer is `draining`."""

    state: str
    expected_ms: float = 0.0

    def to_proto(self) -> pb.InferReply:
        return pb.InferReply(notice=pb.Notice(state=self.state, expected_ms=self.expected_ms))

    @classmethod
    def from_proto(cls, message: pb.Notice) -> Notice:
        is_time = 0 <= message.expected_ms <= MAX_STEP_MS
        return cls(shown(message.state, MAX_NAME_CHARS), message.expected_ms if is_time else 0.0)


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
        retry_after_s = message.retry_after_s
        error = from_wire(
            message.code,
            shown(message.message, MAX_ERROR_CHARS),
            retryable=message.retryable,
            retry_after_s=min(retry_after_s, MAX_RETRY_S) if retry_after_s > 0 else None,  # NaN is not
            peer_id=shown(message.peer_id, MAX_PEER_ID_CHARS) or None,
        )
        return cls(error, message.step_id, message.fatal)


def shown(text: str, most_chars: int) -> str:
    """A stranger's text as it may be shown: without what would drive a terminal."""
    text = text[:most_chars]
    return text if text.isprintable() else "".join(char if char.isprintable() else " " for char in text)


def _check_counts(*counts: int) -> None:
    if max(counts) > MAX_COUNT:
        raise BadMessage("a count of steps, tokens or epochs is beyond all bounds")


def _check_edge(token: bytes, *, optional: bool) -> None:
    if len(token) != EDGE_BYTES and not (optional and not token):
        raise BadMessage(f"an edge's token has {EDGE_BYTES} bytes, not {len(token)}")


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
