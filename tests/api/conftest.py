"""One swarm and one gateway for each module of tests: real peers in this process, a real HTTP server, no DHT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.api.local import Local, local


@pytest.fixture(scope="session", autouse=True)
def _one_quiet_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def served() -> Iterator[Local]:
    """The demo model over two peers, behind the gateway."""
    with local("0:12", "12:24") as running:
        yield running
