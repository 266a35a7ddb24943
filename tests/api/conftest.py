"""One swarm and one gateway for each module of tests: real peers in this process, a real HTTP server, no DHT."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.api.local import Local, local
from tests.models import _one_quiet_thread  # noqa: F401  # a fixture


@pytest.fixture(scope="module")
def served() -> Iterator[Local]:
    """The demo model over two peers, behind the gateway."""
    with local("0:12", "12:24") as running:
        yield running
