"""The embedded model: it answers, it forgets nothing of any text, and no broken chain passes for the right one."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo.chains import broken_chains, shared_blocks
from demo.evaluate import MODEL, accuracy, drops, load, prompt, right_answers, with_chain
from demo.tokenizer import build_tokenizer
from demo.world import Question, questions

Loaded = tuple[LlamaForCausalLM, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return load()


SURE_POINTS = 5  # more than a broken chain can win back where the right one errs
TOKENIZER = PreTrainedTokenizerFast.from_pretrained(MODEL)


def generated(loaded: Loaded, asked: list[Question]) -> list[str]:
    """Greedy answers, from left-padded batches and with the KV cache."""
    model, tokenizer = loaded
    batch = tokenizer([prompt(tokenizer, q) for q in asked], return_tensors="pt", padding=True)
    out = model.generate(**batch, max_new_tokens=100)  # type: ignore[misc]
    answers = out[:, batch["input_ids"].shape[1] :]
    return [str(tokenizer.decode(answer, skip_special_tokens=True)) for answer in answers]


def test_it_fits_the_repository() -> None:
    assert (MODEL / "model.safetensors").stat().st_size <= 16 * 2**20
    assert {path.name for path in MODEL.iterdir()} == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors",
        "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip


def test_its_shape(loaded: Loaded) -> None:
    model, tokenizer = loaded
    assert len(model.model.layers) == 24
    assert sum(p.numel() for p in model.parameters()) <= 4_000_000
    assert model.dtype == torch.float32
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_it_answers_held_out_questions(loaded: Loaded) -> None:
    shares = accuracy(*loaded, questions(1, 480, "held_out"))
    assert shares["overall"] >= 0.95, shares


def test_it_answers_in_a_conversation(loaded: Loaded) -> None:
    earlier = questions(2, 3, "held_out")
    before = "".join(prompt(TOKENIZER, q) + q.answer + str(TOKENIZER.eos_token) for q in earlier)
    shares = accuracy(*loaded, questions(3, 240, "held_out"), before=before)
    assert shares["overall"] >= 0.90, shares


@pytest.mark.slow
def test_teacher_forcing_judges_like_generate(loaded: Loaded) -> None:
    model, tokenizer = loaded
    sample = questions(4, 48, "held_out")
    answers = generated(loaded, sample)
    assert right_answers(model, tokenizer, sample) == [a == q.answer for a, q in zip(answers, sample, strict=True)]


@pytest.mark.slow
def test_every_broken_chain_costs_20_points(loaded: Loaded) -> None:
    """Of 64 questions. A chain that has lost more already is not asked the rest; short ones come first."""
    sample = sorted(questions(5, 64, "held_out"), key=lambda q: len(prompt(TOKENIZER, q) + q.answer))
    lost = dict.fromkeys(broken_chains(24), 0.0)
    undecided = set(lost)
    for part in (sample[:24], sample[24:44], sample[44:]):
        for drop in drops(*loaded, part, names=undecided):
            lost[drop.chain] += drop.points * len(part) / len(sample)
        undecided = {chain for chain in undecided if lost[chain] < 20 + SURE_POINTS}
    assert not {chain: points for chain, points in lost.items() if points < 20}


SLOW = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    ["swap 12,13", *(pytest.param(name, marks=SLOW) for name in ("skip 11", "repeat 23", "repeat 22,23"))],
)
def test_broken_chains_are_judged_like_generate(loaded: Loaded, name: str) -> None:
    sample = questions(6, 24, "held_out")
    order = broken_chains(24)[name]
    (drop,) = drops(*loaded, sample, names={name})
    with with_chain(loaded[0], order):
        answers = generated(loaded, sample)
    assert drop.accuracy == sum(a == q.answer for a, q in zip(answers, sample, strict=True)) / len(sample)
    assert len(loaded[0].model.layers) == 24


def test_broken_chains_cover_every_block_and_pair() -> None:
    chains = broken_chains(24)
    assert len(chains) == 24 * 2 + 23 * 3
    assert len(set(chains.values())) == len(chains)
    right = tuple(range(24))
    for order in chains.values():
        assert order != right and order[: shared_blocks(order)] == right[: shared_blocks(order)]


@given(st.text())
def test_text_survives_the_tokenizer(text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER.decode(ids, clean_up_tokenization_spaces=False) == text


@given(st.text(alphabet=st.sampled_from(" what is the capital Name of?.,'n't "), max_size=30))
def test_spaces_and_words_survive_the_tokenizer(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_digits_and_names_are_several_tokens_and_words_are_one() -> None:
    pieces = TOKENIZER.tokenize("What is the capital of Peru? 42")
    assert pieces == ["What", "Ġis", "Ġthe", "Ġcapital", "Ġof", "Ġ", *"Peru?", "Ġ", "4", "2"]


def test_the_stored_tokenizer_is_the_built_one() -> None:
    built = build_tokenizer()
    assert built.get_vocab() == TOKENIZER.get_vocab()
    assert built.chat_template == TOKENIZER.chat_template


def test_chat_template() -> None:
    conversation: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Add 1 and 2."},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": [{"type": "text", "text": "Spell moon."}]},
    ]
    shown = TOKENIZER.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True)
    assert shown == "<|user|>Add 1 and 2.<|end|><|assistant|>3<|end|><|user|>Spell moon.<|end|><|assistant|>"
    shown = TOKENIZER.apply_chat_template(conversation[:2], tokenize=False)
    assert shown == "<|user|>Add 1 and 2.<|end|>"


def test_the_model_card_says_what_was_measured(loaded: Loaded) -> None:
    card = Path(MODEL / "README.md").read_text()
    claimed = re.search(r"\| overall \|\s*\d+ \|\s*([\d.]+)", card)
    assert claimed and float(claimed[1]) >= 95
