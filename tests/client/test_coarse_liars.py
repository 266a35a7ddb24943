"""Peers whose weights are coarser than they say: no token of theirs stands out, and they are found all the same."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from client.session import Session
from slicing import resolve
from tests.api.local import DEMO, _Hosts, _loop
from tests.client.test_liars import Peers, Use, use

SPANS = ("12:24", "0:12", "0:12", "0:12", "0:12", "12:24")
COARSE, HONEST, EXACT = 1, 2, 4  # of these hosts
BF16, EXACT_LOAD = {"dtype": torch.bfloat16}, {"dtype": torch.float32}
LOADS: list[dict[str, Any]] = [BF16, BF16 | {"quantization": "nf4"}, BF16, BF16, EXACT_LOAD, BF16]


@pytest.fixture(scope="module")
def folder() -> Path:
    return Path(resolve(DEMO).location)


@pytest.fixture(scope="module")
def peers(folder: Path) -> Iterator[Peers]:
    with _loop() as loop:
        opening = _Hosts(folder, SPANS, 0, LOADS)
        hosts = asyncio.run_coroutine_threadsafe(opening.open(), loop).result()
        try:
            yield Peers(loop, hosts, ())
        finally:
            asyncio.run_coroutine_threadsafe(opening.close(), loop).result()


def answer(client: Use) -> torch.Tensor:
    """To a question that is long enough to tell what is typical."""
    ids = torch.arange(3, 35)[None]
    return cast(
        torch.Tensor,
        client.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, min_new_tokens=16),
    )


def route(peers: Peers, *hosts: int) -> tuple[str, ...]:
    return tuple(peers.ids[host] for host in hosts)


def test_four_bits_that_are_said_to_be_sixteen_are_found(folder: Path, peers: Peers) -> None:
    settings = {"codec": "int8", "speculate": "off"}
    with use(peers, folder, (0, HONEST, 3, 5), **settings, route=route(peers, 0, HONEST), audit=0.0) as client:
        wanted = answer(client)
    with use(peers, folder, (0, COARSE, HONEST, 3, 5), **settings, route=route(peers, 0, COARSE)) as client:
        assert torch.equal(answer(client), wanted)
        assert client.swarm.blame.avoided() == {peers.ids[COARSE]}
        assert any("did not compute what two others did" in event for event in client.events), client.events
        assert "the answer is wrong from its token 0 on, and is made again" in client.events


@pytest.mark.parametrize(
    "hosts", [(0, HONEST, 3, 5), (0, HONEST, EXACT, 5), (0, EXACT, HONEST, 5)], ids=["alike", "bfloat16", "float32"]
)
def test_honest_peers_of_these_number_formats_are_not_accused(
    folder: Path, peers: Peers, hosts: tuple[int, ...]
) -> None:
    settings = {"codec": "int8", "speculate": "off", "route": route(peers, *hosts[:2])}
    with use(peers, folder, hosts, **settings) as client, client.model.session() as session:
        answer(client)
        stats = cast(Session, client.model.blocks.session_of(session.cache)).auditor.stats
        assert set(client.chain) == set(route(peers, *hosts[:2]))
        assert stats.tokens >= 2 * 32, stats
        assert not stats.unaudited and not client.swarm.blame.avoided() and not client.events, (stats, client.events)
