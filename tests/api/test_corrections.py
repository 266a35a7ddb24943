"""What the gateway does with an answer in which a peer lied: real peers, audits of every step, the official client."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import openai
import pytest

from tests.api.local import CLIENT, DEMO, Local, local
from tests.harness import identity
from tests.liars import Liar, honest, lies_from

MESSAGES: list[Any] = [{"role": "user", "content": "Now say: nvSPWS8SWyOZlG. Thanks."}]
SPANS = ("0:12", "12:24", "12:24", "12:24")
LIAR = 1
FIRST = 4  # the first step that is a lie: 0 is the prompt


@dataclass
class Served:
    """A gateway that audits every step, and prefers one peer, which may lie."""

    local: Local
    liar: Liar

    def ask(self, **more: Any) -> Any:
        return self.local.openai().chat.completions.create(
            model=DEMO, messages=MESSAGES, logprobs=True, top_logprobs=2, **more
        )

    @property
    def avoided(self) -> frozenset[str]:
        return frozenset(self.local.gateway.model.swarm.blame.avoided())


@pytest.fixture
def served() -> Iterator[Served]:
    """Each test has a swarm of its own: a liar is avoided for an hour."""
    route = tuple(identity(index).peer_id for index in (0, LIAR))
    with local(*SPANS, client=replace(CLIENT, audit=1.0, route=route, speculate="off")) as running:
        yield Served(running, Liar(running.hosts[LIAR]))


def content(answer: Any) -> tuple[str, list[tuple[str, float]]]:
    """Its text, and each token with its logarithmic probability."""
    (choice,) = answer.choices
    return choice.message.content, [(each.token, each.logprob) for each in choice.logprobs.content]


def test_an_answer_that_nobody_has_seen_yet_is_made_again(served: Served) -> None:
    before = served.ask()
    assert not served.avoided
    served.liar.lie = lies_from(FIRST)
    after = served.ask()
    assert served.avoided == {identity(LIAR).peer_id}, "it was in the chain, and lied"
    assert content(after) == content(before), "neither text nor tokens of the first try are left"
    assert after.usage == before.usage and after.choices[0].finish_reason == before.choices[0].finish_reason
    served.local.settles()


def test_a_stream_ends_with_the_first_token_in_doubt(served: Served) -> None:
    wanted = [token for token, _ in content(served.ask())[1]]
    served.liar.lie = lies_from(FIRST)
    seen: list[str] = []
    with pytest.raises(openai.APIError) as caught:
        for chunk in served.ask(stream=True):
            seen += [each.token for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content]
            assert all(choice.finish_reason is None for choice in chunk.choices), "it has no proper end"
    assert caught.value.code == "doubted"
    told = re.search(r"wrong from its token (\d+) on", caught.value.message)
    assert told is not None and int(told[1]) == FIRST, caught.value.message
    assert seen[:FIRST] == wanted[:FIRST], "what came before is right"
    assert served.avoided == {identity(LIAR).peer_id}
    served.liar.lie = honest
    again = list(served.ask(stream=True))
    assert "".join(c.delta.content or "" for chunk in again for c in chunk.choices) == "".join(wanted)
    served.local.settles()
