"""Dialling back: a peer asks others whether they reach it, and does the same for them.

The only host that is dialled is the one from which the request comes, over an established connection, so that its
address is not made up; and seldom, so that nobody can have others scan or flood. What the caller learns is only where
its own certificate answered.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import grpc
import grpc.aio

from dht.record import MAX_CERTIFICATE_BYTES, PeerRecord
from peer.reach.quota import Quota
from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.channel import connected, open_channel
from protocol.errors import BadMessage, PeerFull, Unseen
from protocol.hosts import address, block, host_of, seen_end
from protocol.limits import MESSAGE_BYTES, WIRE_VERSION
from protocol.messages import check_version

DIAL_TIMEOUT_S = 3.0
ASK_TIMEOUT_S = 8.0  # connecting, and the other side's dialling
MAX_PORTS = 4
AT_ONCE = 8
PER_BLOCK, OVERALL, WINDOW_S = 12, 120, 60.0


class DialBacks:
    """Dials callers back.

    Args:
        clock: monotonic seconds.

    Attributes:
        is_relayed: does a connection from this IP address and port come through a relay, and so from this very machine?
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.is_relayed: Callable[[tuple[str, int]], bool] = lambda _: False
        self._quota = Quota(PER_BLOCK, OVERALL, WINDOW_S)
        self._clock = clock
        self._dialling = 0

    async def answer(self, request: pb.DialBackRequest, connection: str) -> pb.DialBackReply:
        """Which of the ports lead to the holder of the certificate.

        Args:
            connection: from where the request came, as grpc names it.

        Raises:
            WireError: the request is malformed.
            PeerFull: it comes too often, or too much is being dialled.
            Unseen: this peer does not see where it comes from.
        """
        check_version(request.wire_version)
        ports = list(dict.fromkeys(request.ports))
        if not 1 <= len(ports) <= MAX_PORTS or not all(1 <= port <= 65535 for port in ports):
            raise BadMessage(f"1 to {MAX_PORTS} ports can be dialled back")
        if len(request.certificate) > MAX_CERTIFICATE_BYTES:
            raise BadMessage("the certificate is too large")
        end = seen_end(connection)
        if end is None or self.is_relayed(end):
            raise Unseen("this peer does not see where you are; ask one that you reach without a relay")
        host = end[0]
        wait_s = self._quota.admit(block(host), self._clock())
        if wait_s or self._dialling >= AT_ONCE:
            raise PeerFull("this peer has dialled back as often as it does", retry_after_s=wait_s or DIAL_TIMEOUT_S)
        self._dialling += 1
        try:
            reached = await asyncio.gather(*(answers(address(host, port), request.certificate) for port in ports))
        finally:
            self._dialling -= 1
        return pb.DialBackReply(host=host, reached=[port for port, yes in zip(ports, reached, strict=True) if yes])


async def answers(at: str, certificate_der: bytes, timeout_s: float = DIAL_TIMEOUT_S) -> bool:
    """Does the holder of the certificate answer at that address?

    Raises:
        BadRecord: the certificate does not parse.
    """
    channel = open_channel(at, certificate_der, max_message_bytes=MESSAGE_BYTES)
    try:
        return await connected(channel, timeout_s)
    finally:
        await channel.close(None)


@dataclass(frozen=True, slots=True)
class Answer:
    """What another peer said.

    Attributes:
        block: of the addresses of the one that was asked.
        host: from which it saw us come.
        reached: the ports at which it reached us.
    """

    block: str
    host: str
    reached: frozenset[int]


@dataclass(frozen=True, slots=True)
class Helper:
    """A peer that can be asked, and the address at which to ask it: what it sees of us depends on that."""

    record: PeerRecord
    at: str

    @property
    def block(self) -> str:
        return block(host_of(self.at))


async def ask(helpers: Iterable[Helper], certificate_der: bytes, ports: Sequence[int]) -> list[Answer]:
    """What they say, those that say anything."""
    answered = await asyncio.gather(*(_ask(helper, certificate_der, ports) for helper in helpers))
    return [answer for answer in answered if answer is not None]


async def _ask(helper: Helper, certificate_der: bytes, ports: Sequence[int]) -> Answer | None:
    request = pb.DialBackRequest(wire_version=WIRE_VERSION, certificate=certificate_der, ports=ports)
    channel = open_channel(helper.at, helper.record.certificate_der, max_message_bytes=MESSAGE_BYTES)
    try:
        reply = await pb_grpc.PeerStub(channel).DialBack(request, timeout=ASK_TIMEOUT_S)  # type: ignore[no-untyped-call]
    except grpc.aio.AioRpcError:  # it is gone, full, older, or does not see us
        return None
    finally:
        await channel.close(None)
    if reply is None:  # grpc.aio's word for bytes that are no message
        return None
    return Answer(helper.block, reply.host, frozenset(reply.reached) & frozenset(ports))
