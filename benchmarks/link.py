"""An emulated wide-area link before a peer's port: so long on the way, so many bytes per second, in each direction.

Threads and blocking sockets, since an event loop's timers round to a millisecond. Bytes that are on the way travel
together, as on a real line; every connection has the rate for itself. What it hides is TCP's own behaviour: the two
ends each speak to this machine.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Iterator

CHUNK_BYTES = 1 << 14
CONNECT_S = 5.0


class Link:
    """Listens on a port of its own and carries what comes to `upstream_port`, and back. Made by `link`.

    Attributes:
        port: where it listens.
        delay_s: one way; may be changed at any time, for what arrives from then on.
        bytes_per_s: of each direction of each connection; None: as fast as it comes.
    """

    def __init__(self, upstream_port: int, delay_s: float = 0.0, bytes_per_s: float | None = None) -> None:
        self.delay_s = delay_s
        self.bytes_per_s = bytes_per_s
        self._upstream_port = upstream_port
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.port: int = self._listener.getsockname()[1]
        self._sides: list[socket.socket] = []
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Takes connections from now on."""
        self._spawn(self._accept)

    def close(self) -> None:
        """Ends all connections, and all threads."""
        for side in [self._listener, *self._sides]:
            with contextlib.suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)
        for thread in list(self._threads):
            thread.join()
        for side in [self._listener, *self._sides]:
            side.close()

    def _spawn(self, work: object, *args: object) -> None:
        thread = threading.Thread(target=work, args=args, name="link", daemon=True)  # type: ignore[arg-type]
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:  # closed
                return
            self._sides.append(near)
            try:
                far = socket.create_connection(("127.0.0.1", self._upstream_port), timeout=CONNECT_S)
            except OSError:  # nobody there
                near.shutdown(socket.SHUT_RDWR)
                continue
            far.settimeout(None)
            self._sides.append(far)
            for source, target in ((near, far), (far, near)):
                source.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                under_way: queue.SimpleQueue[tuple[float, bytes]] = queue.SimpleQueue()
                self._spawn(self._take, source, under_way)
                self._spawn(_give, under_way, target)

    def _take(self, source: socket.socket, under_way: queue.SimpleQueue[tuple[float, bytes]]) -> None:
        """Reads, and stamps each piece with the time at which it arrives at the other end."""
        free_s = 0.0  # when the line has sent what it was given
        data = b"-"
        while data:
            try:
                data = source.recv(CHUNK_BYTES)
            except OSError:
                data = b""
            free_s = max(free_s, time.monotonic())
            if self.bytes_per_s is not None:
                free_s += len(data) / self.bytes_per_s
            under_way.put((free_s + self.delay_s, data))


def _give(under_way: queue.SimpleQueue[tuple[float, bytes]], target: socket.socket) -> None:
    while True:
        due_s, data = under_way.get()
        time.sleep(max(0.0, due_s - time.monotonic()))
        try:
            if not data:
                target.shutdown(socket.SHUT_WR)
                return
            target.sendall(data)
        except OSError:  # the other side is gone; whoever sends to it hears it from `close` or from a peer
            return


@contextlib.contextmanager
def link(upstream_port: int) -> Iterator[Link]:
    """A link that neither delays nor limits yet. On exit its connections and threads have ended."""
    made = Link(upstream_port)
    made.start()
    try:
        yield made
    finally:
        made.close()
