"""Connections that strangers open by the thousand, to say nonsense or next to nothing: a real peer holds them out.

A conversation goes on meanwhile. Afterwards the peer has as many descriptors open as before, and no more memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import secrets
import socket
import ssl
import struct
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from client.model import SwarmModelForCausalLM
from dht.record import PeerRecord
from protocol.channel import open_channel
from protocol.limits import HANDSHAKE_S, MESSAGE_BYTES
from protocol.potluck_pb2 import PingRequest
from protocol.potluck_pb2_grpc import PeerStub
from tests.e2e.support import answers_at_length, sessions_held, unsplit
from tests.fuzz.footprint import GROWTH_BYTES, SINCERE_MALLOC, descriptors, uss_bytes
from tests.fuzz.strangers import CALL_S
from tests.fuzz.test_surface import PROMPT, TURN, generated
from tests.processes import at_home, swarm, until
from tests.slicing.architectures import N_BLOCKS

SEED = int(os.environ.get("E2E_SEED", secrets.randbits(32)))
ROUNDS, PER_ROUND = 5, 2000
AT_ONCE = 64
LORISES = 500
LORIS_S = 0.5  # between two of its bytes
HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"  # the beginning of TLS
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
FRAMES = (
    b"\0\0\0\4\0\0\0\0\0",
    b"\0\0\4\3\0\0\0\0\1\0\0\0\1",
    b"\xff\xff\xff\x01\x05\0\0\0\1",
    b"\0\0\x05\x01\x04\0\0\0\1aaaaa",
)


@pytest.mark.slow
def test_ten_thousand_connections(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"E2E_SEED={SEED}")
    for name, value in SINCERE_MALLOC.items():
        monkeypatch.setenv(name, value)
    folder = checkpoint("llama")
    with (
        at_home(tmp_path),
        swarm(tmp_path, folder, [f"0:{N_BLOCKS}"], "--resume-s", "1", "--kv-tokens", "16384", anew=True) as peers,
        SwarmModelForCausalLM.from_pretrained(str(folder), join=peers.join, codec="none") as model,
    ):
        (peer,) = peers.peers
        (record,) = model.swarm.view.online(model.swarm.view.models[0].fingerprint)
        host, port = record.addresses[0].rsplit(":", 1)
        whole = unsplit(folder)
        for either in (model, whole):
            answers_at_length(either)
        expected = generated(whole, PROMPT, (ROUNDS + 2) * TURN)
        used: list[int] = []
        with model.session():
            said = generated(model, PROMPT, TURN)
            before = descriptors(peer.pid)
            for number in range(ROUNDS):
                started_s = time.monotonic()
                outcomes = flood(host, int(port), random.Random(f"{SEED} {number}"))
                took_s = time.monotonic() - started_s
                said = generated(model, said, TURN)  # the conversation goes on
                until(lambda: descriptors(peer.pid) <= before, "the peer to close what strangers opened")
                used.append(uss_bytes(peer.pid))
                print(f"round {number + 1}: {took_s:.0f} s, {used[-1] / 2**20:.1f} MiB", dict(sorted(outcomes.items())))
            with ThreadPoolExecutor(1) as thread:
                lorises = thread.submit(asyncio.run, slow_lorises(host, int(port)))
                until(lambda: descriptors(peer.pid) >= before + LORISES, "the slow lorises")
                most, kib_each = descriptors(peer.pid), (uss_bytes(peer.pid) - used[-1]) / LORISES / 1024
                started_s = time.monotonic()
                said = generated(model, said, TURN)
                took_s = time.monotonic() - started_s
                assert model.swarm.call(newcomer(record)) == b"hello"
                held_s = lorises.result()
            print(f"{most - before} lorises at once, {kib_each:.0f} KiB each, held for {held_s:.1f} s at most")
            print(f"{TURN} tokens took {took_s:.2f} s meanwhile")
            print(f"descriptors: {before} before, {descriptors(peer.pid)} after")
            until(lambda: descriptors(peer.pid) <= before, "the peer to close the slow lorises")
            assert torch.equal(said, expected)
        assert held_s < HANDSHAKE_S + 5.0
        until(lambda: sessions_held(model) == 0, "the peer to free all sessions")
        assert peer.is_alive
        assert "Traceback" not in peer.stderr
        sizes = [f"{size / 2**20:.1f} MiB" for size in used]
        assert used[-1] - used[1] <= GROWTH_BYTES, sizes
        until(lambda: uss_bytes(peer.pid) - used[1] <= GROWTH_BYTES, f"memory near that of round 2: {sizes}", 15.0)


async def newcomer(record: PeerRecord) -> bytes:
    """The answer to a call over a connection of its own."""
    async with open_channel(record.addresses[0], record.certificate_der, max_message_bytes=MESSAGE_BYTES) as channel:
        stub: Any = PeerStub(channel)  # type: ignore[no-untyped-call]  # generated
        reply = await stub.Ping(PingRequest(payload=b"hello"), timeout=CALL_S)
        return bytes(reply.payload)


def flood(host: str, port: int, rng: random.Random) -> Counter[str]:
    """One round of all kinds, several at once; all are closed at its end. What came of them, counted."""
    kinds = (_garbage, _half_a_hello, _http2_garbage, _nothing)
    seeds = [rng.getrandbits(64) for _ in range(PER_ROUND)]
    with ThreadPoolExecutor(AT_ONCE) as threads:
        calls = [threads.submit(_one, kinds[i % len(kinds)], host, port, seed) for i, seed in enumerate(seeds)]
        return Counter(call.result() for call in calls)


def _one(kind: Callable[[socket.socket, random.Random], str], host: str, port: int, seed: int) -> str:
    rng = random.Random(seed)
    try:
        with socket.create_connection((host, port), CALL_S) as connection:
            outcome = kind(connection, rng)
            if rng.random() < 0.3:  # ended with RST, not with FIN
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return outcome
    except OSError as error:
        return f"{kind.__name__.strip('_')}: {type(error).__name__}"


def _garbage(connection: socket.socket, rng: random.Random) -> str:
    connection.sendall(rng.randbytes(rng.choice((1, 20, 500, 20_000))))
    return _heard(connection)


def _half_a_hello(connection: socket.socket, rng: random.Random) -> str:
    connection.sendall(HELLO + rng.randbytes(rng.choice((0, 30, 300))))
    return "half a hello"


def _http2_garbage(connection: socket.socket, rng: random.Random) -> str:
    with _any_certificate().wrap_socket(connection) as secure:
        frames = b"".join(rng.choices(FRAMES, k=rng.randint(0, 20)))
        secure.sendall(PREFACE[: rng.choice((0, 5, 24, 24, 24))] + frames + rng.randbytes(rng.choice((0, 10, 3000))))
        return _heard(secure)


@cache
def _any_certificate() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    return context


def _nothing(connection: socket.socket, rng: random.Random) -> str:
    return "closed at once"


def _heard(connection: socket.socket) -> str:
    connection.settimeout(0.02)
    try:
        return "bytes back" if connection.recv(1 << 16) else "closed by the peer"
    except TimeoutError:
        return "silence"


async def slow_lorises(host: str, port: int) -> float:
    """Connections that say one byte now and then: half of them before TLS, the others within. Returns for how many
    seconds the last of them was held."""
    context, started_s = _any_certificate(), time.monotonic()

    async def one(number: int) -> float:
        secure = {"ssl": context, "server_hostname": "x"} if number % 2 else {}
        words = PREFACE + FRAMES[0] * 1000 if number % 2 else HELLO + bytes(1000)
        with contextlib.suppress(OSError):
            reader, writer = await asyncio.open_connection(host, port, **secure)  # type: ignore[arg-type]
            ended = asyncio.ensure_future(reader.read())
            try:
                for byte in words:
                    writer.write(bytes((byte,)))
                    await asyncio.wait({ended}, timeout=LORIS_S)
                    if ended.done():
                        break
            finally:
                ended.cancel()
                writer.close()
        return time.monotonic() - started_s

    return max(await asyncio.gather(*map(one, range(LORISES))))
