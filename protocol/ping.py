"""How a round-trip time is measured."""

from __future__ import annotations

import asyncio
import time

import grpc
import grpc.aio

from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc

PINGS = 2  # the faster one counts: the first of a connection takes longer


async def round_trip_ms(channel: grpc.aio.Channel, timeout_s: float) -> float | None:
    """Milliseconds that a small message needs to the peer and back, connecting not counted.

    Returns:
        None: there was no answer within `timeout_s`, connecting included, or the channel was closed meanwhile.
    """
    stub = pb_grpc.PeerStub(channel)  # type: ignore[no-untyped-call]  # generated
    times_s: list[float] = []
    try:
        async with asyncio.timeout(timeout_s):
            await channel.channel_ready()
            for _ in range(PINGS):
                started_s = time.perf_counter()
                await stub.Ping(pb.PingRequest())
                times_s.append(time.perf_counter() - started_s)
    except (TimeoutError, grpc.aio.AioRpcError, grpc.aio.UsageError):
        return None
    return min(times_s) * 1e3
