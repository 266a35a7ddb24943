"""`python -m tests.reach.throughput CERTIFICATE SECONDS ADDRESS...`: bytes per second that a peer echoes, by address.

`past:` before a relay's address: past that relay. Run in a network namespace by `test_nat`. Addresses take turns, so
that whatever else the machine does meets all alike.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization

from protocol import potluck_pb2 as pb
from protocol import potluck_pb2_grpc as pb_grpc
from protocol.bypass import find_bypass
from protocol.channel import open_channel
from protocol.limits import MESSAGE_BYTES
from protocol.loop import new_event_loop

PAYLOAD = bytes(range(256)) * 256  # 64 KiB, the most that a ping carries
PAST = "past:"
AT_ONCE = 16
TURNS = 3


async def bytes_per_s(address: str, certificate_der: bytes, seconds: float) -> float:
    bypass = await find_bypass([address.removeprefix(PAST)], certificate_der) if address.startswith(PAST) else None
    channel = open_channel(bypass.address if bypass else address, certificate_der, max_message_bytes=MESSAGE_BYTES)
    stub = pb_grpc.PeerStub(channel)
    echoed = 0

    async def pings(until_s: float) -> None:
        nonlocal echoed
        while time.monotonic() < until_s:
            reply = await stub.Ping(pb.PingRequest(payload=PAYLOAD))
            echoed += len(reply.payload)

    async def all_at_once(seconds: float) -> None:
        until_s = time.monotonic() + seconds
        await asyncio.gather(*(pings(until_s) for _ in range(AT_ONCE)))

    await all_at_once(seconds / 3)  # windows grow
    echoed, began_s = 0, time.monotonic()
    await all_at_once(seconds)
    speed = echoed / (time.monotonic() - began_s)
    await channel.close(None)
    return speed


async def main(certificate: str, seconds: str, *addresses: str) -> None:
    pem = Path(certificate).read_bytes()
    der = x509.load_pem_x509_certificate(pem[pem.index(b"-----BEGIN CERTIFICATE") :]).public_bytes(
        serialization.Encoding.DER
    )
    found: dict[str, list[float]] = {address: [] for address in addresses}
    for _ in range(TURNS):
        for address in addresses:
            found[address].append(await bytes_per_s(address, der, float(seconds)))
    print(json.dumps(found))


if __name__ == "__main__":
    with asyncio.Runner(loop_factory=new_event_loop) as runner:
        runner.run(main(*sys.argv[1:]))
