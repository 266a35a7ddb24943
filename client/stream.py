"""The stream to one peer: an `Infer` call, and how it says that it has ended."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc

from protocol import potluck_pb2 as pb
from protocol.channel import peer_error
from protocol.errors import BadMessage, PeerError, PeerFault, PeerFull, PeerLost, PotluckError, WireError
from protocol.frames import ReplyAssembler
from protocol.limits import PAYLOAD_BYTES

if TYPE_CHECKING:
    from client.hop import Hop

logger = logging.getLogger(__name__)


class Stream:
    """One `Infer` call. Writes what is put into `outgoing`, in order; tells its hop what comes, and how it ended.

    Args:
        call: a grpc.aio stream-stream call.
    """

    def __init__(self, call: Any, hop: Hop) -> None:
        self.outgoing: asyncio.Queue[pb.InferRequest] = asyncio.Queue()
        self.has_ended = False
        self.is_broken = False  # it has ended, and not because somebody here wanted it
        self._call = call
        self._hop = hop
        self.reading = asyncio.get_running_loop().create_task(self._read())
        self._writing = asyncio.get_running_loop().create_task(self._write())

    def cancel(self) -> None:
        """Ends the call at once."""
        self.has_ended = True
        self._call.cancel()
        self._writing.cancel()

    async def _write(self) -> None:
        try:
            while True:
                message = await self.outgoing.get()
                with translated():
                    await self._call.write(message)
        except PeerError as error:
            self._end(error)

    async def _read(self) -> None:
        assembler = ReplyAssembler(PAYLOAD_BYTES)
        error: PotluckError = PeerLost("the peer ended the session's stream")
        try:
            with translated():
                while (message := await self._call.read()) is not grpc.aio.EOF:
                    if message is None:
                        raise BadMessage("bytes that are no message")
                    self._hop.bytes_received += message.ByteSize()
                    if (reply := assembler.feed(message)) is not None:
                        self._hop.hear(self, reply)
        except WireError as nonsense:
            error = PeerLost(f"the peer sent nonsense: {nonsense}")
        except PeerError as lost:
            error = lost
        except Exception:  # whatever a peer sends must not leave this hop mute
            logger.exception("what %s sent could not be read", self._hop.name)
            error = PeerFault("the peer sent what cannot be read")
        finally:
            self._writing.cancel()
        self._end(error)

    def _end(self, error: PotluckError) -> None:
        if not self.has_ended:
            self.has_ended = self.is_broken = True
            self._call.cancel()
            self._hop.hear(self, error)


@contextmanager
def translated() -> Iterator[None]:
    """grpc.aio's many ways to say that a stream has ended, as errors of the tree."""
    try:
        yield
    except grpc.aio.AioRpcError as error:
        meaning = peer_error(error)
        if isinstance(meaning, PeerFull):
            raise meaning from error
        # What a peer has to say comes as a Failure. All else is the stream's end, a write to it included.
        raise PeerLost(meaning.message) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            raise
        # grpc.aio raises this also where only the call was cancelled, not the caller
        raise PeerLost("the stream was cancelled") from error
    except asyncio.InvalidStateError as error:  # grpc.aio's word for a write to a finished stream
        raise PeerLost("the stream had ended") from error
