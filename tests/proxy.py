"""A TCP proxy before a peer's port, with which tests cut, slow and count what goes through it.

`proxies()` is one thread with one event loop, in which any number of proxies run. A proxy's `Mode` may be changed at
any time and from any thread, for all of its connections or for those of given processes only: so a link between two
peers is cut which the client itself still has. Who owns a connection is read from /proc when it is accepted (Linux).

Nothing is lost in a black hole: what had arrived goes on once the proxy passes again, as after a real partition. One
difference to a real one remains: the kernel accepts connections and takes what fits into its buffers.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from protocol.loop import new_event_loop

CHUNK_BYTES = 1 << 16
TICK_S = 0.1  # between two pieces on a link of limited rate
START_S = 5.0


@dataclass(frozen=True, slots=True)
class Mode:
    """What becomes of what arrives, in both directions.

    Attributes:
        passes: False: nothing goes on, and no end either.
        resets: connections, present ones and new ones, are ended with RST on both sides.
        bytes_per_s: None: as fast as it comes.
        delay_s: before what arrived goes on.
    """

    name: str
    passes: bool = True
    resets: bool = False
    bytes_per_s: float | None = None
    delay_s: float = 0.0


PASS = Mode("pass")
BLACK_HOLE = Mode("black hole", passes=False)
RESET = Mode("reset", resets=True)
SLOW = Mode("slow", bytes_per_s=10_000, delay_s=0.1)
"""About 1 % of a link of 10 Mbit/s, with 100 ms each way."""
SLOW_LORIS = Mode("slow loris", bytes_per_s=1 / TICK_S)


@dataclass(slots=True)
class Traffic:
    """Bytes that arrived for the peer (`up`) and from it (`down`)."""

    up: int = 0
    down: int = 0


@dataclass(eq=False, slots=True)
class _Connection:
    owner: int | None
    near: socket.socket
    task: asyncio.Task[None]
    far: socket.socket | None = None

    def end_with_rst(self) -> None:
        for side in (self.near, self.far):
            if side is not None and side.fileno() >= 0:
                side.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.task.cancel()


@dataclass(eq=False, slots=True)
class _Trigger:
    up_bytes: int
    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class _Rule:
    mode: Mode = PASS
    owners: frozenset[int] | None = None

    def of(self, owner: int | None) -> Mode:
        return self.mode if self.owners is None or owner in self.owners else PASS


class Proxy:
    """One port on loopback, before another. Made by `Proxies.before`.

    Attributes:
        port: where the proxy listens.
        upstream_port: what it stands before; may be changed, for connections to come.
        traffic: by the process id of the connection's owner; None: not known, it had closed the connection already.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, listener: socket.socket, upstream_port: int) -> None:
        self.port: int = listener.getsockname()[1]
        self.upstream_port = upstream_port
        self.traffic: dict[int | None, Traffic] = {}
        self._loop = loop
        self._listener = listener
        self._rule = _Rule()
        self._changed = asyncio.Event()
        self._connections: set[_Connection] = set()
        self._triggers: list[_Trigger] = []

    # ------------------------------------------------------------------ from any thread

    @property
    def mode(self) -> Mode:
        return self._rule.mode

    def set(self, mode: Mode, owners: Collection[int] | None = None) -> None:
        """From now on; for all connections or for those that these processes opened, present and future ones."""
        self._rule = _Rule(mode, None if owners is None else frozenset(owners))
        self._loop.call_soon_threadsafe(self._wake)

    def when_up(self, up_bytes: int, call: Callable[[], object]) -> Callable[[], None]:
        """Calls once, in the proxy's thread, as soon as so many more bytes have arrived for the peer.

        Returns:
            what takes the request back.
        """
        trigger = _Trigger(self.total.up + up_bytes, call)
        self._triggers.append(trigger)

        def forget() -> None:
            with contextlib.suppress(ValueError):
                self._triggers.remove(trigger)

        return forget

    @property
    def total(self) -> Traffic:
        """Of all owners together, so far."""
        counts = list(self.traffic.values())
        return Traffic(sum(count.up for count in counts), sum(count.down for count in counts))

    @property
    def owners(self) -> list[int | None]:
        """Of the connections that are open now."""
        return [connection.owner for connection in list(self._connections)]

    # ------------------------------------------------------------------ in the loop

    async def _serve(self) -> None:
        async with asyncio.TaskGroup() as tasks:
            while True:
                near, address = await self._loop.sock_accept(self._listener)
                tasks.create_task(self._serve_one(near, address[1]))

    async def _serve_one(self, near: socket.socket, source_port: int) -> None:
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = asyncio.current_task()
        assert task is not None
        connection = _Connection(await asyncio.to_thread(owner_of, source_port, self.port), near, task)
        self._connections.add(connection)
        try:
            await self._until_it_passes(connection)
            if self._rule.of(connection.owner).resets:
                raise ConnectionResetError
            far = connection.far = socket.socket()
            far.setblocking(False)
            await self._loop.sock_connect(far, ("127.0.0.1", self.upstream_port))
            far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pump(connection, near, far, upwards=True))
                tasks.create_task(self._pump(connection, far, near, upwards=False))
        except* OSError:  # one side is gone: the other hears it in the same way
            connection.end_with_rst()
        finally:
            self._connections.discard(connection)
            near.close()
            if connection.far is not None:
                connection.far.close()

    async def _pump(
        self, connection: _Connection, source: socket.socket, target: socket.socket, *, upwards: bool
    ) -> None:
        """Carries one direction to its end, as the mode of the moment allows."""
        count = self.traffic.setdefault(connection.owner, Traffic())
        while data := await self._loop.sock_recv(source, CHUNK_BYTES):
            if upwards:
                count.up += len(data)
                self._pull_triggers()
            else:
                count.down += len(data)
            await self._carry(connection, data, target)
        await self._until_it_passes(connection)
        target.shutdown(socket.SHUT_WR)

    async def _carry(self, connection: _Connection, data: bytes, target: socket.socket) -> None:
        rest, waited = memoryview(data), False
        while rest:
            await self._until_it_passes(connection)
            mode = self._rule.of(connection.owner)
            if mode.delay_s and not waited:
                waited = True
                await self._pause(mode.delay_s)
                continue
            length = len(rest)
            if mode.bytes_per_s is not None:
                length = min(length, max(1, int(mode.bytes_per_s * TICK_S)))
                await self._pause(TICK_S)
                if not self._rule.of(connection.owner).passes:
                    continue
            await self._loop.sock_sendall(target, rest[:length])
            rest = rest[length:]

    async def _until_it_passes(self, connection: _Connection) -> None:
        while not self._rule.of(connection.owner).passes:
            await self._changed.wait()

    async def _pause(self, pause_s: float) -> None:
        """So long, or until the mode changes."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(pause_s):
                await self._changed.wait()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()
        for connection in self._connections:
            if self._rule.of(connection.owner).resets:
                connection.end_with_rst()

    def _pull_triggers(self) -> None:
        if not self._triggers:
            return
        up = self.total.up
        for trigger in [trigger for trigger in self._triggers if trigger.up_bytes <= up]:
            self._triggers.remove(trigger)
            trigger.call()


class Proxies:
    """The proxies of one thread. Made by `proxies`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._all: list[Proxy] = []
        self._added = asyncio.Event()

    def before(self, upstream_port: int) -> Proxy:
        """A new proxy before that port of this machine, which need not be open yet."""
        listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        listener.setblocking(False)
        made: Future[Proxy] = Future()
        self._loop.call_soon_threadsafe(lambda: made.set_result(self._add(listener, upstream_port)))
        return made.result(START_S)

    def _add(self, listener: socket.socket, upstream_port: int) -> Proxy:
        proxy = Proxy(self._loop, listener, upstream_port)
        self._all.append(proxy)
        self._added.set()
        return proxy

    async def _run(self) -> None:
        started = 0
        try:
            async with asyncio.TaskGroup() as tasks:
                while True:
                    await self._added.wait()
                    self._added.clear()
                    for proxy in self._all[started:]:
                        tasks.create_task(proxy._serve())
                    started = len(self._all)
        finally:
            for proxy in self._all:
                proxy._listener.close()


@contextlib.contextmanager
def proxies() -> Iterator[Proxies]:
    """A place for proxies. On exit all their connections and the thread have ended.

    Raises:
        ExceptionGroup: a proxy or a trigger failed.
    """
    ready: Future[tuple[Proxies, asyncio.Task[None]]] = Future()

    async def main() -> None:
        made = Proxies(asyncio.get_running_loop())
        task = asyncio.ensure_future(made._run())
        ready.set_result((made, task))
        with contextlib.suppress(asyncio.CancelledError):
            await task

    def run() -> None:
        with asyncio.Runner(loop_factory=new_event_loop) as runner:
            runner.run(main())

    with ThreadPoolExecutor(1, thread_name_prefix="proxies") as executor:
        ended = executor.submit(run)
        made, task = ready.result(START_S)
        try:
            yield made
        finally:
            with contextlib.suppress(RuntimeError):  # its loop has ended already: by an error, which is raised below
                made._loop.call_soon_threadsafe(task.cancel)
            ended.result()


def owner_of(source_port: int, target_port: int) -> int | None:
    """The process that opened the TCP connection between these two ports of this machine; None: it is gone."""
    inode = _inode_of(source_port, target_port)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and wanted in _open_files(folder / "fd"):
            return int(folder.name)
    return None


def _inode_of(source_port: int, target_port: int) -> int | None:
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):  # gRPC reaches IPv4 addresses through IPv6 sockets
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if _port(fields[1]) == source_port and _port(fields[2]) == target_port:
                return int(fields[9]) or None  # 0: closed, and only waiting
    return None


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _open_files(folder: Path) -> Iterator[str]:
    try:
        for link in folder.iterdir():
            with contextlib.suppress(OSError):  # closed meanwhile
                yield str(link.readlink())
    except OSError:  # the process has ended, or is another user's
        return
