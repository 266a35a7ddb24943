"""`generate` on a head gives the tokens that it gives on the unsplit model, in every mode, with equal seeds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.generation import BaseStreamer, StoppingCriteria, StoppingCriteriaList

from slicing import CacheOp, Head, ModelSource, RemoteCache, load_head
from tests.generating import COMMON, IDS, PADDED, SINGLE, bad_draft, each
from tests.slicing.architectures import N_BLOCKS, VOCABULARY
from tests.slicing.chain import LocalChain

MAIN = ["llama", "gemma3_text", "gpt2"]
MORE = ["bloom", "gpt_oss", "qwen3_moe", "deepseek_v3", "falcon", "gemma3n", "gemma4_text", "opt", "llama4_text"]
RECURRENT = ["qwen3_next", "jamba", "mamba", "mamba2", "nemotron_h", "lfm2"]


MODES: dict[str, dict[str, Any]] = {
    "greedy": {**PADDED, "max_new_tokens": 20, "do_sample": False},
    **COMMON,
    "sampling": {**COMMON["sampling"], "no_repeat_ngram_size": 3},
    "chunked prefill": {**SINGLE, "max_new_tokens": 8, "do_sample": False, "prefill_chunk_size": 5},
    "guidance": {**SINGLE, "max_new_tokens": 8, "do_sample": False, "guidance_scale": 1.5},
    "static cache asked for": {**SINGLE, "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"},
    "no cache": {**SINGLE, "max_new_tokens": 6, "do_sample": False, "use_cache": False},
}


@dataclass(frozen=True)
class Pair:
    """The unsplit model, and a head over a chain of two spans of it."""

    unsplit: Any
    head: Head
    chain: LocalChain

    def both(self, **arguments: Any) -> tuple[Any, Any]:
        """What the two generate, from the same seed."""
        unsplit, other = each((self.unsplit, self.head), **arguments)
        return unsplit, other


@pytest.fixture(scope="module")
def pairs(source: Callable[[str], ModelSource], unsplit: Callable[[str], Any]) -> Iterator[Callable[[str], Pair]]:
    made: dict[str, Pair] = {}

    def make(name: str) -> Pair:
        if name not in made:
            # Cut 2 is legal in all of them, gemma3n's shared tail included.
            pair = Pair(unsplit(name), load_head(source(name)), LocalChain.load(source(name), [0, 2, N_BLOCKS]))
            pair.head.attach(pair.chain)
            for model in (pair.unsplit, pair.head):
                # Random weights would end most answers early.
                model.generation_config.eos_token_id = None
                model.generation_config.pad_token_id = 0
            made[name] = pair
        return made[name]

    yield make


@pytest.fixture(scope="module")
def draft() -> Any:
    return bad_draft(VOCABULARY)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MAIN + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_each_mode_gives_the_tokens_of_the_unsplit_model(name: str, mode: str, pairs: Callable[[str], Pair]) -> None:
    expected, found = pairs(name).both(**MODES[mode])
    assert torch.equal(expected, found)


@pytest.mark.parametrize("mode", ["greedy", "sampling", "several sequences", "beams"])
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name == "jamba" else pytest.mark.slow) for name in RECURRENT]
)
def test_recurrent_architectures_too(name: str, mode: str, pairs: Callable[[str], Pair]) -> None:
    expected, found = pairs(name).both(**MODES[mode])
    assert torch.equal(expected, found)


@pytest.mark.parametrize("sample", [False, True])
@pytest.mark.parametrize("name", MAIN + [pytest.param(name, marks=pytest.mark.slow) for name in MORE])
def test_assisted_decoding(name: str, sample: bool, pairs: Callable[[str], Pair], draft: Any) -> None:
    expected, found = pairs(name).both(**SINGLE, max_new_tokens=20, do_sample=sample, assistant_model=draft)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", MAIN)
def test_a_good_draft_saves_steps(name: str, pairs: Callable[[str], Pair]) -> None:
    pair = pairs(name)
    pair.chain.calls.clear()
    expected, found = pair.both(**SINGLE, max_new_tokens=20, do_sample=False, assistant_model=pair.unsplit)
    assert torch.equal(expected, found)
    assert len(pair.chain.calls) < 15


@pytest.mark.parametrize("name", MAIN)
def test_a_streamer_gets_each_token_as_it_comes(name: str, pairs: Callable[[str], Pair]) -> None:
    class Collector(BaseStreamer):
        def __init__(self) -> None:
            self.pieces: list[Tensor] = []

        def put(self, value: Tensor) -> None:
            self.pieces.append(value.flatten())

        def end(self) -> None:
            self.pieces.append(torch.tensor([-1]))

    heard = []
    for model in (pairs(name).unsplit, pairs(name).head):
        streamer = Collector()
        model.generate(**SINGLE, max_new_tokens=8, do_sample=False, streamer=streamer)
        heard.append(streamer.pieces)
    assert len(heard[1]) == 10
    assert torch.equal(torch.cat(heard[0]), torch.cat(heard[1]))


@pytest.mark.parametrize("name", MAIN)
def test_scores_are_the_same_bits(name: str, pairs: Callable[[str], Pair]) -> None:
    wanted = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
    expected, found = pairs(name).both(**PADDED, max_new_tokens=8, do_sample=False, **wanted)
    assert torch.equal(expected.sequences, found.sequences)
    assert torch.equal(torch.stack(expected.scores), torch.stack(found.scores))
    assert torch.equal(torch.stack(expected.logits), torch.stack(found.logits))


@pytest.mark.parametrize("name", MAIN)
def test_stopping_criteria_see_the_tokens(name: str, pairs: Callable[[str], Pair]) -> None:
    class AtEighteen(StoppingCriteria):
        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((input_ids.shape[0],), input_ids.shape[1] >= 18)

    criteria = StoppingCriteriaList([AtEighteen()])
    expected, found = pairs(name).both(**SINGLE, max_new_tokens=20, do_sample=False, stopping_criteria=criteria)
    assert found.shape[1] == 18
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", MAIN)
def test_from_embeddings(name: str, pairs: Callable[[str], Pair]) -> None:
    embeddings = pairs(name).unsplit.get_input_embeddings()(IDS[:1]).detach()
    expected, found = pairs(name).both(inputs_embeds=embeddings, max_new_tokens=6, do_sample=False)
    assert torch.equal(expected, found)


@pytest.mark.parametrize("name", [*MAIN, "jamba"])
def test_a_second_turn_sends_only_new_tokens(name: str, pairs: Callable[[str], Pair]) -> None:
    pair, cache = pairs(name), RemoteCache()
    first = pair.head.generate(**SINGLE, max_new_tokens=6, do_sample=False, past_key_values=cache)
    assert cache.n_tokens == 12 + 5
    pair.chain.calls.clear()
    asked = torch.cat([first, IDS[1:, :4]], dim=1)
    second = pair.head.generate(inputs=asked, max_new_tokens=6, do_sample=False, past_key_values=cache)
    # the last token of the first answer, which was never fed back, and the four new ones; then five of the answer
    assert [call.tokens for call in pair.chain.calls] == [5, 1, 1, 1, 1, 1]
    assert torch.equal(second, pair.unsplit.generate(inputs=asked, max_new_tokens=6, do_sample=False))


def test_a_second_turn_of_mamba_which_names_its_cache_otherwise(pairs: Callable[[str], Pair]) -> None:
    pair, cache = pairs("mamba2"), RemoteCache()
    expected, found = pair.both(**SINGLE, max_new_tokens=6, do_sample=False)
    assert torch.equal(expected, found)
    pair.head.generate(**SINGLE, max_new_tokens=6, do_sample=False, cache_params=cache)
    assert cache.n_tokens == 12 + 5


def test_what_generation_does_to_a_cache_rides_on_the_next_step(pairs: Callable[[str], Pair], draft: Any) -> None:
    pair = pairs("gemma3_text")
    pair.chain.calls.clear()
    pair.head.generate(**PADDED, max_new_tokens=4, num_beams=3, do_sample=False)
    kinds = [[op.kind for op in call.ops] for call in pair.chain.calls]
    assert kinds == [[], ["reorder"], ["reorder"], ["reorder"]]
    pair.chain.calls.clear()
    pair.head.generate(**SINGLE, max_new_tokens=10, do_sample=False, assistant_model=draft)
    assert pair.chain.calls[0].ops == (CacheOp("record_past"),)
    assert all([op.kind for op in call.ops] == ["crop"] for call in pair.chain.calls[1:])


def test_the_common_case_sends_hidden_states_alone(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("llama")
    pair.chain.calls.clear()
    pair.head.generate(inputs=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False)
    assert pair.chain.calls
    for call in pair.chain.calls:
        assert call.attention_mask is None
        assert call.position_ids is None
        assert not call.ops
        assert not call.extras


def test_padding_is_sent_as_bool_with_positions(pairs: Callable[[str], Pair]) -> None:
    pair = pairs("llama")
    pair.chain.calls.clear()
    pair.head.generate(**PADDED, max_new_tokens=2, do_sample=False)
    for seen, call in zip((0, 12), pair.chain.calls, strict=True):
        assert call.attention_mask is not None and call.position_ids is not None
        assert call.attention_mask.dtype == torch.bool
        assert call.attention_mask.shape == (2, seen + call.tokens)
        assert call.position_ids.shape == (2, call.tokens)
