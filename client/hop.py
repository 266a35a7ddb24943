"""One hop of a chain: a session on one peer, over one bidirectional stream."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import grpc

from client.chain import Link
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import peer_error
from protocol.errors import PeerError, PeerFull, PeerLost, PotluckError, WireError
from protocol.frames import Reply, ReplyAssembler, step_frames
from protocol.limits import PAYLOAD_BYTES
from protocol.messages import Close, Failure, Notice, Open, Opened, Step, StepResult

Result = TypeVar("Result")

CLOSE_TIMEOUT_S = 1.0


class Hop:
    """A session's stream to one peer. `open` first, then `step`s, then `close`; after an error, `open` resumes.

    Every error raised is a `PotluckError` that names the peer.
    """

    def __init__(self, link: Link, channel: grpc.aio.Channel, *, open_timeout_s: float, step_timeout_s: float) -> None:
        self.link = link
        self._stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]  # generated
        self._open_timeout_s = open_timeout_s
        self._step_timeout_s = step_timeout_s
        self.next_step = 0  # the step id after the last one that the peer answered
        self._call: Any = None
        self._assembler = ReplyAssembler(PAYLOAD_BYTES)

    async def open(self, request: Open) -> Opened:
        """Opens the session on the peer, or resumes it on a new stream.

        Raises:
            PeerLost, PeerFull, PeerDraining, WrongModel, SessionLost, StaleEpoch, VersionMismatch.
        """
        self.abandon()
        self._call = self._stub.Infer()
        self._assembler = ReplyAssembler(PAYLOAD_BYTES)
        return await self._guarded(self._open(request), self._open_timeout_s, "did not open the session")

    async def _open(self, request: Open) -> Opened:
        await self._call.write(request.to_proto())
        reply = await self._reply()
        if not isinstance(reply, Opened):
            raise self._blame(PeerLost("the peer answered something else than asked"))
        return reply

    async def step(self, step: Step) -> StepResult:
        """Sends a step and waits for its result. A step that is sent again is not applied again (law 3).

        Raises:
            PeerLost, PeerFull, SessionLost, StaleEpoch, PeerFault: see the error tree.
            WireError: the peer refused the step as malformed.
        """
        return await self._guarded(self._step(step), self._step_timeout_s, "was silent")

    async def _step(self, step: Step) -> StepResult:
        for frame in step_frames(step):
            await self._call.write(frame)
        while True:
            reply = await self._reply()
            if isinstance(reply, StepResult) and reply.step_id == step.step_id:
                self.next_step = step.step_id + 1
                return reply
            if not isinstance(reply, (Notice, StepResult)):
                raise self._blame(PeerLost("the peer answered something else than asked"))

    async def _reply(self) -> Reply:
        while True:
            message = await self._call.read()
            if message is grpc.aio.EOF:
                raise self._blame(PeerLost("the peer ended the session's stream"))
            try:
                reply = self._assembler.feed(message)
            except WireError as error:
                raise self._blame(PeerLost(f"the peer sent nonsense: {error}")) from error
            if isinstance(reply, Failure):
                raise self._blame(reply.error)
            if reply is not None:
                return reply

    async def _guarded(self, work: Awaitable[Result], timeout_s: float, what: str) -> Result:
        try:
            async with asyncio.timeout(timeout_s):
                return await work
        except TimeoutError as error:
            self.abandon()
            raise self._blame(PeerLost(f"{self.name} {what} for {timeout_s:g} s")) from error
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
        if isinstance(error, PeerError) and error.peer_id is None:
            error.peer_id = self.link.peer.peer_id
        return error

    @property
    def name(self) -> str:
        """How logs name this hop: the end of the peer's id, and the blocks."""
        return f"peer {self.link.peer.peer_id[-8:]} ({self.link.span})"

    def abandon(self) -> None:
        """Drops the stream at once; the peer keeps the session for a while."""
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def close(self) -> None:
        """Tells the peer to free the session; a peer that cannot be told will reclaim it by itself."""
        call, self._call = self._call, None
        if call is None:
            return
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await call.write(Close().to_proto())
                await call.done_writing()
                while await call.read() is not grpc.aio.EOF:
                    pass
        except (TimeoutError, grpc.aio.AioRpcError, asyncio.InvalidStateError):
            call.cancel()
