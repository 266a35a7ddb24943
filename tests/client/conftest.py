"""Peers that can be told to lie: what tests of audits share. Tests of other things make a `checkpoint` of their own."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.local import _Hosts, _loop
from tests.client.test_liars import SPANS, Peers
from tests.liars import Liar, honest
from tests.tiny import write_llama


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder, 6, eos_token_id=None)
    return folder


@pytest.fixture(scope="module")
def all_peers(checkpoint: Path) -> Iterator[Peers]:
    with _loop() as loop:
        opening = _Hosts(checkpoint, SPANS, 0)
        hosts = asyncio.run_coroutine_threadsafe(opening.open(), loop).result()
        try:
            yield Peers(loop, hosts, [Liar(host) for host in hosts])
        finally:
            asyncio.run_coroutine_threadsafe(opening.close(), loop).result()


@pytest.fixture
def peers(all_peers: Peers) -> Iterator[Peers]:
    """All of them honest, at first."""
    yield all_peers
    for liar in all_peers.liars:
        liar.lie = honest
