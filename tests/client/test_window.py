"""The rule in simulated answers: never slower than plain, and as fast as theory says where guesses are right."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from client.ngrams import NgramIndex
from client.window import MODEL, Window, expected_tokens, kind_of

ANSWER = 128
NETWORKS_S = st.floats(0.0, 0.4)


class Chain:
    """A chain whose steps take known times: `network_s`, and computation that a second row makes dearer."""

    def __init__(self, network_s: float, work_s: float, second: float, row: float) -> None:
        self.network_s, self.work_s, self.second, self.row = network_s, work_s, second, row

    def work(self, tokens: int) -> float:
        return self.work_s * (1.0 if tokens == 1 else 1.0 + self.second + self.row * (tokens - 2))

    def step_s(self, tokens: int) -> float:
        return self.network_s + self.work(tokens)


chains = st.builds(Chain, NETWORKS_S, st.floats(0.005, 0.1), st.floats(0.0, 1.2), st.floats(0.0, 0.3))


def speed_up(chain: Chain, window: Window, prompt: list[int], answer: list[int]) -> float:
    """Plain time over time with prompt lookup, of one answer after its first token."""
    index = NgramIndex([*prompt, answer[0]])
    window = window.begin()
    done, spent_s = 1, 0.0
    while done < len(answer):
        match = index.match()
        guessed: list[int] = []
        first: int | None = None
        if match is not None:
            k = window.choose(kind_of(match.length), len(answer) - done - 1)
            tokens = index.continuation(match, max(1, k))
            first, guessed = tokens[0], tokens[:k]
        pairs = zip(guessed, answer[done:], strict=False)
        right = next((i for i, (a, b) in enumerate(pairs) if a != b), len(guessed))
        step_s = chain.step_s(len(guessed) + 1)
        spent_s += step_s
        window.note_step(len(guessed), right, step_s, chain.work(len(guessed) + 1))
        if match is not None:
            tried, hits = (len(guessed), right) if guessed else (1, int(first == answer[done]))
            window.acceptance.note(kind_of(match.length), hits, missed=hits < tried)
        index.extend(answer[done : done + right + 1])
        done += right + 1
    return (len(answer) - 1) * chain.step_s(1) / spent_s


def random_text(rng: Random, vocabulary: int) -> Iterator[int]:
    while True:
        yield rng.randrange(vocabulary)


@settings(deadline=None, max_examples=150)
@given(chains, st.integers(0, 10**6), st.sampled_from([2, 3, 5, 20, 300]))
def test_random_text_loses_nothing(chain: Chain, seed: int, vocabulary: int) -> None:
    text = random_text(Random(seed), vocabulary)
    prompt = [next(text) for _ in range(100)]
    answer = [next(text) for _ in range(ANSWER)]
    assert speed_up(chain, Window(), prompt, answer) >= 0.95


@settings(deadline=None, max_examples=50)
@given(chains, st.integers(0, 10**6))
def test_text_that_turns_random_loses_nothing(chain: Chain, seed: int) -> None:
    """What was learned on text that repeats is wrong then."""
    text, window = random_text(Random(seed), 8), Window()
    copied = [next(text) for _ in range(ANSWER)]
    speed_up(chain, window, copied, copied)
    prompt = [next(text) for _ in range(100)]
    answer = [next(text) for _ in range(ANSWER)]
    assert speed_up(chain, window, prompt, answer) >= 0.95


@pytest.mark.parametrize(("network_s", "least"), [(0.2, 6.0), (0.0, 2.0)])
def test_copied_text_gains(network_s: float, least: float) -> None:
    copied = [Random(1).randrange(10**9) for _ in range(1)] + Random(2).sample(range(10**6), ANSWER - 1)
    chain = Chain(network_s, 0.02, second=0.8, row=0.05)
    window = Window()
    speed_up(chain, window, copied, copied)
    assert speed_up(chain, window, copied, copied) >= least


def test_what_theory_chooses() -> None:
    """With times that are known, the window is the k that makes E(k) / T(k + 1) largest."""
    chain, window = Chain(0.2, 0.02, second=1.0, row=0.1), Window()
    for tokens in [1] * 50 + [2, 8, 32] * 30:
        window.costs.note(tokens, chain.step_s(tokens), chain.work(tokens))
    window.note_step(0, 0, chain.step_s(1), chain.work(1))
    for right in [5, 6, 4, 5] * 20:
        window.acceptance.note(MODEL, right, missed=True)
    acceptance = window.acceptance.of(MODEL)
    best = max(range(33), key=lambda k: expected_tokens(acceptance, k) / chain.step_s(k + 1))
    assert window.choose(MODEL, 32) == pytest.approx(best, abs=1)
    assert 3 < best < 20


def test_nothing_is_guessed_before_a_plain_step() -> None:
    assert Window().choose(kind_of(16), 32) == 0


def test_a_slow_draft_model_is_not_asked() -> None:
    window = Window()
    window.note_step(0, 0, 0.05, 0.01)
    assert window.choose(MODEL, 32, draft_s=0.05) == 0
