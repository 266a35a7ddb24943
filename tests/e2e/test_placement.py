"""Where peers go by themselves: no gap is filled twice, a gap that opens is filled by who can move, and who leaves goes
once its sessions have gone on."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from client.model import SwarmModel, SwarmModelForCausalLM
from dht.record import PeerRecord
from peer.host import HANDED_OVER_S
from protocol.channel import open_channel
from protocol.limits import MESSAGE_BYTES
from protocol.messages import Open
from protocol.potluck_pb2_grpc import PeerStub
from tests.e2e.support import answers_at_length, unsplit
from tests.processes import PeerProcess, Process, at_home, nothing_left_over, until

HALVES = {"0:3", "3:6"}
SETTINGS = """\
[dht]
refresh_every_s = 0.5
[peer]
balance_every_s = 0.5
num_blocks = 3
"""
PROMPT = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(5))
NEW_TOKENS = 8
LEAVE_S = 10.0
"""For a peer without sessions to end. It takes a second; a busy machine is given more."""


@dataclass
class Unpinned:
    """A swarm of peers of three of six blocks, which go where they are needed."""

    home: Path
    folder: Path
    join: str
    client: SwarmModel

    def start(self) -> PeerProcess:
        return PeerProcess(self.home, "--model", str(self.folder), "--join", self.join)

    def records(self) -> dict[str, PeerRecord]:
        """Online peers, by id."""
        view = self.client.swarm.refresh()
        return {peer.peer_id: peer for model in view.models for peer in view.online(model.fingerprint)}


@pytest.fixture(scope="module", name="unpinned")
def _unpinned(checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Unpinned]:
    folder, home = checkpoint("llama"), tmp_path_factory.mktemp("home")
    (home / "config.toml").write_text(SETTINGS)
    with (
        at_home(home),
        nothing_left_over(home),
        Process(home, "dht", "bootstrap", "--host", "127.0.0.1") as node,
    ):
        join = node.says(r"^(/ip4/\S+)$")[1]
        with SwarmModelForCausalLM.from_pretrained(str(folder), join=[join], codec="none", wait_s=60.0) as client:
            answers_at_length(client)
            yield Unpinned(home, folder, join, client)


def test_gaps_are_filled_once_and_again(unpinned: Unpinned) -> None:
    """Two start together, then a third; the one that is alone with its blocks leaves; another one goes there."""
    model = unsplit(unpinned.folder)
    answers_at_length(model)
    expected = model.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)
    with unpinned.start() as one, unpinned.start() as two:
        assert {one.ready().blocks, two.ready().blocks} == HALVES
        with unpinned.start() as three:
            twin = next(peer for peer in (one, two) if peer.blocks == three.ready().blocks)
            alone = one if twin is two else two
            until(lambda: len(unpinned.records()) == 3, "all three in the client's view")
            before = unpinned.records()

            alone.send(signal.SIGTERM)
            started_s = time.monotonic()
            assert alone.wait() == 0, alone.stderr
            assert time.monotonic() - started_s < LEAVE_S
            assert alone.peer_id not in unpinned.records(), "the swarm was not told"

            def moved() -> PeerRecord | None:
                records = unpinned.records()
                whole = len(records) == 2 and {str(record.span) for record in records.values()} == HALVES
                return next((r for r in records.values() if str(r.span) == alone.blocks), None) if whole else None

            mover = until(moved, f"a peer to move to {alone.blocks}")
            assert mover.addresses == before[mover.peer_id].addresses
            assert mover.block_digests == before[alone.peer_id].block_digests
            process = twin if twin.peer_id == mover.peer_id else three
            process.says(rf"moved from blocks {twin.blocks} to {alone.blocks}", on_stderr=True)
            answer = unpinned.client.generate(PROMPT, max_new_tokens=NEW_TOKENS, do_sample=False)
            assert torch.equal(answer, expected)


async def open_session(record: PeerRecord) -> tuple[Any, Any]:
    """The channel and the stream of a client that opens a session, and then only rests."""
    channel = open_channel(record.addresses[0], record.certificate_der, max_message_bytes=MESSAGE_BYTES)
    stream = PeerStub(channel).Infer()  # type: ignore[no-untyped-call]
    await stream.write(Open(bytes(16), 1, record.fingerprint, record.span, "none", 1, 32).to_proto())
    assert (await stream.read()).WhichOneof("kind") == "opened"
    return channel, stream


@pytest.mark.parametrize("signals", [1, 2])
def test_a_leaver_waits_for_its_sessions_unless_told_twice(unpinned: Unpinned, signals: int) -> None:
    with unpinned.start() as peer:
        peer.ready()
        record = until(lambda: unpinned.records().get(peer.peer_id), "the peer in the client's view")
        channel, stream = unpinned.client.swarm.call(open_session(record))
        try:
            peer.send(signal.SIGTERM)
            peer.says(r"1 session is being handed over.*once more to leave at once", on_stderr=True)
            if signals == 2:
                peer.send(signal.SIGTERM)
            assert peer.wait(HANDED_OVER_S + LEAVE_S) == (0 if signals == 1 else 128 + signal.SIGTERM), peer.stderr
            assert "although" not in peer.stderr, "a session that only rests is not waited for"
            assert "Traceback" not in peer.stderr
        finally:
            unpinned.client.swarm.call(channel.close(None))
        del stream
