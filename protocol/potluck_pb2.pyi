from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DescribeRequest(_message.Message):
    __slots__ = ("wire_version",)
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    def __init__(self, wire_version: _Optional[int] = ...) -> None: ...

class Description(_message.Message):
    __slots__ = ("wire_version", "software", "peer_id", "fingerprint", "model", "start", "stop", "n_blocks", "legal_cuts", "dtype", "codecs", "max_session_tokens", "kv_tokens_total", "kv_tokens_left", "state", "max_step_tokens")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SOFTWARE_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    N_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    LEGAL_CUTS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    CODECS_FIELD_NUMBER: _ClassVar[int]
    MAX_SESSION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    MAX_STEP_TOKENS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    software: str
    peer_id: str
    fingerprint: str
    model: str
    start: int
    stop: int
    n_blocks: int
    legal_cuts: _containers.RepeatedScalarFieldContainer[int]
    dtype: str
    codecs: _containers.RepeatedScalarFieldContainer[str]
    max_session_tokens: int
    kv_tokens_total: int
    kv_tokens_left: int
    state: str
    max_step_tokens: int
    def __init__(self, wire_version: _Optional[int] = ..., software: _Optional[str] = ..., peer_id: _Optional[str] = ..., fingerprint: _Optional[str] = ..., model: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., n_blocks: _Optional[int] = ..., legal_cuts: _Optional[_Iterable[int]] = ..., dtype: _Optional[str] = ..., codecs: _Optional[_Iterable[str]] = ..., max_session_tokens: _Optional[int] = ..., kv_tokens_total: _Optional[int] = ..., kv_tokens_left: _Optional[int] = ..., state: _Optional[str] = ..., max_step_tokens: _Optional[int] = ...) -> None: ...

class PingRequest(_message.Message):
    __slots__ = ("payload",)
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    def __init__(self, payload: _Optional[bytes] = ...) -> None: ...

class PingReply(_message.Message):
    __slots__ = ("payload", "kv_tokens_left", "sessions", "queue", "steps_begun", "steps_pushed", "steps_relayed")
    PAYLOAD_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    SESSIONS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    STEPS_BEGUN_FIELD_NUMBER: _ClassVar[int]
    STEPS_PUSHED_FIELD_NUMBER: _ClassVar[int]
    STEPS_RELAYED_FIELD_NUMBER: _ClassVar[int]
    payload: bytes
    kv_tokens_left: int
    sessions: int
    queue: int
    steps_begun: int
    steps_pushed: int
    steps_relayed: int
    def __init__(self, payload: _Optional[bytes] = ..., kv_tokens_left: _Optional[int] = ..., sessions: _Optional[int] = ..., queue: _Optional[int] = ..., steps_begun: _Optional[int] = ..., steps_pushed: _Optional[int] = ..., steps_relayed: _Optional[int] = ...) -> None: ...

class InferRequest(_message.Message):
    __slots__ = ("open", "step", "close", "more", "route", "chunk")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    CLOSE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    ROUTE_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    open: Open
    step: Step
    close: Close
    more: More
    route: Route
    chunk: bytes
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., step: _Optional[_Union[Step, _Mapping]] = ..., close: _Optional[_Union[Close, _Mapping]] = ..., more: _Optional[_Union[More, _Mapping]] = ..., route: _Optional[_Union[Route, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class InferReply(_message.Message):
    __slots__ = ("opened", "result", "failure", "more", "notice", "receipt", "chunk")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    RESULT_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    NOTICE_FIELD_NUMBER: _ClassVar[int]
    RECEIPT_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    result: StepResult
    failure: Failure
    more: More
    notice: Notice
    receipt: Receipt
    chunk: bytes
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., result: _Optional[_Union[StepResult, _Mapping]] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ..., more: _Optional[_Union[More, _Mapping]] = ..., notice: _Optional[_Union[Notice, _Mapping]] = ..., receipt: _Optional[_Union[Receipt, _Mapping]] = ..., chunk: _Optional[bytes] = ...) -> None: ...

class More(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Open(_message.Message):
    __slots__ = ("wire_version", "session_id", "epoch", "fingerprint", "start", "stop", "codec", "batch", "max_tokens", "resume", "stateless", "edge", "client_key", "signature", "signed_at_ms", "membership")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    START_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    BATCH_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    STATELESS_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    CLIENT_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    SIGNED_AT_MS_FIELD_NUMBER: _ClassVar[int]
    MEMBERSHIP_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    session_id: bytes
    epoch: int
    fingerprint: str
    start: int
    stop: int
    codec: str
    batch: int
    max_tokens: int
    resume: bool
    stateless: bool
    edge: bytes
    client_key: bytes
    signature: bytes
    signed_at_ms: int
    membership: bytes
    def __init__(self, wire_version: _Optional[int] = ..., session_id: _Optional[bytes] = ..., epoch: _Optional[int] = ..., fingerprint: _Optional[str] = ..., start: _Optional[int] = ..., stop: _Optional[int] = ..., codec: _Optional[str] = ..., batch: _Optional[int] = ..., max_tokens: _Optional[int] = ..., resume: _Optional[bool] = ..., stateless: _Optional[bool] = ..., edge: _Optional[bytes] = ..., client_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ..., signed_at_ms: _Optional[int] = ..., membership: _Optional[bytes] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("next_step", "tokens", "kv_tokens_left", "dtype", "kept_from")
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    KEPT_FROM_FIELD_NUMBER: _ClassVar[int]
    next_step: int
    tokens: int
    kv_tokens_left: int
    dtype: str
    kept_from: int
    def __init__(self, next_step: _Optional[int] = ..., tokens: _Optional[int] = ..., kv_tokens_left: _Optional[int] = ..., dtype: _Optional[str] = ..., kept_from: _Optional[int] = ...) -> None: ...

class Route(_message.Message):
    __slots__ = ("epoch", "peer_id", "edge", "next_step")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    EDGE_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    peer_id: str
    edge: bytes
    next_step: int
    def __init__(self, epoch: _Optional[int] = ..., peer_id: _Optional[str] = ..., edge: _Optional[bytes] = ..., next_step: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "codec", "dtype", "shape", "nbytes", "keep")
    NAME_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    NBYTES_FIELD_NUMBER: _ClassVar[int]
    KEEP_FIELD_NUMBER: _ClassVar[int]
    name: str
    codec: str
    dtype: str
    shape: _containers.RepeatedScalarFieldContainer[int]
    nbytes: int
    keep: int
    def __init__(self, name: _Optional[str] = ..., codec: _Optional[str] = ..., dtype: _Optional[str] = ..., shape: _Optional[_Iterable[int]] = ..., nbytes: _Optional[int] = ..., keep: _Optional[int] = ...) -> None: ...

class CacheOp(_message.Message):
    __slots__ = ("kind", "values")
    KIND_FIELD_NUMBER: _ClassVar[int]
    VALUES_FIELD_NUMBER: _ClassVar[int]
    kind: str
    values: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, kind: _Optional[str] = ..., values: _Optional[_Iterable[int]] = ...) -> None: ...

class Step(_message.Message):
    __slots__ = ("epoch", "step_id", "position", "ops", "tensors", "payload_bytes", "trace")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    POSITION_FIELD_NUMBER: _ClassVar[int]
    OPS_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PAYLOAD_BYTES_FIELD_NUMBER: _ClassVar[int]
    TRACE_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    step_id: int
    position: int
    ops: _containers.RepeatedCompositeFieldContainer[CacheOp]
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    payload_bytes: int
    trace: _containers.RepeatedCompositeFieldContainer[HopTrace]
    def __init__(self, epoch: _Optional[int] = ..., step_id: _Optional[int] = ..., position: _Optional[int] = ..., ops: _Optional[_Iterable[_Union[CacheOp, _Mapping]]] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., payload_bytes: _Optional[int] = ..., trace: _Optional[_Iterable[_Union[HopTrace, _Mapping]]] = ...) -> None: ...

class HopTrace(_message.Message):
    __slots__ = ("start", "queue_ms", "compute_ms", "kv_tokens_left", "epoch", "received", "sent")
    START_FIELD_NUMBER: _ClassVar[int]
    QUEUE_MS_FIELD_NUMBER: _ClassVar[int]
    COMPUTE_MS_FIELD_NUMBER: _ClassVar[int]
    KV_TOKENS_LEFT_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    start: int
    queue_ms: float
    compute_ms: float
    kv_tokens_left: int
    epoch: int
    received: bytes
    sent: bytes
    def __init__(self, start: _Optional[int] = ..., queue_ms: _Optional[float] = ..., compute_ms: _Optional[float] = ..., kv_tokens_left: _Optional[int] = ..., epoch: _Optional[int] = ..., received: _Optional[bytes] = ..., sent: _Optional[bytes] = ...) -> None: ...

class Receipt(_message.Message):
    __slots__ = ("lines", "public_key", "signature")
    LINES_FIELD_NUMBER: _ClassVar[int]
    PUBLIC_KEY_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    lines: _containers.RepeatedCompositeFieldContainer[ReceiptLine]
    public_key: bytes
    signature: bytes
    def __init__(self, lines: _Optional[_Iterable[_Union[ReceiptLine, _Mapping]]] = ..., public_key: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class ReceiptLine(_message.Message):
    __slots__ = ("step_id", "epoch", "received", "sent")
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    step_id: int
    epoch: int
    received: bytes
    sent: bytes
    def __init__(self, step_id: _Optional[int] = ..., epoch: _Optional[int] = ..., received: _Optional[bytes] = ..., sent: _Optional[bytes] = ...) -> None: ...

class RecallRequest(_message.Message):
    __slots__ = ("session_id", "first_step")
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    first_step: int
    def __init__(self, session_id: _Optional[bytes] = ..., first_step: _Optional[int] = ...) -> None: ...

class StepResult(_message.Message):
    __slots__ = ("step", "undelivered")
    STEP_FIELD_NUMBER: _ClassVar[int]
    UNDELIVERED_FIELD_NUMBER: _ClassVar[int]
    step: Step
    undelivered: str
    def __init__(self, step: _Optional[_Union[Step, _Mapping]] = ..., undelivered: _Optional[str] = ...) -> None: ...

class Close(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Notice(_message.Message):
    __slots__ = ("state", "expected_ms")
    STATE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    state: str
    expected_ms: float
    def __init__(self, state: _Optional[str] = ..., expected_ms: _Optional[float] = ...) -> None: ...

class Failure(_message.Message):
    __slots__ = ("code", "message", "retryable", "retry_after_s", "peer_id", "step_id", "fatal")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRYABLE_FIELD_NUMBER: _ClassVar[int]
    RETRY_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    PEER_ID_FIELD_NUMBER: _ClassVar[int]
    STEP_ID_FIELD_NUMBER: _ClassVar[int]
    FATAL_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    retryable: bool
    retry_after_s: float
    peer_id: str
    step_id: int
    fatal: bool
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., retryable: _Optional[bool] = ..., retry_after_s: _Optional[float] = ..., peer_id: _Optional[str] = ..., step_id: _Optional[int] = ..., fatal: _Optional[bool] = ...) -> None: ...

class PushRequest(_message.Message):
    __slots__ = ("edge", "request")
    EDGE_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    edge: bytes
    request: InferRequest
    def __init__(self, edge: _Optional[bytes] = ..., request: _Optional[_Union[InferRequest, _Mapping]] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ("edge", "failure")
    EDGE_FIELD_NUMBER: _ClassVar[int]
    FAILURE_FIELD_NUMBER: _ClassVar[int]
    edge: bytes
    failure: Failure
    def __init__(self, edge: _Optional[bytes] = ..., failure: _Optional[_Union[Failure, _Mapping]] = ...) -> None: ...

class ProgressRequest(_message.Message):
    __slots__ = ("session_id",)
    SESSION_ID_FIELD_NUMBER: _ClassVar[int]
    session_id: bytes
    def __init__(self, session_id: _Optional[bytes] = ...) -> None: ...

class ProgressReply(_message.Message):
    __slots__ = ("epoch", "received", "next_step", "sent", "arriving_bytes", "queue", "expected_ms")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVED_FIELD_NUMBER: _ClassVar[int]
    NEXT_STEP_FIELD_NUMBER: _ClassVar[int]
    SENT_FIELD_NUMBER: _ClassVar[int]
    ARRIVING_BYTES_FIELD_NUMBER: _ClassVar[int]
    QUEUE_FIELD_NUMBER: _ClassVar[int]
    EXPECTED_MS_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    received: int
    next_step: int
    sent: int
    arriving_bytes: int
    queue: int
    expected_ms: float
    def __init__(self, epoch: _Optional[int] = ..., received: _Optional[int] = ..., next_step: _Optional[int] = ..., sent: _Optional[int] = ..., arriving_bytes: _Optional[int] = ..., queue: _Optional[int] = ..., expected_ms: _Optional[float] = ...) -> None: ...

class DialBackRequest(_message.Message):
    __slots__ = ("wire_version", "certificate", "ports")
    WIRE_VERSION_FIELD_NUMBER: _ClassVar[int]
    CERTIFICATE_FIELD_NUMBER: _ClassVar[int]
    PORTS_FIELD_NUMBER: _ClassVar[int]
    wire_version: int
    certificate: bytes
    ports: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, wire_version: _Optional[int] = ..., certificate: _Optional[bytes] = ..., ports: _Optional[_Iterable[int]] = ...) -> None: ...

class DialBackReply(_message.Message):
    __slots__ = ("host", "reached")
    HOST_FIELD_NUMBER: _ClassVar[int]
    REACHED_FIELD_NUMBER: _ClassVar[int]
    host: str
    reached: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, host: _Optional[str] = ..., reached: _Optional[_Iterable[int]] = ...) -> None: ...
