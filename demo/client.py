"""The demo's client: it joins, asks, and takes the time of every token. Prints nothing."""

from __future__ import annotations

import asyncio
import contextlib
import statistics
import time
from collections.abc import AsyncIterator, Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from demo.swarm import LOOK_EVERY_S, DemoFailed, LocalSwarm
from protocol.command import importing
from protocol.errors import SwarmNotFound

if TYPE_CHECKING:
    from client.chain import Link
    from client.model import SwarmModel

SEEN_TIMEOUT_S = 20.0
"""For the client to see a peer that is ready."""
ANSWER_TIMEOUT_S = 30.0
"""For a whole answer, a recovery included."""
MAX_NEW_TOKENS = 64

AfterToken = Callable[[int, "tuple[Link, ...]"], None]
"""Called with the number of the token that came, from 1, and the chain that gave it."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What the client got: the text, its tokens, when each came [s, monotonic], and the chain that gave the last."""

    text: str
    tokens: tuple[int, ...]
    came_s: tuple[float, ...]
    chain: tuple[Link, ...]

    def pause_s(self, n: int) -> float:
        """Seconds between the n-th token (from 1) and the next."""
        return self.came_s[n] - self.came_s[n - 1]

    @property
    def usual_pause_s(self) -> float:
        """The median of the seconds between two tokens."""
        return statistics.median(b - a for a, b in zip(self.came_s, self.came_s[1:], strict=False))


class Client:
    """The demo's client. Blocking work is done in threads: transformers' `generate` is ordinary blocking code."""

    def __init__(self, opening: asyncio.Task[SwarmModel], events: list[str]) -> None:
        self._opening = opening
        self._tokenizer: Any = None
        self.events = events  # what the client said of its chains, in order

    async def model(self) -> SwarmModel:
        """The model, once the client has joined."""
        return await asyncio.shield(self._opening)

    async def sees(self, peer_ids: Collection[str]) -> None:
        """Wait until all these peers are online in the client's eyes.

        Raises:
            DemoFailed: they were not in time.
        """
        model = await self.model()
        try:
            async with asyncio.timeout(SEEN_TIMEOUT_S):
                while not set(peer_ids) <= await asyncio.to_thread(_online, model):  # noqa: ASYNC110  # asks the swarm
                    await asyncio.sleep(LOOK_EVERY_S)
        except TimeoutError:
            raise DemoFailed(f"the client did not see all peers within {SEEN_TIMEOUT_S:g} s") from None

    async def ask(
        self, text: str, on_text: Callable[[str], None], after_token: AfterToken = lambda n, chain: None
    ) -> Answer:
        """Ask one question in a session of its own.

        Args:
            on_text: told each new piece of the answer.

        Raises:
            DemoFailed: there was no whole answer in time.
        """
        model = await self.model()
        try:
            async with asyncio.timeout(ANSWER_TIMEOUT_S):
                return await asyncio.to_thread(self._ask, model, text, on_text, after_token)
        except TimeoutError:
            raise DemoFailed(f"there was no whole answer within {ANSWER_TIMEOUT_S:g} s") from None

    def _ask(self, model: SwarmModel, text: str, on_text: Callable[[str], None], after_token: AfterToken) -> Answer:
        import torch

        from client.text import encode_messages, load_tokenizer

        tokenizer = self._tokenizer = self._tokenizer or load_tokenizer(model.source)
        ids = encode_messages(tokenizer, [{"role": "user", "content": text}])
        stream = _TokenStream(tokenizer, on_text, lambda n: after_token(n, model.chain))
        model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW_TOKENS, do_sample=False, streamer=stream
        )
        return Answer(stream.text, tuple(stream.tokens), tuple(stream.came_s), model.chain)


class _TokenStream:
    """A streamer for `generate` that takes the time of every token and shows text at once, not word by word."""

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None], after_token: Callable[[int], None]) -> None:
        self._tokenizer, self._on_text, self._after_token = tokenizer, on_text, after_token
        self._prompt_seen = False
        self.tokens: list[int] = []
        self.came_s: list[float] = []
        self.text = ""

    def put(self, value: Any) -> None:
        if not self._prompt_seen:  # the first call brings the prompt
            self._prompt_seen = True
            return
        self.came_s.append(time.monotonic())
        self.tokens += value.flatten().tolist()
        text = str(self._tokenizer.decode(self.tokens, skip_special_tokens=True))
        if not text.endswith("\ufffd"):  # else half a character
            new, self.text = text[len(self.text) :], text
            self._on_text(new)
        self._after_token(len(self.tokens))

    def end(self) -> None:
        """The answer is complete."""


@contextlib.asynccontextmanager
async def joining(swarm: LocalSwarm) -> AsyncIterator[Client]:
    """A client that joins `swarm` while the body runs already; it leaves with the context."""
    events: list[str] = []
    opening = asyncio.create_task(asyncio.to_thread(_join, swarm.model, swarm.maddr, events.append))
    try:
        yield Client(opening, events)
    finally:
        # Importing and joining cannot be interrupted: they are waited for, and undone.
        await asyncio.wait([opening])
        if opening.exception() is None:
            await asyncio.to_thread(opening.result().close)


def _join(model: str, maddr: str, on_event: Callable[[str], None]) -> SwarmModel:
    with importing():
        import torch

        from client.model import SwarmModelForCausalLM

    torch.set_num_threads(1)  # as the peers do: more threads than cores would only wait for each other
    return SwarmModelForCausalLM.from_pretrained(model, join=[maddr], on_event=on_event)


def _online(model: SwarmModel) -> set[str]:
    """The peers that take new sessions, as the swarm says now; none where it does not answer."""
    try:
        view = model.swarm.refresh()
    except SwarmNotFound:
        return set()
    return {peer.peer_id for listed in view.models for peer in view.online(listed.fingerprint)}
