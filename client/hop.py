"""One hop of a chain: a session on one peer, over one bidirectional stream."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from client.chain import Link
from client.inquest import Report
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import peer_error
from protocol.errors import BadMessage, PeerError, PeerFull, PeerLost, PotluckError, SessionLost, WireError
from protocol.frames import Reply, ReplyAssembler, step_frames
from protocol.limits import PAYLOAD_BYTES, SESSION_ID_BYTES
from protocol.messages import Close, Failure, Notice, Open, Opened, Progress, Route, Step, StepResult

CLOSE_TIMEOUT_S = 1.0
SMALL_WRITE_TIMEOUT_S = 1.0  # for a message that fits any buffer


@dataclass(frozen=True, slots=True)
class Heard:
    """What came from a hop, beside the answer to `attach`."""

    hop: Hop
    what: StepResult | Notice | PotluckError


class Hop:
    """A session's stream to one peer. `attach` first, again after an error or for a new epoch; then `route` and `send`.

    What comes back goes to `inbox`. Every error is a `PotluckError` that names the peer.

    Args:
        secret: of the session; this hop's session id is derived from it, so that no peer knows another one's.
        inbox: of the session.
    """

    def __init__(self, link: Link, channel: grpc.aio.Channel, secret: bytes, inbox: asyncio.Queue[Heard]) -> None:
        self.link = link
        place = f"{link.peer.peer_id}:{link.span.start}".encode()
        self.session_id = hashlib.blake2b(place, key=secret, digest_size=SESSION_ID_BYTES).digest()
        self.edge = b""  # what the hop before shows this one; of the present epoch
        self.begun = False  # the peer holds the session, as far as is known
        self.leaving = False
        self.relayed = False  # the client carries this hop's outputs to the next one
        self._stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]  # generated
        self._inbox = inbox
        self._call: Any = None
        self._reading: asyncio.Task[None] | None = None
        self._sending: asyncio.Task[None] | None = None
        self._opened: asyncio.Future[Opened] | None = None
        self.bytes_sent = 0
        self.bytes_received = 0

    async def attach(self, request: Open, timeout_s: float, busy_timeout_s: float) -> Opened:
        """Opens the session on the peer, or takes it up again: on the living stream, else on a new one.

        Args:
            timeout_s: for an answer.
            busy_timeout_s: for an answer of a peer that is still at work on a step of this session.

        Raises:
            PeerLost, PeerFull, PeerDraining, WrongModel, SessionLost, StaleEpoch, WireError.
        """
        state: Opened | None
        if self._call is not None and request.resume:
            try:
                state = await self._open(request, timeout_s, busy_timeout_s)
            except PeerLost:
                return await self.attach(request, timeout_s, busy_timeout_s)  # the stream had ended: on a new one
        else:
            self.abandon()
            self._call = self._stub.Infer()
            self._reading = asyncio.get_running_loop().create_task(self._read(self._call))
            state = await self._open(request, timeout_s, busy_timeout_s)
        if state is None:
            self.abandon()
            raise self._blame(PeerLost(f"{self.name} did not open the session for {timeout_s:g} s"))
        self.begun = True
        return state

    async def _open(self, request: Open, timeout_s: float, busy_timeout_s: float) -> Opened | None:
        """The peer's answer; None if it is silent. After an error there is no stream."""
        opened: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._opened = opened
        try:
            await self._write(request.to_proto(), timeout_s)
            await asyncio.wait({opened}, timeout=timeout_s)
            if not opened.done() and request.resume and isinstance(await self.progress(timeout_s), Progress):
                await asyncio.wait({opened}, timeout=busy_timeout_s)
            return opened.result() if opened.done() else None
        except BaseException:
            self.abandon()
            raise
        finally:
            self._opened = None
            if opened.done():
                opened.exception()  # else asyncio would complain where an earlier error is raised

    async def route(self, route: Route) -> None:
        """Tells the peer where outputs go.

        Raises:
            PeerLost: it cannot be told.
        """
        await self._write(route.to_proto(), SMALL_WRITE_TIMEOUT_S)

    async def send(self, step: Step, timeout_s: float) -> None:
        """Sends a step; a long one goes on being sent when this returns, and fails through the inbox.

        Raises:
            PeerLost: the stream is gone, or an earlier step did not get through within `timeout_s`.
        """
        if self._sending is not None:
            await asyncio.wait({self._sending}, timeout=timeout_s)
            if not self._sending.done():
                raise self._blame(PeerLost(f"{self.name} took no more bytes for {timeout_s:g} s"))
        first, *more = step_frames(step)
        await self._write(first, timeout_s if more else SMALL_WRITE_TIMEOUT_S)
        self._sending = asyncio.get_running_loop().create_task(self._send(more, timeout_s)) if more else None

    async def _send(self, frames: list[pb.InferRequest], timeout_s: float) -> None:
        try:
            for frame in frames:
                await self._write(frame, timeout_s)
        except PeerError as error:
            self._inbox.put_nowait(Heard(self, error))

    async def progress(self, timeout_s: float) -> Report:
        """How far the session is there; a `PeerLost` if the peer does not say, a `SessionLost` if it knows nothing."""
        try:
            request = pb.ProgressRequest(session_id=self.session_id)
            reply = await self._stub.Progress(request, timeout=timeout_s)
            if reply is not None:
                return Progress.from_proto(reply)
            return PeerLost(f"{self.name} answers in nonsense", peer_id=self.link.peer.peer_id)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return SessionLost("the peer does not hold the session any more", peer_id=self.link.peer.peer_id)
            return PeerLost(f"{self.name} does not answer", peer_id=self.link.peer.peer_id)

    # ------------------------------------------------------------------ the stream

    async def _write(self, message: pb.InferRequest, timeout_s: float) -> None:
        if self._call is None:
            raise self._blame(PeerLost(f"the stream to {self.name} had ended"))
        self.bytes_sent += message.ByteSize()
        with self._translated(timeout_s):
            async with asyncio.timeout(timeout_s):
                await self._call.write(message)

    async def _read(self, call: Any) -> None:
        assembler = ReplyAssembler(PAYLOAD_BYTES)
        error: PotluckError = PeerLost("the peer ended the session's stream")
        try:
            with self._translated(None):
                while (message := await call.read()) is not grpc.aio.EOF:
                    if message is None:  # grpc's word for bytes that are no message
                        raise BadMessage("bytes that are no message")
                    self.bytes_received += message.ByteSize()
                    if (reply := assembler.feed(message)) is not None:
                        self._hear(call, reply)
        except WireError as nonsense:
            error = PeerLost(f"the peer sent nonsense: {nonsense}")
        except PeerError as lost:
            error = lost
        self._tell(call, self._blame(error))

    def _hear(self, call: Any, reply: Reply) -> None:
        if isinstance(reply, Failure):
            self._tell(call, self._blame(reply.error))
        elif isinstance(reply, Opened):
            if self._opened is not None and not self._opened.done():
                self._opened.set_result(reply)
        else:
            if isinstance(reply, Notice) and reply.state == "draining":
                self.leaving = True
            self._tell(call, reply)

    def _tell(self, call: Any, what: StepResult | Notice | PotluckError) -> None:
        """The session hears what came on the present stream; who waits for it to open hears of failures first."""
        if call is not self._call:
            return
        if isinstance(what, PotluckError) and self._opened is not None and not self._opened.done():
            self._opened.set_exception(what)
        else:
            self._inbox.put_nowait(Heard(self, what))

    @contextmanager
    def _translated(self, timeout_s: float | None) -> Iterator[None]:
        """grpc.aio's many ways to say that a stream has ended, as errors of the tree."""
        try:
            yield
        except TimeoutError as error:
            raise self._blame(PeerLost(f"{self.name} took no bytes for {timeout_s:g} s")) from error
        except grpc.aio.AioRpcError as error:
            meaning = peer_error(error)
            if not isinstance(meaning, PeerFull):
                # What a peer has to say comes as a Failure. All else is the stream's end, a write to it included.
                meaning = PeerLost(meaning.message)
            raise self._blame(meaning) from error
        except asyncio.CancelledError as error:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            # grpc.aio raises this also where only the call was cancelled, not the caller
            raise self._blame(PeerLost(f"the stream to {self.name} was cancelled")) from error
        except asyncio.InvalidStateError as error:  # grpc.aio's word for a write to a finished stream
            raise self._blame(PeerLost(f"the stream to {self.name} had ended")) from error

    def _blame(self, error: PotluckError) -> PotluckError:
        if error.peer_id is None:
            error.peer_id = self.link.peer.peer_id
        return error

    @property
    def name(self) -> str:
        """How logs name this hop: the end of the peer's id, and the blocks."""
        return f"peer {self.link.peer.peer_id[-8:]} ({self.link.span})"

    # ------------------------------------------------------------------ its end

    def abandon(self) -> None:
        """Drops the stream at once; the peer keeps the session for a while."""
        call, self._call = self._call, None
        if call is not None:
            call.cancel()
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None

    async def close(self) -> None:
        """Tells the peer to free the session; a peer that cannot be told will reclaim it by itself."""
        call, self._call = self._call, None
        if call is None:
            return
        if self._sending is not None:
            self._sending.cancel()
            self._sending = None
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await call.write(Close().to_proto())
                await call.done_writing()
                if self._reading is not None:
                    await asyncio.wait({self._reading})
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass
        finally:
            call.cancel()
