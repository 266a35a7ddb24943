"""A link: this peer's `Push` stream to one peer after it, shared by all sessions.

A next hop is a peer id, resolved through its verified record: nobody can make this peer dial an address (law 4). Where
it is reached through a relay, the stream goes over to a way without it (`protocol.bypass`), once there is one.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio

from dht.background import task_group
from dht.record import PeerRecord
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.bypass import Bypass, find_bypass
from protocol.channel import connected, has_failed, open_channel, peer_error, targets, why_unreachable
from protocol.errors import PeerLost, PotluckError
from protocol.frames import step_frames
from protocol.limits import MESSAGE_BYTES
from protocol.messages import Failure, Step

logger = logging.getLogger(__name__)

RESOLVE_TIMEOUT_S = 5.0  # to find a record that is not at hand; the client relays meanwhile, or gives the peer up
CONNECT_TIMEOUT_S = 1.0
RELAY_TIMEOUT_S = 1.0  # more, for a relay to have the next peer come
WRITE_TIMEOUT_S = 20.0  # one chunk, on a slow line; a line that is cut is noticed by the client, long before
UNREACHABLE = "the next peer cannot be reached from here"
IDLE_S = 300.0  # a stream that nobody pushed on for so long is closed
BYPASS_EVERY_S = 60.0  # between two attempts to do without a relay

Resolve = Callable[[str, PeerRecord | None], Awaitable[PeerRecord | None]]
"""Finds the record of a peer id; another one than the given one, which was of no use, if there is."""
Refused = Callable[[bytes, PotluckError, int], None]


@dataclass(slots=True, eq=False)
class Parcel:
    """A step on its way out. `written` is done when it was handed to the stream, or could not be."""

    edge: bytes
    step: Step
    written: asyncio.Future[None]

    def frames(self) -> Iterator[pb.PushRequest]:
        return (pb.PushRequest(edge=self.edge, request=frame) for frame in step_frames(self.step))

    def fail(self, error: BaseException) -> None:
        if not self.written.done():
            self.written.set_exception(error)


@dataclass(frozen=True, slots=True)
class _WayRound:
    """A connected channel past a relay."""

    channel: grpc.aio.Channel
    bypass: Bypass

    @property
    def is_ready(self) -> bool:
        return not self.bypass.is_over and self.channel.get_state() is grpc.ChannelConnectivity.READY

    async def close(self) -> None:
        await self.channel.close(None)
        self.bypass.close()


class Link:
    """The stream to one peer, connected when there is something to say."""

    def __init__(self, peer_id: str, resolve: Resolve, refused: Refused, *, direct: bool) -> None:
        self.parcels: asyncio.Queue[Parcel] = asyncio.Queue()
        self._peer_id = peer_id
        self._resolve = resolve
        self._refused = refused
        self._at_hand: Parcel | None = None
        self._was_reached = False
        self._meets = direct
        self._relayed: PeerRecord | None = None  # of the peer, if the stream goes through a relay
        self._sought_s = float("-inf")  # when a way round that was sought last
        self._way_round: _WayRound | None = None  # for the next stream
        self.ending = self._closing()  # what parcels hear that are left when the link has ended

    async def run(self) -> None:
        """Sends parcels until there have been none for a while, or the peer cannot be reached. A stream that breaks
        fails the parcel at hand, not the link."""
        try:
            await self._run()
        finally:
            await self._drop_way_round()

    async def _run(self) -> None:
        while await self._pick_up():
            self._was_reached = False
            try:
                async with self._connected() as call, task_group() as tasks:
                    hearing = tasks.create_task(self._hear(call))
                    seeking = tasks.create_task(self._seek())
                    try:
                        while self._at_hand is not None:
                            await self._write(call, self._at_hand)
                            self._at_hand = None  # a link may rest for long
                            if seeking.done() and seeking.result():
                                await self._end(call, hearing)
                                break
                            self._at_hand = await self._next_while(hearing)
                    finally:
                        hearing.cancel()
                        seeking.cancel()
            except PeerLost as error:
                # Without its traceback, which knows the parcel: no cycle is to keep both.
                self.ending = PeerLost(error.message, peer_id=self._peer_id)
                self._fail(self.ending)
            except Exception:  # whatever the next peer sends must not end this one
                logger.exception("the stream to peer %s failed", self._peer_id[-8:])
                self._fail(PeerLost("the stream to the next peer failed", peer_id=self._peer_id))
            finally:
                self._fail(self.ending)
            if not self._was_reached:
                return
            self.ending = self._closing()

    async def _seek(self) -> bool:
        """Seeks a way without a relay, where one is in the way. Is there one to go over to?"""
        record, now_s = self._relayed, time.monotonic()
        if record is None or not self._meets or now_s - self._sought_s < BYPASS_EVERY_S:
            return False
        self._sought_s = now_s
        async with contextlib.AsyncExitStack() as unused:
            try:
                bypass = await find_bypass(record.relays, record.certificate_der)
            except PeerLost as error:
                logger.debug("%s: %s", self._peer_id[-8:], error.message)
                return False
            unused.callback(bypass.close)
            channel = open_channel(bypass.address, record.certificate_der, max_message_bytes=MESSAGE_BYTES)
            unused.push_async_callback(channel.close, None)
            if not await connected(channel, CONNECT_TIMEOUT_S):
                return False
            unused.pop_all()
            self._way_round = _WayRound(channel, bypass)
        return True

    async def _drop_way_round(self) -> None:
        way_round, self._way_round = self._way_round, None
        if way_round is not None:
            await way_round.close()

    async def _end(self, call: Any, hearing: asyncio.Task[None]) -> None:
        """Ends a stream so that nothing of it arrives after what the next one brings."""
        with contextlib.suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError, TimeoutError):
            async with asyncio.timeout(WRITE_TIMEOUT_S):
                await call.done_writing()
                await asyncio.wait({hearing})

    def _closing(self) -> PeerLost:
        return PeerLost("this peer is closing its streams", peer_id=self._peer_id)

    async def _pick_up(self) -> bool:
        self._at_hand = await self._next()
        return self._at_hand is not None

    def _fail(self, error: PeerLost) -> None:
        parcel, self._at_hand = self._at_hand, None
        if parcel is not None:
            parcel.fail(error)

    async def _next(self) -> Parcel | None:
        try:
            async with asyncio.timeout(IDLE_S):
                return await self.parcels.get()
        except TimeoutError:
            return None

    async def _next_while(self, hearing: asyncio.Task[None]) -> Parcel | None:
        """The next parcel; None when the stream has ended, or was idle for long."""
        getting = asyncio.ensure_future(self._next())
        try:
            await asyncio.wait({getting, hearing}, return_when=asyncio.FIRST_COMPLETED)
            return getting.result() if getting.done() else None
        finally:
            getting.cancel()

    @contextlib.asynccontextmanager
    async def _connected(self) -> AsyncIterator[Any]:
        async with await self._channel() as channel:
            self._was_reached = True
            call = pb_grpc.PeerStub(channel).Push()  # type: ignore[no-untyped-call]  # generated
            try:
                yield call
            finally:
                call.cancel()

    async def _channel(self) -> grpc.aio.Channel:
        """A connected channel. A peer that came back may have another certificate by now: its record is read again."""
        self._relayed = None
        if self._way_round is not None and self._way_round.is_ready:
            way_round, self._way_round = self._way_round, None
            return way_round.channel  # with which the rest of it ends
        await self._drop_way_round()
        tried: PeerRecord | None = None
        why = ""
        while True:
            record = await self._record(tried)
            if record is None or not record.addresses:
                raise PeerLost("the next peer is not in the swarm's records", peer_id=self._peer_id)
            if record == tried:
                raise PeerLost(f"{UNREACHABLE}: {why}", peer_id=self._peer_id)
            for turn in range(len(targets(record.addresses))):
                channel = open_channel(
                    record.addresses, record.certificate_der, max_message_bytes=MESSAGE_BYTES, turn=turn
                )
                if await connected(channel, CONNECT_TIMEOUT_S + (RELAY_TIMEOUT_S if record.relayed else 0.0)):
                    self._relayed = record if record.relayed and not record.direct else None
                    return channel
                why = await why_unreachable(channel, CONNECT_TIMEOUT_S) if has_failed(channel) else "it does not answer"
                await channel.close(None)
            if tried is not None:
                raise PeerLost(f"{UNREACHABLE}: {why}", peer_id=self._peer_id)
            tried = record

    async def _record(self, useless: PeerRecord | None) -> PeerRecord | None:
        try:
            async with asyncio.timeout(RESOLVE_TIMEOUT_S):
                return await self._resolve(self._peer_id, useless)
        except TimeoutError:
            raise PeerLost(
                f"the swarm did not say within {RESOLVE_TIMEOUT_S:g} s where the next peer is", peer_id=self._peer_id
            ) from None

    async def _write(self, call: Any, parcel: Parcel) -> None:
        if parcel.written.done():  # rerouted while it waited
            return
        try:
            for frame in parcel.frames():
                async with asyncio.timeout(WRITE_TIMEOUT_S):
                    await call.write(frame)
        except TimeoutError:
            raise PeerLost(f"the next peer took no bytes for {WRITE_TIMEOUT_S:g} s", peer_id=self._peer_id) from None
        except grpc.aio.AioRpcError as error:
            raise PeerLost(peer_error(error).message, peer_id=self._peer_id) from error
        except asyncio.InvalidStateError:
            raise PeerLost("the stream to the next peer had ended", peer_id=self._peer_id) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise PeerLost("the stream to the next peer was cancelled", peer_id=self._peer_id) from None
        if not parcel.written.done():
            parcel.written.set_result(None)

    async def _hear(self, call: Any) -> None:
        """Refusals; returns when the stream has ended."""
        try:
            while (reply := await call.read()) is not grpc.aio.EOF:
                if reply is None:  # grpc.aio's word for bytes that are no message
                    raise PeerLost("the next peer answers nonsense", peer_id=self._peer_id)
                failure = Failure.from_proto(reply.failure)
                self._refused(reply.edge, failure.error, failure.step_id)
        except grpc.aio.AioRpcError as error:
            logger.debug("the stream to peer %s ended: %s", self._peer_id[-8:], error.details())
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
