"""Nonsense for a peer's port: bytes, ill-formed messages, and messages of a right session that are almost right.

All of it is drawn from the generator that is passed in: the same seed, the same nonsense.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from dht.record import PeerRecord
from protocol import potluck_pb2 as pb
from protocol.frames import step_frames
from protocol.limits import CHUNK_BYTES
from protocol.messages import ATTENTION_MASK, HIDDEN, POSITION_IDS, CacheOp, Open, Route, Step, TensorSpec
from protocol.span import Span
from tensor_codecs import codec, names
from tests.slicing.architectures import N_BLOCKS

LARGEST_STEP = 2000  # tokens
WIDTH = 64  # of the tiny models' hidden states
EPOCH = 1


KNOWN = (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"\x16\x03\x01", b"SSH-2.0-x\r\n")


def noise(rng: random.Random) -> bytes:
    """Random bytes, often with the beginning of something known."""
    beginning = rng.choice((b"", b"", *KNOWN))
    return beginning + rng.randbytes(rng.choice((0, 1, 9, 100, 3000)))


def ill_formed(rng: random.Random) -> list[bytes]:
    """Bodies of messages: noise, or real ones with bytes changed, cut off, put in or repeated."""
    whole = [message.SerializeToString() for message in valid(rng, b"\0" * 32, "none")]
    found = []
    for body in rng.choices(whole, k=rng.randint(1, 3)):
        if rng.random() < 0.4:
            found.append(rng.randbytes(rng.choice((0, 1, 2, 10, 100, 10_000))))
            continue
        data = bytearray(body)
        for _ in range(rng.choice((1, 1, 2, 10))):
            at = rng.randrange(len(data) + 1)
            match rng.randrange(4):
                case 0 if at < len(data):
                    data[at] ^= 1 << rng.randrange(8)
                case 1:
                    del data[at:]
                case 2:
                    data[at:at] = rng.randbytes(rng.randint(1, 8))
                case _:
                    data += data[:at]
        found.append(bytes(data))
    return found


def valid(rng: random.Random, fingerprint: bytes | str, codec_name: str, edge: bytes = b"") -> list[Any]:
    """The messages of a right session: a route to the client, a prefill, three steps with cache operations, the end."""
    name = fingerprint if isinstance(fingerprint, str) else fingerprint.hex()
    rows, prompt = rng.choice(((1, 5), (2, 3), (3, 1)))
    span, max_tokens = Span(0, N_BLOCKS), rng.choice((0, 16))
    opening = Open(rng.randbytes(16), EPOCH, name, span, codec_name, rows, max_tokens, edge=edge)
    messages = [opening.to_proto(), Route(EPOCH, 0).to_proto()]
    position = 0
    for step_id, (tokens, ops) in enumerate(
        ((prompt, ()), (1, ()), (1, (CacheOp("reorder", (0,) * rows),)), (2, (CacheOp("crop", (1,)),)))
    ):
        past = ops[0].values[0] if ops and ops[0].kind == "crop" else position
        tensors = {HIDDEN: torch.randn(rows, tokens, WIDTH)}
        if rng.random() < 0.5:
            tensors[ATTENTION_MASK] = torch.ones(rows, past + tokens, dtype=torch.bool)
            tensors[POSITION_IDS] = torch.arange(past, past + tokens)[None].expand(rows, -1).contiguous()
        specs, payload = [], b""
        for tensor_name, tensor in tensors.items():
            chosen = codec_name if tensor.is_floating_point() else "none"
            encoded = codec(chosen).encode(tensor)
            specs.append(TensorSpec(tensor_name, chosen, str(tensor.dtype)[6:], tuple(tensor.shape), len(encoded)))
            payload += encoded
        messages += step_frames(Step(EPOCH, step_id, position, tuple(specs), payload, ops))
        position = past + tokens
    return [*messages, pb.InferRequest(close=pb.Close())]


def largest(rng: random.Random, record: PeerRecord) -> list[bytes]:
    """A right session that needs as much memory as any here: sent in each round, so that rounds can be compared."""
    opening, route = largest_opening(rng, record, b""), Route(EPOCH, 0)
    messages = [opening.to_proto(), route.to_proto(), *largest_step(), pb.InferRequest(close=pb.Close())]
    return [message.SerializeToString() for message in messages]


def largest_pushed(rng: random.Random, record: PeerRecord) -> tuple[list[list[bytes]], list[bytes]]:
    """The same by push, into a session of which outputs go to another one on the same peer: see `pushed`."""
    edges = [rng.randbytes(16) for _ in range(2)]
    routes = [Route(EPOCH, 0, record.peer_id, edges[1]), Route(EPOCH, 0)]
    openings = [
        [largest_opening(rng, record, edge).to_proto().SerializeToString(), route.to_proto().SerializeToString()]
        for edge, route in zip(edges, routes, strict=True)
    ]
    return openings, [pb.PushRequest(edge=edges[0], request=m).SerializeToString() for m in largest_step()]


def largest_opening(rng: random.Random, record: PeerRecord, edge: bytes) -> Open:
    return Open(rng.randbytes(16), EPOCH, record.fingerprint, Span(0, N_BLOCKS), "none", 1, 0, edge=edge)


def largest_step() -> Iterable[pb.InferRequest]:
    data = codec("none").encode(torch.randn(1, LARGEST_STEP, WIDTH))
    spec = TensorSpec(HIDDEN, "none", "float32", (1, LARGEST_STEP, WIDTH), len(data))
    return step_frames(Step(EPOCH, 0, 0, (spec,), data))


def sequence(rng: random.Random, record: PeerRecord) -> list[bytes]:
    """A right session in which something is wrong: fields, or the order of messages."""
    messages = valid(rng, record.fingerprint, rng.choice(names()))
    for _ in range(rng.choice((0, 1, 1, 1, 2, 3))):
        if rng.random() < 0.2:
            disorder(rng, messages, pb.InferRequest(more=pb.More()))
        else:
            disturb(rng, rng.choice(messages))
        if not messages:
            break
    return [message.SerializeToString() for message in messages]


def pushed(rng: random.Random, record: PeerRecord) -> tuple[list[list[bytes]], list[bytes]]:
    """How a few sessions are opened, and what is pushed into them: right steps in pieces, of all sessions at once, in
    which something is wrong."""
    edges = [rng.randbytes(16) for _ in range(rng.randint(1, 3))]
    openings, streams = [], []
    for edge in edges:
        opening, route, *steps, _ = valid(rng, record.fingerprint, rng.choice(names()), edge)
        match rng.randrange(6):
            case 0:  # outputs to the peer itself, under a token that is its own, another session's or nobody's
                next_edge = rng.choice((*edges, rng.randbytes(16)))
                route = Route(EPOCH, 0, record.peer_id, next_edge).to_proto()
            case 1:
                route = Route(EPOCH, 0, "Qm" + rng.randbytes(22).hex(), rng.randbytes(16)).to_proto()
            case 2:
                disturb(rng, rng.choice((opening, route)))
        openings.append([opening.SerializeToString(), route.SerializeToString()])
        streams.append([pb.PushRequest(edge=edge, request=piece) for step in steps for piece in in_pieces(rng, step)])
    messages = interleaved(rng, streams)
    for _ in range(rng.choice((0, 1, 1, 2, 3))):
        if messages:
            disturb_push(rng, messages)
    return openings, [message.SerializeToString() for message in messages]


def in_pieces(rng: random.Random, step: pb.InferRequest) -> list[pb.InferRequest]:
    """A step's message as one or more."""
    cuts = sorted({rng.randrange(len(step.chunk)) for _ in range(rng.choice((0, 1, 3)))} | {len(step.chunk)})
    first = pb.InferRequest(step=step.step, chunk=step.chunk[: cuts[0]])
    more = [pb.InferRequest(more=pb.More(), chunk=step.chunk[a:b]) for a, b in itertools.pairwise(cuts)]
    return [first, *more]


def interleaved(rng: random.Random, streams: Sequence[Sequence[Any]]) -> list[Any]:
    """The items of all streams in a random order that keeps each stream's own."""
    order = [i for i, stream in enumerate(streams) for _ in stream]
    rng.shuffle(order)
    rest = [iter(stream) for stream in streams]
    return [next(rest[i]) for i in order]


def disturb_push(rng: random.Random, messages: list[pb.PushRequest]) -> None:
    at = rng.randrange(len(messages))
    match rng.randrange(7):
        case 0:
            messages[at].edge = rng.randbytes(rng.choice((0, 1, 15, 16, 17, 10_000)))
        case 1:
            messages[at].edge = rng.choice(messages).edge
        case 2:
            disorder(rng, messages, pb.PushRequest(edge=messages[at].edge, request=pb.InferRequest(more=pb.More())))
        case 3:  # the stream ends, often in the middle of a payload
            del messages[at:]
        case 4:  # what only a client may say
            other = rng.choice([m for m in valid(rng, b"\0" * 32, "none") if m.WhichOneof("kind") != "step"])
            messages.insert(at, pb.PushRequest(edge=messages[at].edge, request=other))
        case _:
            disturb(rng, messages[at].request)


def disorder(rng: random.Random, messages: list[Any], more: Any) -> None:
    """Messages that are missing, repeated or in another order, or `more` where nothing goes on."""
    at = rng.randrange(len(messages))
    match rng.randrange(4):
        case 0:
            del messages[at]
        case 1:
            messages.insert(rng.randrange(len(messages)), messages[at])
        case 2:
            (more.request if isinstance(more, pb.PushRequest) else more).chunk = rng.randbytes(
                rng.choice((0, 10, 1000))
            )
            messages.insert(at, more)
        case _:
            rng.shuffle(messages)


def disturb(rng: random.Random, message: Any) -> None:
    """Changes one field somewhere in `message`, to a value that its type allows."""
    kind = message.WhichOneof("kind")
    part = getattr(message, kind)
    if kind in ("open", "route"):
        field = rng.choice([f for f in part.DESCRIPTOR.fields if f.name != "fingerprint" or rng.random() < 0.3])
        _set(rng, part, field)
    elif kind == "step":
        match rng.randrange(6):
            case 0:
                _disturb_payload(rng, message)
            case 1:
                _disturb_ops(rng, part)
            case 2 | 3:
                tensor = rng.choice(part.tensors)
                _set(rng, tensor, rng.choice(tensor.DESCRIPTOR.fields))
            case 4:
                _disturb_tensors(rng, message)
            case _:
                _set(rng, part, rng.choice([f for f in part.DESCRIPTOR.fields if not f.message_type]))
    else:
        message.chunk = rng.randbytes(100)


LARGE = (0, 1, 2, 3, 5, 7, 63, 64, 65, 255, 4096, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = ("", "none", "int8", "blockwise8", "fp16", "float32", "bfloat16", "int64", "bool", "float8_e4m3fn", "hidden",
         "attention_mask", "position_ids", "per_layer_inputs", "x" * 64, "x" * 5000, "\0", "é\n\x1b[31m")  # fmt: skip


def _number(rng: random.Random, bits: int) -> int:
    if rng.random() < 0.7:
        return rng.choice(LARGE)
    largest: int = 2**bits - 1
    return rng.choice((2**63 - 1, 2**63, largest, rng.getrandbits(rng.randint(1, 64)))) & largest


def _set(rng: random.Random, message: Any, field: Any) -> None:
    match field.type:
        case field.TYPE_BYTES:
            value: Any = rng.randbytes(rng.choice((0, 1, 15, 16, 17, 10_000)))
        case field.TYPE_STRING:
            value = rng.choice(WORDS)
        case field.TYPE_BOOL:
            value = not getattr(message, field.name)
        case field.TYPE_UINT64:
            value = _number(rng, 64)
        case _:
            value = _number(rng, 32)
    if field.name == "shape":
        shape = list(message.shape)
        match rng.randrange(4):
            case 0 if shape:
                shape[rng.randrange(len(shape))] = value
            case 1:
                shape.insert(rng.randrange(len(shape) + 1), rng.choice((0, 1, value)))
            case 2 if shape:
                del shape[rng.randrange(len(shape))]
            case _:
                rng.shuffle(shape)
        message.shape[:] = shape
    else:
        setattr(message, field.name, value)


def _disturb_payload(rng: random.Random, message: Any) -> None:
    data = bytearray(message.chunk)
    match rng.randrange(5):
        case 0:
            data = bytearray(rng.randbytes(len(data)))  # NaN and infinity, scales of nothing
        case 1:
            data = data[: rng.randrange(len(data) + 1)]
        case 2:
            data += rng.randbytes(rng.choice((1, 100, 10_000)))
        case 3:
            data = bytearray(b"\xff" * len(data))
        case _:
            data = bytearray(CHUNK_BYTES + rng.choice((0, 1)))
    message.chunk = bytes(data)
    if rng.random() < 0.5:
        message.step.payload_bytes = len(data)


def _disturb_ops(rng: random.Random, step: Any) -> None:
    kinds = ("crop", "reorder", "repeat", "select", "reset", "record_past", "drop", "")
    for _ in range(rng.choice((1, 1, 2, 33, 200))):
        count = rng.choice((0, 1, 1, 1, 2, 3, 1024, 5000))
        step.ops.add(kind=rng.choice(kinds), values=[_number(rng, 32) for _ in range(count)])
    if rng.random() < 0.2:
        step.ops.add(kind="repeat", values=[rng.choice((2, 1000, 2**24, 2**32 - 1))])


def _disturb_tensors(rng: random.Random, message: Any) -> None:
    """Tensors that are too many, repeated, missing, or that fit no other; sizes and payload agree."""
    step = message.step
    match rng.randrange(4):
        case 0:
            for _ in range(rng.choice((1, 3, 600))):
                step.tensors.add(name="hidden", codec="none", dtype="float32", shape=[1, 0, WIDTH])
        case 1:
            part = rng.choice(step.tensors)
            step.tensors.add().CopyFrom(part)
            message.chunk += bytes(min(part.nbytes, CHUNK_BYTES))
        case 2:
            dtype, size = rng.choice((("bool", 1), ("int64", 8), ("float32", 4), ("uint8", 1)))
            shape = [rng.choice((0, 1, 2, 3, 7)) for _ in range(rng.randint(0, 4))]
            count = torch.Size(shape).numel()
            name = rng.choice((ATTENTION_MASK, POSITION_IDS, HIDDEN, "per_layer_inputs"))
            step.tensors.add(name=name, codec="none", dtype=dtype, shape=shape, nbytes=count * size)
            message.chunk += rng.randbytes(count * size)
        case _:
            rows, tokens = rng.choice(((1, 1), (1, 5), (4, 2), (1000, 1), (1, LARGEST_STEP)))
            data = codec("none").encode(torch.randn(rows, tokens, WIDTH))
            del step.tensors[:]
            step.tensors.add(name=HIDDEN, codec="none", dtype="float32", shape=[rows, tokens, WIDTH], nbytes=len(data))
            message.chunk = data
    step.payload_bytes = len(message.chunk)
