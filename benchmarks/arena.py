"""Real peers and clients on this machine's loopback, as processes: started, asked, and ended whatever happens.

All of them share one temporary `POTLUCK_HOME`, so that a measurement neither meets nor disturbs another swarm. Each
leads a process group of its own, in which its p2pd runs too.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import psutil

from benchmarks.link import Link, link
from benchmarks.timing import Answer
from protocol.span import Span

READY_S = 120.0
END_S = 10.0
POLL_S = 0.01
START_TOGETHER_S = 0.3  # for an order to reach all that shall begin together


@dataclass(frozen=True, slots=True)
class Tuning:
    """How the processes share the cores; decided by `python -m benchmarks run threads`.

    Attributes:
        unsplit_threads: of the unsplit model's operations.
        peer_threads, client_threads, api_threads: of a peer's, of a client's head, and of that of many clients.
        client_passive: OpenMP's threads sleep between two operations instead of spinning, in clients.
        peer_passive, unsplit_passive: the same in peers, and in the unsplit model's process.
    """

    unsplit_threads: int = 2
    peer_threads: int = 2
    client_threads: int = 2
    api_threads: int = 1
    client_passive: bool = True
    peer_passive: bool = False
    unsplit_passive: bool = False


TUNING = Tuning()
CROWD = replace(TUNING, client_threads=1)
"""Where many clients share the cores, each with a head of its own."""


def shared_by(peers: int) -> Tuning:
    """Where so many peers work one after the other on the same cores: threads that spin in one of them, as they may on
    a machine of its own, would take the time of the next."""
    return replace(TUNING, peer_passive=peers > 1)


class MeasurementFailed(Exception):
    """A process of a measurement ended, or said nothing for too long; one sentence and what it wrote."""


class Process:
    """A `python -m ...` in its own process group."""

    def __init__(
        self,
        arena: Arena,
        threads: int,
        passive: bool,
        arguments: Sequence[str],
        *,
        talks: bool,
        namespace: str | None = None,
    ) -> None:
        self.name = " ".join(arguments[:3])
        self.started_s = time.monotonic()
        stem = arena.home / f"{next(arena.numbers):03}"
        self._out, self._err = stem.with_suffix(".out"), stem.with_suffix(".err")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("POTLUCK_", "OMP_", "GOMP_"))}
        kept |= {"POTLUCK_HOME": str(arena.home), "POTLUCK_LAN": "0", "HF_HUB_OFFLINE": "1"}
        kept |= {"OMP_NUM_THREADS": str(threads)} | ({"OMP_WAIT_POLICY": "PASSIVE"} if passive else {})
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self.popen = subprocess.Popen(
                [*(("ip", "netns", "exec", namespace) if namespace else ()), sys.executable, "-m", *arguments],
                stdin=subprocess.PIPE if talks else subprocess.DEVNULL,
                stdout=subprocess.PIPE if talks else out,
                stderr=err,
                env=kept,
                start_new_session=True,
                text=True,
            )
        self.pid = self.popen.pid
        arena.running.append(self)

    def says(self, pattern: str) -> re.Match[str]:
        """The first match in what it has written; waits for it.

        Raises:
            MeasurementFailed: it ended or was silent instead.
        """
        deadline_s = time.monotonic() + READY_S
        while True:
            ended = self.popen.poll() is not None  # asked first: what it wrote before is then all there
            if match := re.search(pattern, self._out.read_text(errors="replace"), re.MULTILINE):
                return match
            if ended or time.monotonic() > deadline_s:
                raise self.failed(f"did not say {pattern!r}")
            time.sleep(POLL_S)

    def failed(self, what: str) -> MeasurementFailed:
        """An error that shows what the process wrote."""
        return MeasurementFailed(f"{self.name} {what}:\n{self._err.read_text(errors='replace')[-3000:]}")

    def signal(self, number: signal.Signals) -> None:
        """To the whole group, p2pd too."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)

    def kill(self) -> None:
        """kill -9 to the group, and wait for the end."""
        self.signal(signal.SIGKILL)
        self.popen.wait(END_S)
        for pipe in (self.popen.stdin, self.popen.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):
                    pipe.close()

    def family(self) -> list[psutil.Process]:
        """The process and what it started."""
        own = psutil.Process(self.pid)
        return [own, *own.children(recursive=True)]


class Peer(Process):
    """A peer of the arena; `ready` waits until it serves. Between the start and that only `pid` is there."""

    peer_id: str
    maddr: str

    def ready(self) -> Peer:
        self.peer_id = self.says(r"^peer (\S+) serves")[1]
        self.maddr = self.says(r"^join (/\S+)$")[1]
        return self


class Subject(Process):
    """The other end of `benchmarks.subject`: a process that answers."""

    def order(self, kind: str, **what: Any) -> None:
        """Does not wait for the answer."""
        assert self.popen.stdin is not None
        self.popen.stdin.write(json.dumps({"do": kind, **what}) + "\n")
        self.popen.stdin.flush()

    def reply(self) -> dict[str, Any]:
        """The next thing that it says; an answer has `done`.

        Raises:
            MeasurementFailed: it ended.
        """
        stdout: IO[str] | None = self.popen.stdout
        assert stdout is not None
        line = stdout.readline()
        if not line:
            raise self.failed("ended")
        said: dict[str, Any] = json.loads(line)
        return said

    def do(self, kind: str, **what: Any) -> dict[str, Any]:
        """The answer to an order."""
        self.order(kind, **what)
        return self.reply()

    def ask(
        self,
        ids: Sequence[int],
        new: int,
        *,
        at_s: float | None = None,
        say_at: int | None = None,
        **options: Any,
    ) -> None:
        """For a greedy answer of `new` tokens; `options` go to `generate`. Does not wait."""
        self.order("generate", ids=list(ids), new=new, at_s=at_s, say_at=say_at, options=options)

    def stop(self) -> None:
        """The answer under way ends with its next token."""
        self.popen.send_signal(signal.SIGUSR1)

    def answer(self) -> Answer:
        """What was asked for."""
        return Answer.of(self.reply())

    def generate(self, ids: Sequence[int], new: int, **options: Any) -> Answer:
        """Asks and waits."""
        self.ask(ids, new, **options)
        return self.answer()


@dataclass(eq=False)
class Arena:
    """Where processes live. Made by `arena`.

    Attributes:
        links: before the peers that were started with `far`, in order.
    """

    home: Path
    tuning: Tuning
    stack: contextlib.ExitStack
    running: list[Process] = field(default_factory=list)
    links: list[Link] = field(default_factory=list)
    numbers: Iterator[int] = field(default_factory=itertools.count)
    maddr: str | None = None

    def start_peer(
        self,
        model: str,
        span: str,
        *options: str,
        far: bool = False,
        command: Sequence[str] = ("peer",),
        host: str = "127.0.0.1",
        namespace: str | None = None,
    ) -> Peer:
        """Another peer of the swarm, or its first. Does not wait for it.

        Args:
            far: others reach it through a link of its own.
            command: the module that is run, with arguments that come before `serve`.
            namespace: of the network, in which it runs and has the address `host`.
        """
        where = ["--host", host, "--no-lan"]
        if far:
            port = free_port()
            self.links.append(self.stack.enter_context(link(port)))
            where += ["--port", str(port), "--announce-port", str(self.links[-1].port)]
        joins = ["--new-swarm"] if self.maddr is None else ["--join", self.maddr]
        threads = self.tuning.peer_threads
        return Peer(
            self,
            threads,
            self.tuning.peer_passive,
            [
                *command,
                "serve",
                "--model",
                model,
                "--blocks",
                span,
                "--threads",
                str(threads),
                *where,
                *joins,
                *options,
            ],
            talks=False,
            namespace=namespace,
        )

    def peers(self, model: str, spans: Sequence[str], *options: str, **how: Any) -> list[Peer]:
        """One peer per span, all of them serving."""
        found = [self.start_peer(model, spans[0], *options, **how)]
        self.maddr = self.maddr or found[0].ready().maddr
        found += [self.start_peer(model, span, *options, **how) for span in spans[1:]]
        for peer in found:
            peer.ready()
        return found

    def bootstrap(self) -> None:
        """A node through which peers meet, whichever of them die."""
        node = Process(self, 1, True, ["dht", "bootstrap", "--host", "127.0.0.1", "--no-lan"], talks=False)
        self.maddr = node.says(r"^(?:join )?(/\S+/p2p/\S+)")[1]

    def unsplit(self, folder: str) -> Subject:
        """The reference: the whole model in a process of its own."""
        threads = self.tuning.unsplit_threads
        subject = Subject(self, threads, self.tuning.unsplit_passive, ["benchmarks.subject"], talks=True)
        subject.do("unsplit", folder=folder, threads=threads)
        return subject

    def clients(self, number: int, namespace: str | None = None) -> list[Subject]:
        """Processes that will be clients: see `joined`."""
        threads, passive = self.tuning.client_threads, self.tuning.client_passive
        return [
            Subject(self, threads, passive, ["benchmarks.subject"], talks=True, namespace=namespace)
            for _ in range(number)
        ]

    def joined(self, clients: Sequence[Subject], folder: str, peers: int, **settings: Any) -> None:
        """All of them join the swarm and see its peers. `settings` are those of `ClientConfig`."""
        threads = self.tuning.client_threads
        for subject in clients:
            subject.order("client", folder=folder, join=[self.maddr], threads=threads, peers=peers, settings=settings)
        for subject in clients:
            subject.reply()

    def client(self, folder: str, peers: int, **settings: Any) -> Subject:
        """One client, joined."""
        clients = self.clients(1)
        self.joined(clients, folder, peers, **settings)
        return clients[0]


def together(clients: Sequence[Subject], prompts: Sequence[Sequence[int]], new: int) -> list[Answer]:
    """Answers that were all asked for in the same moment."""
    at_s = time.monotonic() + START_TOGETHER_S
    for subject, ids in zip(clients, prompts, strict=True):
        subject.ask(ids, new, at_s=at_s)
    return [subject.answer() for subject in clients]


def prompt(tokens: int, seed: int = 0, vocabulary: int = 32_000) -> list[int]:
    """Random token ids."""
    import random

    return random.Random(f"prompt {seed}").choices(range(vocabulary), k=tokens)


def spans(n_blocks: int, peers: int) -> list[str]:
    """The blocks in nearly equal parts: spans(16, 3) is 0:6, 6:11, 11:16."""
    cuts = [-(-n_blocks * i // peers) for i in range(peers + 1)]
    return [str(Span(start, stop)) for start, stop in itertools.pairwise(cuts)]


def free_port() -> int:
    """A port that nobody listens at now."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
        return port


@contextlib.contextmanager
def arena(tuning: Tuning = TUNING) -> Iterator[Arena]:
    """A place for one swarm. On exit nothing of it runs any more."""
    with tempfile.TemporaryDirectory(prefix="potluck-bench-") as home, contextlib.ExitStack() as stack:
        made = Arena(Path(home), tuning, stack)
        try:
            yield made
        finally:
            for process in made.running:
                process.kill()
