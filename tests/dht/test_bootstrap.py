"""`python -m dht bootstrap` as people run it: a real process, ended by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from dht import local_swarm
from dht.config import DhtConfig
from dht.locate import locate_swarm
from dht.maddr import Maddr
from dht.node import open_node

TIMEOUT_S = 40.0


@contextlib.contextmanager
def bootstrap(home: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The command in a process group of its own: a terminal sends Ctrl-C to the whole group, p2pd included."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("POTLUCK_")}
    process = subprocess.Popen(
        [sys.executable, "-m", "dht", "bootstrap", "--host", "127.0.0.1", *arguments],
        env={**environment, "POTLUCK_HOME": str(home), "POTLUCK_CONFIG": str(home / "none.toml")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


async def test_it_runs_until_a_signal_and_comes_back_at_the_same_address(tmp_path: Path) -> None:
    addresses = []
    for number in (signal.SIGTERM, signal.SIGINT):
        with bootstrap(tmp_path) as process:
            address = await asyncio.to_thread(first_line, process)
            assert Maddr.parse(address) is not None, address
            addresses.append(address)
            daemons = [child.pid for child in psutil.Process(process.pid).children() if child.name() == "p2pd"]
            assert len(daemons) == 1
            found = await locate_swarm(DhtConfig(home=str(tmp_path), host="127.0.0.1"))
            assert (found.maddrs, found.how) == ((address,), "a node on this machine")
            async with open_node(DhtConfig(home=str(tmp_path), host="127.0.0.1"), None, found.maddrs) as client:
                assert client.neighbours == 1
            os.killpg(process.pid, number)
            out, errors = await asyncio.to_thread(process.communicate, timeout=TIMEOUT_S)
            assert process.returncode == 0, errors
            assert out == "", "stdout holds addresses only"
            assert "--join" in errors and "Traceback" not in errors, errors
            assert not any(psutil.pid_exists(pid) for pid in daemons)
            assert local_swarm.find(tmp_path) == () and not list((tmp_path / local_swarm.FOLDER).iterdir())
    assert addresses[0] == addresses[1]


def fails(home: Path, *arguments: str) -> str:
    with bootstrap(home, *arguments) as process:
        out, errors = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 2 and out == "", (process.returncode, out)
    assert len(errors.strip().splitlines()) == 1, errors
    return errors


def test_a_taken_port_is_one_clear_sentence(tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert f"port {port}: Address already in use" in fails(tmp_path, "--port", str(port))


def test_a_malformed_address_is_one_clear_sentence(tmp_path: Path) -> None:
    assert "/ip4/203.0.113.5" in fails(tmp_path, "--join", "nonsense")


def test_when_it_is_killed_its_daemon_ends_too_and_its_state_is_stale(tmp_path: Path) -> None:
    with bootstrap(tmp_path) as process:
        first_line(process)
        [daemon] = [child for child in psutil.Process(process.pid).children() if child.name() == "p2pd"]
        assert len(local_swarm.find(tmp_path)) == 1
        process.kill()
        process.wait(TIMEOUT_S)
        daemon.wait(TIMEOUT_S)
        assert local_swarm.find(tmp_path) == ()
