"""Tokens become text as they come: a character that several tokens make is shown once it is whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BROKEN = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show bytes that are no character yet
MOST_PENDING = 64  # tokens; no character has as many, so what is broken then stays broken


class Detokenizer:
    """The text of one answer.

    How a token reads depends on those around it (spaces, bytes of one character). So a few tokens before it are decoded
    with it, and what they gave alone is cut off.

    Args:
        tokenizer: a Hugging Face tokenizer.
        keeps_special: write special tokens too.
    """

    def __init__(self, tokenizer: Any, *, keeps_special: bool = False) -> None:
        self._tokenizer = tokenizer
        self._skips = not keeps_special
        self._shown: list[int] = []  # tokens whose text was given out: as many as the next ones need beside them
        self._pending: list[int] = []  # those after them, whose text may not be whole
        self._given = 0  # characters of it that were given out already

    def add(self, token: int) -> str:
        """The text that this token makes known: often a word, sometimes nothing."""
        self._pending.append(token)
        text = self._text()
        whole = text.rstrip(BROKEN) if len(self._pending) < MOST_PENDING else text
        new = whole[self._given :]
        if text and whole == text:
            self._shown, self._pending, self._given = self._pending, [], 0
        else:
            self._given = len(whole)
        return new

    def end(self) -> str:
        """What is left when no more tokens come."""
        text = self._text()[self._given :]
        self._pending, self._given = [], 0
        return text

    def _text(self) -> str:
        """What the pending tokens add to those before them."""
        before = self._decode(self._shown)
        return self._decode([*self._shown, *self._pending])[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return str(self._tokenizer.decode(tokens, skip_special_tokens=self._skips)) if tokens else ""
