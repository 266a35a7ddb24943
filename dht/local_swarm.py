"""The swarm of this machine: each running node leaves a state file, so that others here find it without being told.

    <home>/running/<pid>-<end of peer id>.json

An entry counts while its process lives: the process id alone would not do, since ids are used again, so the file holds
the time at which the process started too.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import psutil

from dht.files import read_json, write_json
from dht.maddr import Maddr

FOLDER = "running"
START_TOLERANCE_S = 1.0
"""psutil derives a start time from the boot time, which moves a little when the clock is set."""

Role = Literal["bootstrap", "peer"]


@dataclass(frozen=True)
class LocalNode:
    """A node that runs on this machine. `started_at`: when its process started, seconds since 1970.

    `swarm`: the name of its private swarm; empty: an open one.
    """

    maddrs: tuple[str, ...]
    role: Role
    machine: str
    pid: int
    started_at: float
    swarm: str = ""


@contextlib.contextmanager
def published(home: Path, maddrs: Sequence[str], role: Role, swarm: str = "") -> Iterator[None]:
    """Let others on this machine find a node of this process while the body runs. Blocks on the disk.

    Raises:
        OSError: the file cannot be written.
    """
    node = LocalNode(tuple(maddrs), role, socket.gethostname(), os.getpid(), psutil.Process().create_time(), swarm)
    path = home / FOLDER / f"{node.pid}-{maddrs[0][-8:] if maddrs else role}.json"
    write_json(path, asdict(node))
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find(home: Path, swarm: str = "") -> tuple[LocalNode, ...]:
    """Nodes of `swarm` that run on this machine: bootstrap nodes first, then the oldest. Removes files of dead ones.
    Blocks."""
    nodes = []
    for path in sorted((home / FOLDER).glob("*.json")):
        node = _parse(read_json(path))
        if node is not None and node.machine != socket.gethostname():
            continue  # a home shared with another machine or container: its processes cannot be judged from here
        if node is None or not _is_alive(node):
            path.unlink(missing_ok=True)
            continue
        if node.swarm == swarm:
            nodes.append(node)
    return tuple(sorted(nodes, key=lambda node: (node.role != "bootstrap", node.started_at)))


def _is_alive(node: LocalNode) -> bool:
    try:
        process = psutil.Process(node.pid)
        is_same = abs(process.create_time() - node.started_at) <= START_TOLERANCE_S
        return is_same and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _parse(state: object) -> LocalNode | None:
    if not isinstance(state, dict):
        return None
    maddrs, role, machine = state.get("maddrs"), state.get("role"), state.get("machine")
    pid, started_at, swarm = state.get("pid"), state.get("started_at"), state.get("swarm", "")
    if not isinstance(maddrs, list) or not all(isinstance(text, str) and Maddr.parse(text) for text in maddrs):
        return None
    if role not in ("bootstrap", "peer") or not isinstance(machine, str) or not isinstance(swarm, str):
        return None
    if type(pid) is not int or pid <= 0 or not isinstance(started_at, int | float):
        return None
    return LocalNode(tuple(maddrs), role, machine, pid, float(started_at), swarm)
