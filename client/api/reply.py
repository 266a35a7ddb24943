"""The reply to a request: all its answers, as they come."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from client.api.answer import Answer, Ending, Piece, Said, TokenProb


@dataclass(frozen=True, slots=True)
class Whole:
    """A complete answer."""

    text: str
    probs: tuple[TokenProb, ...]
    ending: Ending


class Reply:
    """All answers to one request, as they come. Belongs to the event loop."""

    def __init__(self, answers: Sequence[Answer], said: asyncio.Queue[Said]) -> None:
        self.answers = tuple(answers)
        self._said = said
        self._ahead: list[Said] = []

    async def begun(self, timeout_s: float) -> None:
        """Returns when there is something to hear, or after so long.

        Raises:
            PotluckError: the first thing was that it failed.
        """
        if (first := await self._next(timeout_s)) is not None:
            if isinstance(first[1], Exception):
                raise first[1]
            self._ahead.append(first)

    async def heard(self, idle_s: float) -> AsyncIterator[tuple[int, Piece | Ending] | None]:
        """Pieces and endings, each with the number of its answer, until all have ended; None after silence of `idle_s`.

        Raises:
            PotluckError: the swarm could not answer.
        """
        left = len(self.answers)
        while left:
            said = self._ahead.pop() if self._ahead else await self._next(idle_s)
            if said is None:
                yield None
                continue
            index, what = said
            if isinstance(what, Exception):
                raise what
            left -= isinstance(what, Ending)
            yield index, what

    async def whole(self) -> list[Whole]:
        """All of all answers.

        Raises: as `heard`.
        """
        texts: list[list[Piece]] = [[] for _ in self.answers]
        endings: dict[int, Ending] = {}
        async for said in self.heard(math.inf):
            assert said is not None
            index, what = said
            if isinstance(what, Ending):
                endings[index] = what
            else:
                texts[index].append(what)
        return [
            Whole(
                "".join(piece.text for piece in pieces), tuple(p for piece in pieces for p in piece.probs), endings[i]
            )
            for i, pieces in enumerate(texts)
        ]

    def cancel(self) -> None:
        """Whatever is still under way ends now."""
        for answer in self.answers:
            if answer.ending is None:
                answer.cancel()

    async def _next(self, timeout_s: float) -> Said | None:
        try:
            async with asyncio.timeout(timeout_s if timeout_s < math.inf else None):
                return await self._said.get()
        except TimeoutError:
            return None
