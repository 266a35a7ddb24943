"""The gRPC surface of a real peer in this process: `python -m tests.fuzz.surface surface SECONDS FOLDER`.

Rounds of strangers (`tests.fuzz.strangers`), each drawn anew, until the time is over. After each the peer must hold no
session and none of its budgets, and answer a right session.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

import torch

from peer.host import SpanHost
from protocol.span import Span
from tests.fuzz.lines import Lines
from tests.fuzz.strangers import ATTACKS, EXPECTED, one_round
from tests.harness import open_host, record_of
from tests.slicing.architectures import N_BLOCKS, make_checkpoint

MODULES = (
    "peer.service",
    "peer.visit",
    "peer.pushes",
    "peer.intake",
    "peer.arrival",
    "peer.session",
    "peer.table",
    "peer.room",
    "peer.pump",
    "peer.worker",
    "peer.engine",
    "peer.scheduler",
    "peer.link",
    "peer.links",
    "peer.budget",
    "protocol.frames",
    "protocol.messages",
)
SETTLES_S = 15.0
RESUME_S = 0.5


async def fuzz(seconds: float, folder: Path, seed: int) -> Counter[str]:
    """What the peer answered, counted."""
    make_checkpoint("llama", folder / "llama")
    replies: Counter[str] = Counter()
    rounds, ends_s = 0, time.monotonic() + seconds
    options = {"resume_s": RESUME_S, "kv_tokens": 16384, "message_mib": 2}
    async with open_host(folder / "llama", Span(0, N_BLOCKS), **options) as host:
        while time.monotonic() < ends_s or not rounds:
            replies += await one_round(random.Random(f"{seed} {rounds}"), record_of(host))
            assert set(replies) <= EXPECTED, f"seed {seed}, round {rounds}: {set(replies) - EXPECTED}"
            await _settled(host)
            rounds += 1
            print(f"#{rounds * ATTACKS} {dict(sorted(replies.items()))}", flush=True)
    return replies


async def _settled(host: SpanHost) -> None:
    """All that strangers held is given back."""
    async with asyncio.timeout(SETTLES_S):
        while len(host.sessions) or host.messages.bytes_left != host.messages.bytes_total:
            host.sessions.reclaim(time.monotonic())
            await asyncio.sleep(0.05)
    assert host.budget.tokens_left == host.budget.tokens_total
    assert host.journals.bytes_used == 0
    assert not host.service._visits


def main(seconds: float, folder: Path) -> None:
    torch.set_num_threads(1)
    logging.disable(logging.ERROR)
    seed = int(os.environ.get("FUZZ_SEED", secrets.randbits(32)))
    print(f"FUZZ_SEED={seed}", flush=True)
    asyncio.run(fuzz(seconds, folder, seed))
    lines = Lines(MODULES)
    with lines.watching():  # of one more round: watching makes it slow
        (folder / "watched").mkdir()
        asyncio.run(fuzz(0.0, folder / "watched", seed))
    ran, total = lines.counts
    print(f"lines: {ran}/{total}")
    print("\n".join(lines.missed()))


if __name__ == "__main__":
    main(float(sys.argv[2]), Path(sys.argv[3]))
