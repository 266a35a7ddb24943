"""Guesses over real processes: fewer steps where the answer repeats the question, the same tokens everywhere."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from client.model import SwarmModel, SwarmModelForCausalLM
from client.session import Session
from client.text import encode_messages, load_tokenizer
from demo.world import TASK_NAMES, questions
from tests.e2e.support import answers_at_length, unsplit
from tests.processes import at_home, swarm, wait_online

SPANS = ("0:9", "9:15", "15:24")
LINK_S = 0.1  # of emulated round trip
PER_TASK = 2
REPETITIVE = {"inputs": torch.tensor([[5, 6, 7, 8, 9, 5, 6, 7, 8, 9, 5, 6, 7]])}


@pytest.fixture
def _far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The swarm is `LINK_S` away."""
    near = Session.run

    async def far(self: Session, entries: Any) -> Any:
        await asyncio.sleep(LINK_S)
        return await near(self, entries)

    monkeypatch.setattr(Session, "run", far)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SwarmModel, SwarmModel]]:
    """The demo model twice, in one swarm: as it is, and without guesses."""
    home = tmp_path_factory.mktemp("home")
    with (
        at_home(home),
        swarm(home, None, SPANS) as peers,
        SwarmModelForCausalLM.from_pretrained("potluck-demo", join=peers.join) as model,
    ):
        wait_online(model.swarm, len(SPANS))
        yield model, SwarmModelForCausalLM.from_pretrained("potluck-demo", swarm=model.swarm, speculate="off")


def steps_of(model: SwarmModel, **arguments: Any) -> tuple[Tensor, int]:
    """An answer, and how many steps it took."""
    with model.session():
        found = model.generate(**arguments)
    return found, model.blocks.last_stats.steps


@pytest.mark.slow
@pytest.mark.usefixtures("_far")
def test_all_tasks_of_the_demo_model(demo: tuple[SwarmModel, SwarmModel]) -> None:
    model, plain = demo
    tokenizer = load_tokenizer(model.source)
    steps = {task: [0, 0] for task in TASK_NAMES}
    busy_s = {task: [0.0, 0.0] for task in TASK_NAMES}
    for question in questions(3, PER_TASK * len(TASK_NAMES), "held_out"):
        ids = encode_messages(tokenizer, [{"role": "user", "content": question.text}])
        asked = {"inputs": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 40, "do_sample": False}
        answers = []
        for index, each in enumerate((plain, model)):
            answer, count = steps_of(each, **asked)
            answers.append(answer)
            steps[question.task][index] += count
            busy_s[question.task][index] += each.blocks.last_stats.busy_s
        assert torch.equal(*answers), question.text
    print(steps, {task: round(a / b, 2) for task, (a, b) in busy_s.items()})
    assert all(guessing <= without for without, guessing in steps.values()), steps
    without, guessing = steps["copying"]
    assert guessing <= 0.6 * without, steps


@pytest.fixture(scope="module")
def tiny(
    checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Any, SwarmModel, Any]]:
    """A tiny unsplit model, the same behind a swarm with a spare peer, and the swarm's processes."""
    folder, home = checkpoint("llama"), tmp_path_factory.mktemp("home")
    with (
        at_home(home),
        swarm(home, folder, ("0:3", "3:6", "3:6")) as peers,
        SwarmModelForCausalLM.from_pretrained(str(folder), join=peers.join, codec="none") as remote,
    ):
        wait_online(remote.swarm, 3)
        whole = unsplit(folder)
        for model in (whole, remote):
            answers_at_length(model)
        yield whole, remote, peers


@pytest.mark.usefixtures("_far")
@pytest.mark.parametrize("sample", [False, True])
def test_the_tokens_of_the_plain_loop(tiny: tuple[Any, SwarmModel, Any], sample: bool) -> None:
    """From the same seed, sampled ones too: so no distribution can differ."""
    whole, remote, _ = tiny
    arguments = {**REPETITIVE, "max_new_tokens": 40, "do_sample": sample, "top_k": 3, "repetition_penalty": 1.05}
    torch.manual_seed(11)
    expected = whole.generate(**arguments)
    torch.manual_seed(11)
    found, steps = steps_of(remote, **arguments)
    assert torch.equal(expected, found)
    assert steps <= 40


@pytest.mark.usefixtures("_far")
def test_a_perfect_draft_model_saves_most_steps(tiny: tuple[Any, SwarmModel, Any]) -> None:
    whole, remote, _ = tiny
    arguments = {**REPETITIVE, "max_new_tokens": 40, "do_sample": False}
    found, steps = steps_of(remote, **arguments, assistant_model=whole)
    assert torch.equal(whole.generate(**arguments), found)
    assert steps <= 20


@pytest.mark.usefixtures("_far")
def test_a_peer_killed_while_guesses_are_under_way(tiny: tuple[Any, SwarmModel, Any]) -> None:
    whole, remote, peers = tiny

    class Killer(BaseStreamer):
        def __init__(self) -> None:
            self.heard = 0

        def put(self, value: Tensor) -> None:
            self.heard += 1
            if self.heard == 12:
                peers.peer(remote.blocks.last_chain[-1].peer.peer_id).kill()

        def end(self) -> None:
            assert self.heard == 1 + 40

    arguments = {**REPETITIVE, "max_new_tokens": 40, "do_sample": False}
    found, steps = steps_of(remote, **arguments, streamer=Killer())
    assert torch.equal(whole.generate(**arguments), found)
    assert remote.blocks.last_stats.reroutes > 0
    assert steps < 40
