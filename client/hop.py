"""One hop of a chain: a session on one peer, over one bidirectional stream."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable
from typing import Any, TypeVar

import grpc

from client.chain import Link
from client.inbox import Heard, Inbox
from client.inquest import Report
from client.ledger import Ledger
from client.spec import SessionSpec
from client.stream import Stream, translated
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.errors import BadMessage, PeerFault, PeerLost, PotluckError, SessionLost, WireError
from protocol.frames import Reply, ReplyAssembler, step_frames
from protocol.journal import Entry
from protocol.limits import EDGE_BYTES, MAX_COUNT, PAYLOAD_BYTES, SESSION_ID_BYTES
from protocol.messages import Close, Failure, Notice, Open, Opened, Progress, Route, Step, StepResult
from protocol.receipts import Receipt

CLOSE_TIMEOUT_S = 1.0
RECALL_TIMEOUT_S = 60.0  # all that a peer keeps of a session, over a slow line
RECALL_BYTES = 1 << 30

Failed = TypeVar("Failed", bound=PotluckError)


class Hop:
    """A session's stream to one peer. First its `opening` to `attach`, again after an error or for a new epoch; then
    `route` and `send`.

    What comes back goes to `inbox`. Every error is a `PotluckError` that names the peer.

    Args:
        secret: of the session; this hop's session id is derived from it, so that no peer knows another one's.
        inbox: of the session.

    Attributes:
        ledger: what the peer says of the steps that it computed.
    """

    def __init__(self, link: Link, channel: grpc.aio.Channel, secret: bytes, inbox: Inbox) -> None:
        self.link = link
        place = f"{link.peer.peer_id}:{link.span.start}".encode()
        self.session_id = hashlib.blake2b(place, key=secret, digest_size=SESSION_ID_BYTES).digest()
        self.edge = b""  # what the hop before shows this one; of the present epoch
        self.begun = False  # the peer holds the session, as far as is known
        self.leaving = False
        self.relayed = False  # the client carries this hop's outputs to the next one
        self.bytes_sent = 0
        self.bytes_received = 0
        self.ledger = Ledger(0)
        self._recalling: set[Any] = set()  # calls
        self._stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]  # generated
        self._inbox = inbox
        self._stream: Stream | None = None
        self._opened: asyncio.Future[Opened] | None = None

    def opening(self, spec: SessionSpec, epoch: int) -> Open:
        """The request to open the session there, or to take it up again; with a new token for the edge to this hop."""
        self.edge = secrets.token_bytes(EDGE_BYTES)
        return Open(
            self.session_id,
            epoch,
            spec.fingerprint,
            self.link.span,
            spec.codec,
            spec.batch,
            spec.max_tokens,
            resume=self.begun,
            stateless=spec.stateless,
            edge=self.edge,
        )

    async def attach(
        self, request: Open, timeout_s: float, patience_s: float, channel: Callable[[], grpc.aio.Channel] | None = None
    ) -> Opened:
        """Opens the session on the peer, or takes it up again: on the living stream, else on a new one.

        Args:
            channel: gives the one for a new stream; None: the hop's.
            timeout_s: for any answer.
            patience_s: for this answer, once the peer says that it is there: it may be at work on a step.

        Raises:
            PeerLost, PeerFull, PeerDraining, WrongModel, SessionLost, StaleEpoch, WireError.
        """
        living = self._stream
        if not request.resume:
            self.ledger = Ledger(request.epoch)
        if request.resume and living is not None and not living.outgoing.qsize():
            try:
                return await self._open(request, timeout_s, patience_s)
            except PeerLost:
                if not living.is_broken:
                    raise
        self.abandon()
        if channel is not None:  # the one before may have been a way that was found once, and has ended
            self._stub = pb_grpc.PeerStub(channel())  # type: ignore[no-untyped-call]
        self._stream = Stream(self._stub.Infer(), self)
        return await self._open(request, timeout_s, patience_s)

    async def _open(self, request: Open, timeout_s: float, patience_s: float) -> Opened:
        opened: asyncio.Future[Opened] = asyncio.get_running_loop().create_future()
        self._opened = opened
        try:
            self._put(request.to_proto())
            await asyncio.wait({opened}, timeout=timeout_s)
            if not opened.done() and not isinstance(await self.progress(timeout_s), PeerLost):
                await asyncio.wait({opened}, timeout=patience_s)
            if not opened.done():
                raise self.blamed(PeerLost(f"{self.name} did not open the session for {timeout_s:g} s"))
            state = opened.result()
        except asyncio.CancelledError:
            self.dismiss()  # or the peer would keep for a while what it may have opened
            raise
        except BaseException:
            self.abandon()
            raise
        finally:
            self._opened = None
            if opened.done():
                opened.exception()  # else asyncio would complain where an earlier error is raised
        self.begun = True
        return state

    def route(self, route: Route) -> None:
        """Tells the peer where outputs go.

        Raises:
            PeerLost: the stream is gone.
        """
        self._put(route.to_proto())

    def send(self, step: Step) -> None:
        """Sends a step, after whatever is being sent; should that fail, the inbox is told.

        Raises:
            PeerLost: the stream is gone.
        """
        for frame in step_frames(step):
            self._put(frame)

    async def progress(self, timeout_s: float) -> Report:
        """How far the session is there; a `PeerLost` if the peer does not say, a `SessionLost` if it knows nothing."""
        try:
            request = pb.ProgressRequest(session_id=self.session_id)
            reply = await self._stub.Progress(request, timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.NOT_FOUND:
                return SessionLost("the peer does not hold the session any more", peer_id=self.link.peer.peer_id)
            return self.silent()
        if reply is None:  # grpc.aio's word for bytes that are no message
            return PeerLost(f"{self.name} answers nonsense", peer_id=self.link.peer.peer_id)
        return Progress.from_proto(reply)

    async def recall(self, first_step: int = MAX_COUNT) -> list[Entry]:
        """The outputs that the peer keeps, of the steps from `first_step` on; and its receipt for what it did not sign
        yet goes into the ledger.

        Raises:
            SessionLost: they are no longer kept.
            PeerLost, PeerFault: it does not answer, or nonsense.
        """
        call = self._stub.Recall(
            pb.RecallRequest(session_id=self.session_id, first_step=first_step), timeout=RECALL_TIMEOUT_S
        )
        self._recalling.add(call)
        try:
            with translated():
                return await self._recalled(call)
        except (WireError, IndexError) as nonsense:
            raise self.blamed(PeerFault(f"{self.name} recalls nonsense: {nonsense}")) from nonsense
        except PotluckError as error:
            raise self.blamed(error) from None
        finally:
            self._recalling.discard(call)
            call.cancel()

    async def _recalled(self, call: Any) -> list[Entry]:
        assembler, kept, nbytes = ReplyAssembler(PAYLOAD_BYTES), list[Entry](), 0
        while (message := await call.read()) is not grpc.aio.EOF:
            if message is None:  # grpc.aio's word for bytes that are no message
                raise BadMessage("bytes that are no message")
            nbytes += message.ByteSize()
            if nbytes > RECALL_BYTES:
                raise BadMessage("more than a session can have")
            what = assembler.feed(message)
            if isinstance(what, Receipt):
                self._book(what)
            elif isinstance(what, StepResult):
                kept.append(Entry.of(what.step))
            elif isinstance(what, Failure):
                raise self.blamed(what.error)
        return kept

    def _book(self, receipt: Receipt) -> None:
        receipt.check(self.link.peer.peer_id, self.session_id)
        self.ledger.sign(receipt.lines)

    def silent(self) -> PeerLost:
        """The report of a peer that gives none."""
        return PeerLost(f"{self.name} does not answer", peer_id=self.link.peer.peer_id)

    @property
    def is_open(self) -> bool:
        """Is there a stream that has not ended?"""
        return self._stream is not None and not self._stream.has_ended

    @property
    def name(self) -> str:
        """How logs name this hop: the end of the peer's id, and the blocks."""
        return f"peer {self.link.peer.peer_id[-8:]} ({self.link.span})"

    def blamed(self, error: Failed) -> Failed:
        """The error, with this hop's peer to blame."""
        if error.peer_id is None:
            error.peer_id = self.link.peer.peer_id
        return error

    # ------------------------------------------------------------------ what comes and goes

    def _put(self, message: pb.InferRequest) -> None:
        if self._stream is None or self._stream.has_ended:
            raise self.blamed(PeerLost(f"the stream to {self.name} had ended"))
        self.bytes_sent += message.ByteSize()
        self._stream.outgoing.put_nowait(message)

    def hear(self, stream: Stream, what: Reply | PotluckError) -> None:
        """Something came on a stream, or it ended. Who waits for the session to open hears of failures first."""
        if stream is not self._stream:
            return
        if isinstance(what, Failure):
            what = what.error
        if isinstance(what, Receipt):
            try:
                self._book(what)
                return
            except PeerFault as forged:
                what = forged
        if isinstance(what, Notice) and what.state == "draining":
            self.leaving = True
        is_opening = self._opened is not None and not self._opened.done()
        if isinstance(what, PotluckError):
            self.blamed(what)
            if is_opening:
                assert self._opened is not None
                self._opened.set_exception(what)
                return
        elif isinstance(what, Opened):
            if is_opening:
                assert self._opened is not None
                self._opened.set_result(what)
            return
        self._inbox.hear(Heard(self, what))

    # ------------------------------------------------------------------ its end

    def abandon(self) -> None:
        """Drops the stream at once, and what is being recalled; the peer keeps the session for a while."""
        for call in list(self._recalling):
            call.cancel()
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.cancel()

    def dismiss(self) -> None:
        """The peer is to free the session, after whatever is being sent; nobody waits for it. A peer that cannot be
        told will reclaim it by itself."""
        stream, self._stream = self._stream, None
        if stream is not None:
            stream.outgoing.put_nowait(Close().to_proto())
            asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, stream.cancel)

    async def close(self) -> None:
        """As `dismiss`, and waits until it is done, for a second at most."""
        stream = self._stream
        self.dismiss()
        if stream is not None:
            await asyncio.wait({stream.reading}, timeout=CLOSE_TIMEOUT_S)
            stream.cancel()
