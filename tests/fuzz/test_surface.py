"""Law 4 over real processes: no nonsense on the port ends a peer, disturbs a session, or stays in memory.

Five rounds of random and mutated byte strings and messages; a conversation goes on through all of them.
"""

from __future__ import annotations

import os
import random
import secrets
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import torch
from torch import Tensor

from client.model import SwarmModelForCausalLM
from dht.record import PeerRecord
from protocol import potluck_pb2 as pb
from protocol.channel import open_channel
from protocol.frames import step_frames
from protocol.limits import MESSAGE_BYTES
from protocol.messages import HIDDEN, Open, Step, TensorSpec
from protocol.span import Span
from tests.e2e.support import answers_at_length, sessions_held, unsplit
from tests.fuzz.footprint import GROWTH_BYTES, SINCERE_MALLOC, uss_bytes
from tests.fuzz.nonsense import EPOCH, WIDTH
from tests.fuzz.strangers import CALL_S, EXPECTED, INFER, one_round, write
from tests.processes import at_home, swarm, until
from tests.slicing.architectures import N_BLOCKS

SEED = int(os.environ.get("E2E_SEED", secrets.randbits(32)))
"""Fresh in each run; E2E_SEED repeats one."""

ROUNDS = 5
MESSAGE_MIB, WHOLE_BUDGET_TOKENS = 2, 8188  # one step of so many tokens leaves next to nothing for other messages

PROMPT = torch.randint(3, 250, (1, 12), generator=torch.Generator().manual_seed(5))
TURN = 4  # tokens of the conversation per round


@pytest.mark.slow  # a minute
def test_nonsense_on_the_port(
    checkpoint: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    print(f"E2E_SEED={SEED}")
    for name, value in SINCERE_MALLOC.items():
        monkeypatch.setenv(name, value)
    folder = checkpoint("llama")
    options = ("--resume-s", "1", "--kv-tokens", "16384", "--message-mib", str(MESSAGE_MIB))
    with (
        at_home(tmp_path),
        swarm(tmp_path, folder, [f"0:{N_BLOCKS}"], *options, anew=True) as peers,
        SwarmModelForCausalLM.from_pretrained(str(folder), join=peers.join, codec="none") as model,
    ):
        (peer,) = peers.peers
        (record,) = model.swarm.view.online(model.swarm.view.models[0].fingerprint)
        whole = unsplit(folder)
        other = SwarmModelForCausalLM.from_pretrained(str(folder), swarm=model.swarm, codec="none")
        for either in (model, other, whole):
            answers_at_length(either)
        expected = generated(whole, PROMPT, ROUNDS * TURN)
        replies: Counter[str] = Counter()
        used: list[int] = []
        with model.session():
            said = generated(model, PROMPT, TURN)
            for number in range(ROUNDS):
                replies += model.swarm.call(one_round(random.Random(f"{SEED} {number}"), record))
                said = generated(model, said, TURN if number < ROUNDS - 1 else 0)  # the conversation goes on
                until(lambda: sessions_held(model) <= 1, "the peer to drop the strangers' sessions")
                with other.session():
                    assert torch.equal(generated(other, PROMPT, TURN), expected[:, : PROMPT.shape[1] + TURN])
                used.append(uss_bytes(peer.pid))
                print(f"round {number + 1}: {used[-1] / 2**20:.1f} MiB", dict(sorted(replies.items())))
        assert torch.equal(said, expected)
        until(lambda: sessions_held(model) == 0, "the peer to free all sessions")
        assert peer.is_alive
        assert "Traceback" not in peer.stderr
        assert set(replies) <= EXPECTED
        assert min(replies[kind] for kind in ("opened", "result", "bad-message")) > 100
        assert min(replies[kind] for kind in ("NOT_FOUND", "push refused: stale-epoch")) > 20
        # What the last round's sessions freed goes back to the system at the peer's next sweep.
        sizes = [f"{size / 2**20:.1f} MiB" for size in used]
        until(
            lambda: uss_bytes(peer.pid) - used[1] <= GROWTH_BYTES, f"memory near that of round 2: {sizes}", timeout_s=15
        )
        # Nothing that was cut off holds anything of the message budget: a step that needs all of it gets in.
        (said_last,) = model.swarm.call(whole_budget(record))
        assert "starts at token 7, the session is at 0" in said_last.message, said_last


def generated(model: Any, ids: Tensor, new_tokens: int) -> Tensor:
    if not new_tokens:
        return ids
    tokens: Tensor = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)
    return tokens


async def whole_budget(record: PeerRecord) -> list[pb.Failure]:
    """What the peer says to a step that needs its whole message budget, and starts where it must not."""
    nbytes = WHOLE_BUDGET_TOKENS * WIDTH * 4
    assert 0 < (MESSAGE_MIB << 20) - nbytes < 2048  # its header weighs something too
    spec = TensorSpec(HIDDEN, "none", "float32", (1, WHOLE_BUDGET_TOKENS, WIDTH), nbytes)
    opening = Open(secrets.token_bytes(16), EPOCH, record.fingerprint, Span(0, N_BLOCKS), "none", 1, 0)
    messages = [opening.to_proto(), *step_frames(Step(EPOCH, 0, 7, (spec,), bytes(nbytes)))]
    failures: list[pb.Failure] = []
    channel = open_channel(record.addresses[0], record.certificate_der, max_message_bytes=MESSAGE_BYTES)
    try:
        call: Any = channel.stream_stream(INFER)(timeout=CALL_S)
        await write(call, [message.SerializeToString() for message in messages], is_all=False)
        while (body := await call.read()) is not grpc.aio.EOF:
            reply = pb.InferReply.FromString(body)
            failures += [reply.failure] if reply.WhichOneof("kind") == "failure" else []
    finally:
        await channel.close(None)
    return failures
