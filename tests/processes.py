"""Potluck's commands as real processes, for end-to-end tests: started on loopback, watched, and ended whatever happens.

Everything of one test lives in one home folder. Child processes inherit `POTLUCK_HOME`, so that what a test left
running can be told from everything else on the machine: see `nothing_left_over`.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from client.swarm import Swarm
from tests.forks import Forked

Result = TypeVar("Result")

POLL_S = 0.02
START_S = 60.0  # a machine that does other things too may need long
END_S = 10.0
LOOPBACK = ("--host", "127.0.0.1", "--threads", "1")

running: list[Process] = []
"""Those not ended yet, for reports of failed tests."""

_numbers = itertools.count()
_forked: dict[Path, set[int]] = {}
"""The ids of processes that were forked, by home: what /proc shows of their environment is another's."""


def until(holds: Callable[[], Result], what: str, timeout_s: float = START_S) -> Result:
    """The first result of `holds` that is true; asks again and again.

    Raises:
        AssertionError: there was none in time.
    """
    deadline_s = time.monotonic() + timeout_s
    while not (result := holds()):
        if time.monotonic() >= deadline_s:
            raise AssertionError(f"waited {timeout_s:g} s in vain for {what}")
        time.sleep(POLL_S)
    return result


def variables(home: Path) -> dict[str, str]:
    """The variables that keep a process to this home, this machine and one thread."""
    return {
        "POTLUCK_HOME": str(home),
        "POTLUCK_LAN": "0",
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }


def environment(home: Path) -> dict[str, str]:
    """What a process of a test finds in its environment: nothing of the tester's Potluck."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")}
    return kept | variables(home)


@contextlib.contextmanager
def at_home(home: Path) -> Iterator[None]:
    """Within this context this process too, and what it starts, is at home there: for clients inside the test."""
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("POTLUCK_")]:
            patch.delenv(name)
        for name, value in variables(home).items():
            patch.setenv(name, value)
        yield


class Process:
    """One `python -m ...`; what it writes goes to files. As a context manager it is killed at the end.

    Args:
        arguments: `"peer", "serve", "--blocks", "0:3"`.
        has_input: can `write` to its standard input; else there is nothing to read.
        anew: is it a fresh interpreter? Else it is forked, which is faster: see `tests.forks`.
        through: a command that runs it, in its own process id, if it is a fresh one: `ip netns exec NAME`.
    """

    def __init__(
        self, home: Path, *arguments: str, has_input: bool = False, anew: bool = False, through: Sequence[str] = ()
    ) -> None:
        self.name = " ".join(arguments)
        self._home = home
        logs = home / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        stem = f"{next(_numbers):03}-{arguments[0]}"
        self._stdout, self._stderr = logs / f"{stem}.out", logs / f"{stem}.err"
        self._popen: subprocess.Popen[bytes] | Forked
        # The directory is not the checkout: an installed Potluck needs none.
        if anew:
            with self._stdout.open("wb") as stdout, self._stderr.open("wb") as stderr:
                self._popen = subprocess.Popen(
                    [*through, sys.executable, "-m", *arguments],
                    stdin=subprocess.PIPE if has_input else subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    env=environment(home),
                    cwd=home,
                    start_new_session=True,  # the tester's Ctrl-C is the test's to handle; see `press_ctrl_c`
                )
        else:
            self._stdout.touch()
            self._stderr.touch()
            self._popen = Forked(arguments, self._stdout, self._stderr, environment(home), home, has_input=has_input)
            _forked.setdefault(home, set()).add(self._popen.pid)
        self.pid = self._popen.pid
        running.append(self)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.kill()

    @property
    def stdout(self) -> str:
        return self._stdout.read_text(errors="replace")

    @property
    def stderr(self) -> str:
        return self._stderr.read_text(errors="replace")

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    def says(self, pattern: str, timeout_s: float = START_S, *, on_stderr: bool = False) -> re.Match[str]:
        """The first match of `pattern` in what the process has written; waits for it.

        Raises:
            AssertionError: it ended or was silent instead.
        """

        def found() -> re.Match[str] | None:
            ended = not self.is_alive  # asked first: what it wrote before is then all there
            match = re.search(pattern, self.stderr if on_stderr else self.stdout, re.MULTILINE)
            if match is None and ended:
                raise AssertionError(f"{self.name!r} ended without saying {pattern!r}:\n{self.stderr}")
            return match

        match = until(found, f"{pattern!r} from {self.name!r}", timeout_s)
        assert match is not None
        return match

    def write(self, text: str) -> None:
        """To its standard input."""
        assert self._popen.stdin is not None
        self._popen.stdin.write(text.encode())
        self._popen.stdin.flush()

    def end_input(self) -> None:
        """As Ctrl-D does."""
        assert self._popen.stdin is not None
        self._popen.stdin.close()

    def send(self, number: signal.Signals) -> None:
        self._popen.send_signal(number)

    def press_ctrl_c(self) -> None:
        """As a terminal does it: SIGINT to the process and to its children, p2pd among them."""
        os.killpg(self.pid, signal.SIGINT)

    def wait(self, timeout_s: float = START_S) -> int:
        """The exit code.

        Raises:
            AssertionError: the process goes on.
        """
        try:
            code = self._popen.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name!r} did not end within {timeout_s:g} s:\n{self.stderr}") from None
        self._ended()
        return code

    def kill(self) -> None:
        """kill -9, and wait for the end."""
        self._popen.kill()
        self._popen.wait(END_S)
        self._ended()

    def _ended(self) -> None:
        if self._popen.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._popen.stdin.close()
        if self in running:
            running.remove(self)
        _forked.get(self._home, set()).discard(self.pid)


class PeerProcess(Process):
    """A `python -m peer serve`. Starts at once; `ready` waits until it serves, then the attributes are there.

    Attributes:
        peer_id, blocks, model, address, maddr: as its first two lines say.
    """

    peer_id: str
    blocks: str
    model: str
    address: str
    maddr: str

    def __init__(self, home: Path, *options: str, anew: bool = False) -> None:
        super().__init__(home, "peer", "serve", *LOOPBACK, *options, anew=anew)

    def ready(self, timeout_s: float = START_S) -> PeerProcess:
        self.maddr = self.says(r"^join (/\S+)$", timeout_s)[1]
        match = self.says(r"^peer (\S+) serves blocks (\d+:\d+) of (.+) at (\S+)$", timeout_s)
        self.peer_id, self.blocks, self.model, self.address = match.groups()
        return self


@dataclass(frozen=True, slots=True)
class Ended:
    """What a command came to."""

    code: int
    stdout: str
    stderr: str


def run(home: Path, *arguments: str, stdin: str | None = None, anew: bool = False, timeout_s: float = START_S) -> Ended:
    """Runs a command to its end. `anew`: see `Process`."""
    with Process(home, *arguments, has_input=stdin is not None, anew=anew) as process:
        if stdin is not None:
            process.write(stdin)
            process.end_input()
        code = process.wait(timeout_s)
        return Ended(code, process.stdout, process.stderr)


class LocalSwarm:
    """Peers of one model on this machine. Made by `swarm`."""

    def __init__(self, home: Path, options: Sequence[str], *, anew: bool = False) -> None:
        self.home = home
        self.peers: list[PeerProcess] = []
        self._options = tuple(options)
        self._anew = anew

    def start(self, blocks: str, *options: str, anew: bool | None = None) -> PeerProcess:
        """Another peer, which joins through the living ones. Does not wait. `anew`: None: as the whole swarm."""
        join = [option for peer in self.living for option in ("--join", peer.maddr)]
        peer = PeerProcess(
            self.home, "--blocks", blocks, *self._options, *options, *join, anew=self._anew if anew is None else anew
        )
        self.peers.append(peer)
        return peer

    @property
    def living(self) -> list[PeerProcess]:
        """The peers that serve and have not ended."""
        return [peer for peer in self.peers if peer.is_alive and hasattr(peer, "peer_id")]

    @property
    def join(self) -> tuple[str, ...]:
        """Where clients join."""
        return tuple(peer.maddr for peer in self.living)

    def peer(self, peer_id: str) -> PeerProcess:
        """The living peer of that id."""
        (peer,) = (peer for peer in self.living if peer.peer_id == peer_id)
        return peer

    def kill(self) -> None:
        for peer in self.peers:
            peer.kill()


@contextlib.contextmanager
def swarm(
    home: Path, model: Path | None, spans: Sequence[str], *options: str, anew: bool = False
) -> Iterator[LocalSwarm]:
    """A swarm of one peer per span, all of them serving. On exit it is gone, whatever happened.

    Args:
        model: None: not named, so that it is the embedded one.
        options: of every peer.
        anew: see `Process`.
    """
    local = LocalSwarm(home, options if model is None else ("--model", str(model), *options), anew=anew)
    with nothing_left_over(home):
        try:
            local.start(spans[0]).ready()
            for peer in [local.start(blocks) for blocks in spans[1:]]:
                peer.ready()
            yield local
        finally:
            local.kill()


def wait_online(client: Swarm, peers: int) -> None:
    """Until the client sees that many peers that take sessions."""

    def online() -> int:
        view = client.refresh()
        return sum(len(view.online(model.fingerprint)) for model in view.models)

    until(lambda: online() >= peers, f"{peers} peers in the client's view")


@contextlib.contextmanager
def nothing_left_over(home: Path) -> Iterator[None]:
    """On exit: no process that was started from this home, p2pd among them, runs any more.

    Raises:
        AssertionError: some did, for seconds; they were killed.
    """
    try:
        yield
    finally:
        deadline_s = time.monotonic() + END_S
        while (left := processes_of(home)) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        names = [_name(process) for process in left]
        for process in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        assert not names, f"left running: {names}"


def processes_of(home: Path) -> list[psutil.Process]:
    """The living processes that have this `POTLUCK_HOME`, but for the test's own."""
    forked = _forked.get(home, set())
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            is_ours = process.pid in forked or process.environ().get("POTLUCK_HOME") == str(home)
            if is_ours and process.pid != os.getpid():
                found.append(process)
    return found


def _name(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {' '.join(process.cmdline())[:200]}"
    return str(process.pid)
