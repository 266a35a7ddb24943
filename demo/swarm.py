"""A swarm on this machine: real processes on 127.0.0.1, and accidents. Prints nothing.

Everything lives in a temporary home (`POTLUCK_HOME`), so that the demo neither meets nor disturbs another swarm. Each
process leads a process group of its own, in which its p2pd runs too: to end the group is to leave nothing behind. A
watchman does that should this process itself be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import psutil

from protocol.span import Span

MODEL = "potluck-demo"

START_TIMEOUT_S = 90.0
"""For a process to say that it is ready; on a busy machine most of it goes into importing torch."""
LEAVE_TIMEOUT_S = 5.0
"""For a process to leave the swarm by itself; then it is killed."""
GONE_TIMEOUT_S = 3.0
"""For what its process left behind to be gone."""
LOOK_EVERY_S = 0.1

HOME_PREFIX = "potluck-demo-"
SETTINGS = """\
# The demo's swarm stays on this machine, and leaves room for its other processes.
[dht]
host = "127.0.0.1"
lan = false
[peer]
host = "127.0.0.1"
lan = false
threads = 1
"""
_BOOTSTRAP_READY = re.compile(r"(?P<maddr>/\S+/p2p/\S+)")
_PEER_READY = re.compile(r"peer (?P<id>\S+) serves blocks (?P<span>\d+:\d+) of ")

WATCHMAN = """\
import os, shutil, signal, sys
groups = [int(line) for line in sys.stdin]  # until the other end of the pipe is gone
for group in groups:
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""


class DemoFailed(Exception):
    """The demo did not go as it must; one sentence."""


@dataclass(frozen=True)
class Node:
    """A process of the swarm that said it is ready. `ready_s`: how long that took."""

    process: asyncio.subprocess.Process
    ready_s: float

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def runs(self) -> bool:
        return self.process.returncode is None


@dataclass(frozen=True)
class PeerNode(Node):
    """A peer that serves the blocks of `span`."""

    peer_id: str
    span: Span


class LocalSwarm:
    """The processes of one swarm. Made by `local_swarm`, which ends them too.

    Attributes:
        maddr: where others join; once the bootstrap node runs.
        peers: by peer id; also those that were killed.
    """

    def __init__(self, home: Path, model: str, watchman: IO[str]) -> None:
        self.home = home
        self.model = model
        self.maddr = ""
        self.peers: dict[str, PeerNode] = {}
        self._watchman = watchman
        self._processes: list[asyncio.subprocess.Process] = []
        self._numbers = itertools.count()

    async def start_bootstrap(self) -> Node:
        """Start the node through which the others meet.

        Raises:
            DemoFailed: it did not become ready.
        """
        node, said = await self._start("the bootstrap node", ("dht", "bootstrap"), _BOOTSTRAP_READY)
        self.maddr = said["maddr"]
        return node

    async def start_peer(self, span: Span) -> PeerNode:
        """Start a peer that serves the blocks of `span`.

        Raises:
            DemoFailed: it did not become ready.
        """
        model = () if self.model == MODEL else ("--model", self.model)
        command = ("peer", "serve", "--blocks", str(span), *model, "--join", self.maddr)
        node, said = await self._start(f"the peer of blocks {span}", command, _PEER_READY)
        peer = self.peers[said["id"]] = PeerNode(node.process, node.ready_s, said["id"], Span.parse(said["span"]))
        return peer

    async def _start(self, name: str, arguments: Collection[str], ready: re.Pattern[str]) -> tuple[Node, re.Match[str]]:
        """A process of `python -m <arguments>`, and the line by which it said that it is ready."""
        started_s = time.monotonic()
        log = self.home / f"process-{next(self._numbers)}.log"
        with _new_file(log) as stderr:
            process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", *arguments,
                stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        self._watchman.write(f"{process.pid}\n")
        self._watchman.flush()
        said = await _first_line(process, ready, name, log)
        return Node(process, time.monotonic() - started_s), said

    def kill(self, peer_id: str) -> PeerNode:
        """SIGKILL for one peer, by its process id: it cannot say goodbye. From any thread; does not wait.

        Raises:
            DemoFailed: it is none of this swarm's, or not running.
        """
        node = self.peers.get(peer_id)
        if node is None or not node.runs:
            raise DemoFailed(f"peer {peer_id} is no running process of this demo")
        os.kill(node.pid, signal.SIGKILL)
        return node

    def terminate_all(self) -> None:
        """SIGTERM for every process; a peer that hears it a second time ends at once."""
        for process in self._processes:
            if process.returncode is None:
                process.terminate()

    def kill_all(self) -> None:
        """SIGKILL for every process and its p2pd."""
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):  # the whole group has ended
                os.killpg(process.pid, signal.SIGKILL)

    async def stop(self) -> None:
        """Let the peers leave, then the bootstrap node; kill what does not; see that nothing is left.

        Raises:
            DemoFailed: a process survived.
        """
        bootstrap, peers = self._processes[:1], self._processes[1:]
        await _leave(peers)
        await _leave(bootstrap)
        if not await self._gone():  # a p2pd ends by itself soon after its process
            self.kill_all()
            if not await self._gone():
                left = ", ".join(map(str, _alive(self._groups)))
                raise DemoFailed(f"these processes of the demo are still running: {left}")

    async def _gone(self) -> bool:
        """Has every process of every group ended, after a while?"""
        try:
            async with asyncio.timeout(GONE_TIMEOUT_S):
                while _alive(self._groups):  # noqa: ASYNC110  # nothing tells of a process that is no child of ours
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            return False
        return True

    @property
    def _groups(self) -> frozenset[int]:
        return frozenset(process.pid for process in self._processes)


async def _leave(processes: Collection[asyncio.subprocess.Process]) -> None:
    """SIGTERM, and SIGKILL for those that do not end."""
    for process in processes:
        if process.returncode is None:
            process.terminate()
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(LEAVE_TIMEOUT_S):
            await asyncio.gather(*(process.wait() for process in processes))
    for process in processes:
        if process.returncode is None:
            process.kill()
    await asyncio.gather(*(process.wait() for process in processes))


@contextlib.asynccontextmanager
async def local_swarm(model: str = MODEL) -> AsyncIterator[LocalSwarm]:
    """An empty swarm in a new temporary home; all its processes end with the context, whatever happens.

    Raises:
        DemoFailed: a process could not be ended.
    """
    with (
        tempfile.TemporaryDirectory(prefix=HOME_PREFIX, ignore_cleanup_errors=True) as folder,
        _at_home(folder),
        _watchman(folder) as watchman,
    ):
        swarm = LocalSwarm(Path(folder), model, watchman)
        try:
            yield swarm
        finally:
            await swarm.stop()


@contextlib.contextmanager
def _at_home(folder: str) -> Iterator[None]:
    """This process, and those it starts, use `folder` and its settings; what the user set otherwise is put aside."""
    Path(folder, "config.toml").write_text(SETTINGS)
    own = {name: value for name, value in os.environ.items() if name.startswith("POTLUCK_")}
    for name in own:
        del os.environ[name]
    os.environ["POTLUCK_HOME"] = folder
    try:
        yield
    finally:
        del os.environ["POTLUCK_HOME"]
        os.environ.update(own)


@contextlib.contextmanager
def _watchman(folder: str) -> Iterator[IO[str]]:
    """A process that notices when this one is gone, however it went; the process groups to end are written to it."""
    command = [sys.executable, "-I", "-S", "-c", WATCHMAN, folder]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True,
        start_new_session=True,
    ) as process:  # fmt: skip
        assert process.stdin is not None
        try:
            yield process.stdin
        finally:
            process.kill()  # all is well: nothing is left to do


@contextlib.contextmanager
def _new_file(path: Path) -> Iterator[IO[bytes]]:
    with path.open("xb") as file:
        yield file


async def _first_line(
    process: asyncio.subprocess.Process, wanted: re.Pattern[str], name: str, log: Path
) -> re.Match[str]:
    """The first line of a process's output that begins as `wanted`."""
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while line := await process.stdout.readline():
                if match := wanted.match(line.decode(errors="replace")):
                    return match
    except TimeoutError:
        raise DemoFailed(f"{name} was not ready within {START_TIMEOUT_S:g} s; {_last_words(log)}") from None
    raise DemoFailed(f"{name} ended before it was ready; {_last_words(log)}")


def _last_words(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n")
    said = [line for line in lines if line.strip()]
    return f"its last words: {said[-1].strip()}" if said else "it said nothing"


def _alive(groups: Collection[int]) -> list[int]:
    """Processes of these process groups, zombies left out: nobody may be there to reap them."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) in groups and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def uneven_spans(model: str = MODEL) -> tuple[Span, ...]:
    """Three spans of unequal length that cover all blocks of a model once: 0:9, 9:15 and 15:24 of 24."""
    from slicing import resolve

    n_blocks = int(json.loads(resolve(model).file("config.json").read_text())["num_hidden_layers"])
    first, second = round(n_blocks * 3 / 8), round(n_blocks * 5 / 8)
    return (Span(0, first), Span(first, second), Span(second, n_blocks))
