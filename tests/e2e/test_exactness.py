"""Law 1 over real processes: with codec `none` a chain of peers gives the bits that the unsplit model gives."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from client.model import SwarmModel, SwarmModelForCausalLM
from tests.e2e.support import answers_at_length, sessions_held, unsplit
from tests.generating import COMMON, IDS, MASK, PADDED, SINGLE, bad_draft, each
from tests.processes import at_home, swarm, until, wait_online
from tests.slicing.architectures import VOCABULARY

SPANS = {"llama": ("0:2", "2:5", "5:6"), "gemma3_text": ("0:2", "2:6"), "gpt2": ("0:3", "3:6")}
DECODE_STEPS = 8
SOON_S = 3.0

LONG = {"inputs": torch.randint(3, 250, (1, 61), generator=torch.Generator().manual_seed(6))}

MODES: dict[str, dict[str, Any]] = {
    "greedy": {**SINGLE, "max_new_tokens": 20, "do_sample": False},
    "left padding": {**PADDED, "max_new_tokens": 20, "do_sample": False},
    **COMMON,
    "no cache": {**SINGLE, "max_new_tokens": 4, "do_sample": False, "use_cache": False},
}


@dataclass(frozen=True)
class Pair:
    """The unsplit model, and the same model behind a swarm of real peers."""

    name: str
    folder: Path
    unsplit: Any
    remote: SwarmModel

    def both(self, **arguments: Any) -> tuple[Any, Any]:
        """What the two generate, from the same seed."""
        unsplit, other = each((self.unsplit, self.remote), **arguments)
        return unsplit, other


@pytest.fixture(scope="module", params=SPANS)
def pair(
    request: pytest.FixtureRequest, checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Pair]:
    folder, home = checkpoint(request.param), tmp_path_factory.mktemp("home")
    with (
        at_home(home),
        swarm(home, folder, SPANS[request.param]) as peers,
        SwarmModelForCausalLM.from_pretrained(str(folder), join=peers.join, codec="none") as remote,
    ):
        wait_online(remote.swarm, len(peers.peers))
        pair = Pair(request.param, folder, unsplit(folder), remote)
        for model in (pair.unsplit, pair.remote):
            answers_at_length(model)
        yield pair


@pytest.fixture(scope="module")
def draft() -> Any:
    return bad_draft(VOCABULARY)


def logits(model: Any, ids: Tensor, mask: Tensor | None) -> list[Tensor]:
    """Of a prefill with all but the last tokens of `ids`, and of `DECODE_STEPS` steps with one of these each."""
    prompt = ids.shape[1] - DECODE_STEPS
    found, cache = [], None
    for start, stop in [(0, prompt), *((i, i + 1) for i in range(prompt, ids.shape[1]))]:
        more: dict[str, Tensor] = {}
        if mask is not None:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            more = {"attention_mask": mask[:, :stop], "position_ids": positions[:, start:stop]}
        with torch.no_grad():
            output = model(input_ids=ids[:, start:stop], past_key_values=cache, use_cache=True, **more)
        cache = output.past_key_values
        found.append(output.logits)
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_logits_are_the_same_bits(pair: Pair, padded: bool) -> None:
    ids = torch.cat([IDS, IDS.flip(1)[:, :DECODE_STEPS]], dim=1)
    mask = torch.cat([MASK, torch.ones(2, DECODE_STEPS, dtype=torch.long)], dim=1) if padded else None
    expected = logits(pair.unsplit, ids, mask)
    found = logits(pair.remote, ids, mask)
    assert len(found) == 1 + DECODE_STEPS
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [str(link.span) for link in pair.remote.chain] == list(SPANS[pair.name])


@pytest.mark.parametrize("mode", MODES)
def test_each_mode_gives_the_tokens_of_the_unsplit_model(pair: Pair, mode: str) -> None:
    expected, found = pair.both(**MODES[mode])
    assert torch.equal(expected, found)


@pytest.mark.parametrize("sample", [False, True])
def test_assisted_decoding(pair: Pair, sample: bool, draft: Any) -> None:
    expected, found = pair.both(**SINGLE, max_new_tokens=20, do_sample=sample, assistant_model=draft)
    assert torch.equal(expected, found)


def test_scores_are_the_same_bits(pair: Pair) -> None:
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected, found = pair.both(**PADDED, max_new_tokens=DECODE_STEPS, do_sample=False, **wanted)
    assert torch.equal(expected.sequences, found.sequences)
    assert torch.equal(torch.stack(expected.scores), torch.stack(found.scores))
    assert torch.equal(torch.stack(expected.logits), torch.stack(found.logits))


def test_a_streamer_gets_each_token_as_it_comes(pair: Pair) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            self.pieces.append(torch.tensor([-1]))

    heard = []
    for model in (pair.unsplit, pair.remote):
        streamer = Collector()
        model.generate(**SINGLE, max_new_tokens=8, do_sample=False, streamer=streamer)
        heard.append(streamer.pieces)
    assert len(heard[1]) == 1 + 8 + 1
    assert torch.equal(torch.cat(heard[0]), torch.cat(heard[1]))


def test_from_embeddings(pair: Pair) -> None:
    embeddings = pair.unsplit.get_input_embeddings()(IDS[:1]).detach()
    expected, found = pair.both(inputs_embeds=embeddings, max_new_tokens=8, do_sample=False)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("prompt", [LONG, PADDED], ids=["one row", "left padding"])
def test_a_long_prompt_travels_in_chunks(pair: Pair, prompt: dict[str, Tensor]) -> None:
    chunked = SwarmModelForCausalLM.from_pretrained(
        str(pair.folder), swarm=pair.remote.swarm, codec="none", prefill_tokens=10, speculate="off"
    )
    chunked.generation_config = pair.remote.generation_config
    with chunked.session():
        found = chunked.generate(**prompt, max_new_tokens=8, do_sample=False)
        rows, tokens = prompt["inputs"].shape
        assert steps_and_tokens(chunked) == (-(-tokens // (10 // rows)) + 7, rows * (tokens + 7))
    assert torch.equal(found, pair.unsplit.generate(**prompt, max_new_tokens=8, do_sample=False))


def test_a_second_turn_sends_only_new_tokens(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.remote, "speculates", False)  # guesses would be counted, too
    with pair.remote.session(max_tokens=64):
        first = pair.remote.generate(**SINGLE, max_new_tokens=6, do_sample=False)
        assert steps_and_tokens(pair.remote) == (6, 12 + 5)
        asked = torch.cat([first, IDS[1:, :4]], dim=1)
        second = pair.remote.generate(inputs=asked, max_new_tokens=6, do_sample=False)
        # The last token of the first answer, which was never fed back, and the four new ones; then five of the answer.
        assert steps_and_tokens(pair.remote) == (12, 12 + 5 + 1 + 4 + 5)
    assert torch.equal(second, pair.unsplit.generate(inputs=asked, max_new_tokens=6, do_sample=False))


def test_a_turn_may_take_back_what_was_said(pair: Pair) -> None:
    with pair.remote.session():
        first = pair.remote.generate(**SINGLE, max_new_tokens=6, do_sample=False)
        asked = torch.cat([first[:, :14], IDS[1:, :4]], dim=1)
        second = pair.remote.generate(inputs=asked, max_new_tokens=6, do_sample=False)
    assert torch.equal(second, pair.unsplit.generate(inputs=asked, max_new_tokens=6, do_sample=False))


def test_a_session_that_is_left_is_freed_at_once(pair: Pair) -> None:
    with pair.remote.session():
        pair.remote.generate(**SINGLE, max_new_tokens=2, do_sample=False)
        gc.collect()
        until(lambda: sessions_held(pair.remote) == len(SPANS[pair.name]), "older sessions to end", SOON_S)
    assert sessions_held(pair.remote) == 0


def test_an_answer_outside_a_session_is_freed_when_it_is_there(pair: Pair) -> None:
    gc.collect()
    gc.disable()
    try:
        pair.remote.generate(**SINGLE, max_new_tokens=2, do_sample=False)
        until(lambda: sessions_held(pair.remote) == 0, "the peers to free the answer's sessions", SOON_S)
    finally:
        gc.enable()


def steps_and_tokens(model: SwarmModel) -> tuple[int, int]:
    """What the open session has sent so far."""
    assert model._here.session is not None
    session = model.blocks.session_of(model._here.session.cache)
    assert session is not None
    return session.stats.steps, session.stats.tokens
