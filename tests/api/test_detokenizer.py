"""Pieces add up to the text, and no broken character is shown."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.api.detokenizer import BROKEN, Detokenizer
from client.text import load_tokenizer
from slicing import resolve


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_tokenizer(resolve("potluck-demo"))


def pieces(tokenizer: Any, tokens: list[int], **settings: Any) -> list[str]:
    detokenizer = Detokenizer(tokenizer, **settings)
    return [*(detokenizer.add(token) for token in tokens), detokenizer.end()]


@given(st.text(max_size=40))
def test_pieces_add_up(tokenizer: Any, text: str) -> None:
    tokens = tokenizer(text)["input_ids"]
    assert "".join(pieces(tokenizer, tokens)) == tokenizer.decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("text", ["naïve café", "日本語のテキスト", "👩‍👩‍👧‍👦 and 🎉"])
def test_characters_come_whole(tokenizer: Any, text: str) -> None:
    found = pieces(tokenizer, tokenizer(text)["input_ids"])
    assert "".join(found) == text
    assert not any(BROKEN in piece for piece in found)


def test_bytes_that_are_no_text_are_shown_in_the_end(tokenizer: Any) -> None:
    tokens = tokenizer("🎉")["input_ids"]
    found = pieces(tokenizer, tokens[:-1])
    assert "".join(found[:-1]) == ""
    assert BROKEN in found[-1]


def test_special_tokens(tokenizer: Any) -> None:
    end = tokenizer.eos_token_id
    tokens = [*tokenizer("yes")["input_ids"], end, *tokenizer("no")["input_ids"]]
    assert "".join(pieces(tokenizer, tokens)) == "yesno"
    assert "".join(pieces(tokenizer, tokens, keeps_special=True)) == "yes<|end|>no"
