"""Prompt lookup: what followed when the last tokens of a text stood in it before (pure).

After "Prompt Lookup Decoding" (Saxena, 2023) and transformers' `PromptLookupCandidateGenerator`; the index grows with
the text, so that a look costs the same after ten thousand tokens as after ten.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

LONGEST_NGRAM = 4  # longer matches are found by the last four tokens, and measured token by token
LONGEST_MATCH = 16  # no match is measured further


@dataclass(frozen=True, slots=True)
class Match:
    """The end of the text stood in it before.

    Attributes:
        length: how many tokens agree, at most `LONGEST_MATCH`.
        position: index of the token that followed then.
    """

    length: int
    position: int


class NgramIndex:
    """A text of tokens that grows at its end, and where each run of up to four tokens in it was seen last."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._followers: dict[tuple[int, ...], int] = {}  # of an n-gram: index of the token after its last occurrence
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens. Costs the same for each, however long the text is."""
        text, followers = self._tokens, self._followers
        for token in tokens:
            # The n-grams that end before this token have a follower now, so that the end never matches itself.
            end = len(text)
            for n in range(1, min(LONGEST_NGRAM, end) + 1):
                followers[tuple(text[end - n :])] = end
            text.append(token)

    def match(self) -> Match | None:
        """The latest earlier place of the longest n-gram that the text ends with; None: its last token is new."""
        text = self._tokens
        end = len(text)
        for n in range(min(LONGEST_NGRAM, end), 0, -1):
            position = self._followers.get(tuple(text[end - n :]))
            if position is not None:
                length = n
                while length < min(LONGEST_MATCH, position) and text[position - length - 1] == text[end - length - 1]:
                    length += 1
                return Match(length, position)
        return None

    def continuation(self, match: Match, n: int) -> list[int]:
        """The `n` tokens that followed then; past the end of the text, what repeats goes on repeating."""
        text, period = self._tokens, len(self._tokens) - match.position
        return [text[match.position + i % period] for i in range(n)]
