"""Strings that end an answer. They come in pieces: what may become one is held back until that is known. Pure."""

from __future__ import annotations

from collections.abc import Collection


class Stops:
    """Watches one answer for strings that end it.

    Attributes:
        found: the one that came first; None: none so far.
        rest: what came with it and after it.
    """

    def __init__(self, strings: Collection[str]) -> None:
        self.found: str | None = None
        self.rest = ""
        self._strings = tuple(strings)
        self._held = ""

    def add(self, text: str) -> str:
        """More of the answer. Returns what can be shown now; nothing any more once one is found."""
        if self.found is not None:
            return ""
        if not self._strings:
            return text
        held = self._held + text
        places = [(at, -len(string), string) for string in self._strings if (at := held.find(string)) >= 0]
        if places:
            at, _, self.found = min(places)
            self.rest, self._held = held[at + len(self.found) :], ""
            return held[:at]
        kept = max(_overlap(held, string) for string in self._strings)
        self._held = held[len(held) - kept :]
        return held[: len(held) - kept]

    def end(self) -> str:
        """What was held back for nothing."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """How many characters at the end of `text` may be the beginning of `string`."""
    longest = min(len(text), len(string) - 1)
    return next((n for n in range(longest, 0, -1) if string.startswith(text[-n:])), 0)
