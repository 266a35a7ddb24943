"""Replies: what goes back to a client on its stream."""

from __future__ import annotations

import asyncio
from typing import Any

from peer.tally import Tally
from protocol import potluck_pb2 as pb
from protocol.errors import PotluckError
from protocol.messages import Failure

SEND_TIMEOUT_S = 20.0  # one message; whoever takes none for so long is not waited for


class ClientLeft(Exception):
    """The client's stream has ended; whatever was to be said to it is moot."""


class ReplyStream:
    """What goes back to the client of one `Infer`; replies of several messages are not mixed.

    Raises:
        ClientLeft: by every method: there is nobody any more to hear it.
    """

    def __init__(self, context: Any, tally: Tally) -> None:
        self._context = context
        self._tally = tally
        self._lock = asyncio.Lock()

    async def send(self, *replies: pb.InferReply) -> None:
        async with self._lock:
            for reply in replies:
                try:
                    async with asyncio.timeout(SEND_TIMEOUT_S):
                        await self._context.write(reply)
                except Exception as error:  # grpc.aio has many words for it, none of them public
                    raise ClientLeft(str(error)) from error

    async def fail(self, error: PotluckError, step_id: int = 0, *, fatal: bool = False) -> None:
        self._tally.refusals[error.code] += 1
        await self.send(Failure(error, step_id, fatal).to_proto())
