"""Strangers that say nonsense to a peer, all kinds at once, and what it answers them."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import grpc
import grpc.aio

from dht.record import PeerRecord
from peer.accounts import MOST_PAUSE_S
from protocol import potluck_pb2 as pb
from protocol.channel import open_channel
from protocol.limits import MESSAGE_BYTES
from tests.fuzz.nonsense import ill_formed, largest, largest_pushed, noise, pushed, sequence

RAW, TLS, BODIES, SEQUENCES, PUSHES, ASKED = 40, 20, 160, 150, 60, 20
ATTACKS = RAW + TLS + BODIES + SEQUENCES + PUSHES + ASKED  # of one round
CALL_S = MOST_PAUSE_S + 20.0  # whoever asks again and again is told "no" late
LISTEN_S = 0.02
AT_ONCE = 8
UNARY = ("/potluck.Peer/Describe", "/potluck.Peer/Ping", "/potluck.Peer/Progress")
INFER, PUSH, PROGRESS = "/potluck.Peer/Infer", "/potluck.Peer/Push", "/potluck.Peer/Progress"

EXPECTED = {
    "silence", "connection ended", "bytes back",  # to bytes on the socket
    "reply", "FAILED_PRECONDITION", "NOT_FOUND",  # of Ping, Describe and Progress
    "RESOURCE_EXHAUSTED",  # a message over the limit, which grpc itself refuses
    "opened", "result", "more", "receipt", "stream ended",
    "bad-message", "bad-payload", "implausible", "peer-full", "session-lost", "stale-epoch", "version-mismatch",
    "wrong-model",
    "peer-lost",  # to a step that skips others: those before it were lost on their way
    "push refused: bad-message", "push refused: peer-full", "push refused: session-lost", "push refused: stale-epoch",
}  # fmt: skip
"""What a peer may answer. No peer-fault: nothing ill-formed gets as far as the computation."""


async def one_round(rng: random.Random, record: PeerRecord) -> Counter[str]:
    """All kinds of nonsense, several at once. Returns what the peer said, counted."""
    host, port = record.addresses[0].rsplit(":", 1)
    channel = open_channel(record.addresses[0], record.certificate_der, max_message_bytes=4 * MESSAGE_BYTES)
    replies: Counter[str] = Counter()
    gate = asyncio.Semaphore(AT_ONCE)

    async def gated(attack: Coroutine[Any, Any, Sequence[str]]) -> None:
        async with gate:
            replies.update(await attack)

    attacks: list[Coroutine[Any, Any, Sequence[str]]] = []
    for secure in [False] * RAW + [True] * TLS:
        attacks.append(asyncio.to_thread(garbage, host, int(port), noise(rng), secure=secure))
    attacks += [bodies(channel, rng.choice((*UNARY, PUSH, INFER, INFER)), ill_formed(rng)) for _ in range(BODIES)]
    attacks += [infer(channel, sequence(rng, record)) for _ in range(SEQUENCES)]
    attacks += [push(channel, *pushed(rng, record)) for _ in range(PUSHES)]
    attacks += [ask(channel, rng.randbytes(rng.choice((0, 1, 15, 16, 16, 17, 5000)))) for _ in range(ASKED)]
    rng.shuffle(attacks)
    attacks[:0] = [infer(channel, largest(rng, record)), push(channel, *largest_pushed(rng, record))]
    try:
        async with asyncio.TaskGroup() as tasks:
            for attack in attacks:
                tasks.create_task(gated(attack))
    finally:
        await channel.close(None)
    return replies


def garbage(host: str, port: int, data: bytes, *, secure: bool) -> Sequence[str]:
    """Bytes straight to the port, under TLS or not. Blocks."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    with contextlib.ExitStack() as stack:
        try:
            connection = stack.enter_context(socket.create_connection((host, port), CALL_S))
            if secure:
                connection = stack.enter_context(context.wrap_socket(connection))
            connection.sendall(data)
            connection.settimeout(LISTEN_S)
            connection.recv(1 << 16)
        except TimeoutError:
            return ["silence"]
        except OSError:
            return ["connection ended"]
    return ["bytes back"]


async def bodies(channel: grpc.aio.Channel, method: str, sent: Sequence[bytes]) -> Sequence[str]:
    """Bodies to a method, as they are."""
    if method == PUSH:
        return await push(channel, (), sent)
    if method != INFER:
        try:
            await channel.unary_unary(method)(sent[0], timeout=CALL_S)
        except grpc.aio.AioRpcError as error:
            return [_status(error)]
        return ["reply"]
    return await infer(channel, sent)


async def infer(channel: grpc.aio.Channel, sent: Sequence[bytes]) -> Sequence[str]:
    """One stream of `Infer`. Returns the kinds of replies, failures by their code."""
    call: Any = channel.stream_stream(INFER)(timeout=CALL_S)
    listening = asyncio.create_task(replies_of(call))  # from the start: a refusal may end the stream under our hands
    await write(call, sent)
    return await listening


async def push(channel: grpc.aio.Channel, sessions: Sequence[Sequence[bytes]], sent: Sequence[bytes]) -> Sequence[str]:
    """One stream of `Push`, into `sessions` that their own streams of `Infer` open first. Returns what all of them
    were told."""
    calls, listening = [], []
    for opening in sessions:
        call: Any = channel.stream_stream(INFER)(timeout=CALL_S)
        calls.append(call)
        answered = asyncio.Event()
        listening.append(asyncio.create_task(replies_of(call, answered=answered)))
        await write(call, opening, is_all=False)
        await answered.wait()
    pushing: Any = channel.stream_stream(PUSH)(timeout=CALL_S)
    listening.append(asyncio.create_task(replies_of(pushing, named=refusal_of)))
    await write(pushing, sent)
    await asyncio.wait(listening[-1:])
    for call in calls:
        await write(call, ())
    return [*itertools.chain(*await asyncio.gather(*listening))]


async def ask(channel: grpc.aio.Channel, session_id: bytes) -> Sequence[str]:
    """`Progress` of a session that there is not."""
    return await bodies(channel, PROGRESS, [pb.ProgressRequest(session_id=session_id).SerializeToString()])


async def write(call: Any, sent: Iterable[bytes], *, is_all: bool = True) -> None:
    with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
        for body in sent:  # until the peer ends the stream; what it said is heard by who listens
            await call.write(body)
        if is_all:
            await call.done_writing()


def kind_of(body: bytes) -> str:
    reply = pb.InferReply.FromString(body)
    kind = reply.WhichOneof("kind")
    return checked(reply.failure) if kind == "failure" else str(kind)


def refusal_of(body: bytes) -> str:
    return "push refused: " + checked(pb.PushReply.FromString(body).failure)


def checked(failure: pb.Failure) -> str:
    assert failure.message and "Traceback" not in failure.message
    return failure.code


async def replies_of(
    call: Any, named: Callable[[bytes], str] = kind_of, answered: asyncio.Event | None = None
) -> Sequence[str]:
    """All that comes on a stream. `answered`: set as soon as anything came, or the stream ended."""
    heard: list[str] = []
    try:
        while (body := await call.read()) is not grpc.aio.EOF:
            heard.append(named(body))
            if answered is not None:
                answered.set()
    except grpc.aio.AioRpcError as error:
        if "SendMessageOperation" in (error.debug_error_string() or ""):
            heard.append("stream ended")  # by a refusal, while we wrote: grpc tells the one or the other
        else:
            heard.append(_status(error))
    finally:
        if answered is not None:
            answered.set()
    return heard


def _status(error: grpc.aio.AioRpcError) -> str:
    # The peer is there, whatever it gets, and says so in time.
    assert error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED), error
    return str(error.code().name)
