"""The steps of `wan` once more over real TCP on long lines: packets between network namespaces, delayed on the way.

Every host (a client, three peers) is a namespace with a TUN device; packets between them go through this process,
which holds each for the delay and lets each host send so many bytes per second, with a queue of limited length.
Windows, acknowledgements and slow start are the kernel's own. Linux, root.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import select
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.arena import arena, prompt, spans
from benchmarks.models import SHAPES, folder_of
from benchmarks.result import Bar, Curve, Plot, Result, Table
from benchmarks.timing import Spread
from benchmarks.wan import BAR, BYTES_PER_S, HOPS, no_speculation

CLONE_NEWNET = 0x40000000
TUNSETIFF = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000
PACKET_BYTES = 1500
QUEUE_BYTES = 4 << 20
NETWORK = "10.77.0"
CONTROL = "reno"
END_S = 5.0

NOTES = """\
`{model}`, as in *Long lines*, but client and peers are network namespaces joined by TUN devices, so that every
connection is one TCP connection ({control}) over the whole distance; also the first token of a prompt of {tokens}
tokens.
"""


_libc = ctypes.CDLL(None, use_errno=True)


class Router:
    """Carries packets between TUN devices. `delay_s` is one way, for packets that come from then on."""

    def __init__(self, devices: dict[int, int]) -> None:
        self.delay_s = 0.0
        self.dropped = 0
        self._devices = devices  # the last byte of a host's address -> its device
        self._wake = os.pipe()
        self._thread = threading.Thread(target=self._run, name="router", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, closes the devices."""
        os.write(self._wake[1], b"x")
        self._thread.join(END_S)
        for descriptor in (*self._devices.values(), *self._wake):
            os.close(descriptor)

    def _run(self) -> None:
        under_way: list[tuple[float, int, int, bytes]] = []
        free_s = dict.fromkeys(self._devices.values(), 0.0)
        numbers = itertools.count()
        with select.epoll() as waiting:
            for descriptor in (*self._devices.values(), self._wake[0]):
                waiting.register(descriptor, select.EPOLLIN)
            while True:
                now_s = time.monotonic()
                while under_way and under_way[0][0] <= now_s:
                    _, _, target, packet = heapq.heappop(under_way)
                    with contextlib.suppress(BlockingIOError):  # a full device drops, as a full router does
                        os.write(target, packet)
                pause_s = under_way[0][0] - now_s if under_way else None
                if pause_s is not None and pause_s < 0.002:  # epoll counts in milliseconds
                    time.sleep(min(pause_s, 0.0002))
                    pause_s = 0.0
                for descriptor, _ in waiting.poll(pause_s):
                    if descriptor == self._wake[0]:
                        return
                    for packet in _packets(descriptor):
                        target = self._devices.get(packet[19]) if packet[0] >> 4 == 4 else None
                        if target is None:
                            continue
                        now_s = time.monotonic()
                        free_s[descriptor] = max(free_s[descriptor], now_s)
                        if (free_s[descriptor] - now_s) * BYTES_PER_S > QUEUE_BYTES:
                            self.dropped += 1
                            continue
                        free_s[descriptor] += len(packet) / BYTES_PER_S
                        due_s = free_s[descriptor] + self.delay_s
                        heapq.heappush(under_way, (due_s, next(numbers), target, packet))


def _packets(descriptor: int) -> Iterator[bytes]:
    """What has arrived."""
    with contextlib.suppress(BlockingIOError):
        while True:
            yield os.read(descriptor, PACKET_BYTES + 100)


def _device(namespace: str) -> int:
    """A TUN device in that namespace, made in a thread that enters it and never comes back."""
    made: list[int] = []

    def make() -> None:
        with Path("/run/netns", namespace).open("rb") as entrance:
            if _libc.setns(entrance.fileno(), CLONE_NEWNET):  # os.setns came with Python 3.12
                raise OSError(ctypes.get_errno(), f"cannot enter the network namespace {namespace}")
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        fcntl.ioctl(descriptor, TUNSETIFF, struct.pack("16sH22x", b"tun0", IFF_TUN | IFF_NO_PI))
        made.append(descriptor)

    with ThreadPoolExecutor(1) as executor:
        executor.submit(make).result()
    return made[0]


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextlib.contextmanager
def router(hosts: int, control: str) -> Iterator[tuple[Router, list[str]]]:
    """So many hosts, and what carries their packets; on exit neither is there any more.

    Args:
        control: TCP's congestion control.

    Yields:
        the router, and the hosts' namespaces; host i has the address `address(i)`.

    Raises:
        OSError, subprocess.CalledProcessError: this user or this kernel may not make them.
    """
    names = [f"potluck-{os.getpid()}-{i}" for i in range(hosts)]
    with contextlib.ExitStack() as stack:
        devices: dict[int, int] = {}
        for i, name in enumerate(names):
            _ip("netns", "add", name)
            stack.callback(_ip, "netns", "del", name)
            devices[i + 1] = _device(name)
            _ip("-n", name, "addr", "add", f"{address(i)}/24", "dev", "tun0")
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", "tun0", "mtu", str(PACKET_BYTES), "txqueuelen", "10000", "up")
            _ip("netns", "exec", name, "sysctl", "-qw", f"net.ipv4.tcp_congestion_control={control}")
        made = Router(devices)
        made.start()
        stack.callback(made.close)
        yield made, names


def address(i: int) -> str:
    """Of host i."""
    return f"{NETWORK}.{i + 1}"


def measure(quick: bool) -> Result:
    """See the module."""
    model, delays_ms, new, repeats = ("llama-tiny", (0, 5), 8, 1) if quick else ("llama-small", (0, 5, 25, 50), 16, 3)
    tokens, folder = (64 if quick else 512), str(folder_of(model))
    steps: dict[int, list[float]] = {ms: [] for ms in delays_ms}
    firsts_s: dict[int, list[float]] = {ms: [] for ms in delays_ms}
    with router(HOPS + 1, CONTROL) as (line, names), arena() as place:
        for i, span in enumerate(spans(SHAPES[model].layers, HOPS)):
            peer = place.start_peer(folder, span, host=address(i + 1), namespace=names[i + 1]).ready()
            place.maddr = place.maddr or peer.maddr
        clients = place.clients(1, namespace=names[0])
        place.joined(clients, folder, HOPS, **no_speculation())
        (client,) = clients
        client.generate(prompt(8), 4)
        for seed in range(repeats):
            for ms in delays_ms:
                line.delay_s = ms / 1e3
                steps[ms].append(client.generate(prompt(8, seed), new).ms_per_token)
                firsts_s[ms].append(client.generate(prompt(tokens, seed), 1).first_s)
    compute_ms = Spread.of(steps[0]).median
    bounds_ms = {ms: (HOPS + 1) * ms + compute_ms for ms in delays_ms}
    over = {ms: Spread.of(steps[ms]).median / bounds_ms[ms] for ms in delays_ms}
    bars = [
        Bar(f"step at {ms} ms over TCP, over (S + 1) x one-way + compute", over[ms], "at most", BAR)
        for ms in delays_ms
        if ms
    ]
    rows = [
        (
            str(ms),
            Spread.of(steps[ms]).show(".1f"),
            f"{bounds_ms[ms]:.1f}",
            f"{over[ms]:.2f}",
            Spread.of(firsts_s[ms]).show(),
        )
        for ms in delays_ms
    ]
    head = ("one-way, ms", "ms per token", "(S + 1) x one-way + compute", "over", f"first token of {tokens}, s")
    bound = {ms: [value] for ms, value in bounds_ms.items()}
    curves = [Curve.of("measured", steps), Curve.of("bound", bound)]
    plot = Plot("a step over 3 hops, TCP", "one-way, ms", "ms per token", curves)
    notes = NOTES.format(model=model, control=CONTROL, tokens=tokens)
    raw = {"ms": steps, "first_s": firsts_s, "dropped": line.dropped}
    return Result("tunnel", "Long lines with real TCP", notes, bars, [Table(head, rows)], [plot], raw)
