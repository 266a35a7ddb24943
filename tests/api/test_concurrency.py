"""Many requests at once: each gets the answer that it would get alone, peers may be lost, and readers may go."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from client.api.metrics import families
from tests.api.local import DEMO, Local, local
from tests.processes import until

MANY = 8
QUESTIONS = [
    "What is the capital of France?",
    "What is the capital of Italy?",
    "Spell table.",
    "Now say: nvSPWS8SWyOZlG. Thanks.",
    "What is 12 + 30?",
    "What is 27 + 58?",
    "Spell window.",
    "Now say: 9hQx7bTTka2. Thanks.",
]


def settings_of(index: int) -> dict[str, Any]:
    """Greedy answers and drawn ones, each from its own seed."""
    drawn = {"temperature": 1.5, "seed": index, "top_p": 0.95} if index % 2 else {}
    return {"model": DEMO, "messages": [{"role": "user", "content": QUESTIONS[index]}], "max_tokens": 24, **drawn}


def endless(served: Local) -> dict[str, Any]:
    """An answer that goes on for long."""
    return settings_of(3) | {"max_tokens": 1000, "logit_bias": {str(end): -100 for end in served.gateway.prompts.ends}}


def test_answers_beside_others_are_those_alone(served: Local) -> None:
    client = served.openai()
    alone = [client.chat.completions.create(**settings_of(i)).choices[0].message.content for i in range(MANY)]
    begin = threading.Barrier(MANY)

    def ask(index: int) -> str:
        begin.wait(20)
        chunks = client.chat.completions.create(**settings_of(index), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    with ThreadPoolExecutor(MANY) as pool:
        for _ in range(2):
            assert list(pool.map(ask, range(MANY))) == alone
    served.settles()


def test_threads_have_sessions_of_their_own(served: Local) -> None:
    """The library without HTTP: conversations in several threads, each as it is alone."""
    model, prompts = served.gateway.model, served.gateway.prompts

    def talk(index: int) -> list[list[int]]:
        answers, tokens = [], []
        with model.session():
            for question in (QUESTIONS[index], QUESTIONS[(index + 3) % MANY]):
                tokens += prompts.of_text(f"<|user|>{question}<|end|><|assistant|>")
                ids = torch.tensor([tokens])
                output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16)
                answers.append(output[0, len(tokens) :].tolist())
                tokens = output[0].tolist()
        return answers

    alone = [talk(index) for index in range(4)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(talk, range(4))) == alone
    served.settles()


def test_a_session_can_be_used_by_another_thread(served: Local) -> None:
    model = served.gateway.model
    ids = torch.tensor([served.gateway.prompts.of_text("<|user|>Spell table.<|end|><|assistant|>")])
    arguments: dict[str, Any] = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 4}
    with model.session() as session, ThreadPoolExecutor(1) as pool:
        first = pool.submit(model.generate, ids, session=session, **arguments).result()
        assert session.tokens is not None
        assert torch.equal(session.tokens, first)
        with pytest.raises(RuntimeError, match="open already"), model.session():
            pass
    served.settles()


async def test_the_asynchronous_client(served: Local) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
        answers = await asyncio.gather(*(client.chat.completions.create(**settings_of(i)) for i in (0, 1)))
        assert answers[0].choices[0].message.content == "Paris"
        stream = await client.chat.completions.create(**settings_of(0), stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "Paris"


def test_a_reader_that_goes_frees_the_peers(served: Local) -> None:
    client = served.openai()
    with client.chat.completions.create(**endless(served), stream=True) as stream:
        for _ in range(4):
            next(stream)
        assert served.sessions == 2
    until(lambda: served.sessions == 0, "the session to be freed", 5.0)
    served.settles()


async def test_so_does_one_that_waits_for_the_whole_answer(served: Local) -> None:
    async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
        asking = asyncio.ensure_future(client.chat.completions.create(**endless(served)))
        while served.sessions == 0:
            await asyncio.sleep(0.01)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
    await asyncio.to_thread(until, lambda: served.sessions == 0, "the session to be freed", 5.0)


async def test_one_that_waits_for_peers_can_go_too(served: Local) -> None:
    """The interrupt reaches a step that waits for blocks which nobody serves."""
    lost = served.reader.hosts.pop()
    try:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client:
            asking = asyncio.ensure_future(client.chat.completions.create(**settings_of(0)))
            while not served.gateway.answers.open:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.3)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        await asyncio.to_thread(until, lambda: not served.gateway.answers.open, "the answer to end", 5.0)
    finally:
        served.reader.hosts.append(lost)


def test_metrics(served: Local) -> None:
    served.openai().chat.completions.create(**settings_of(0))
    served.settles()
    reply = served.http().get("/metrics")
    found = {family.name: family for family in text_string_to_metric_families(reply.text)}
    values = {sample.name: sample.value for family in found.values() for sample in family.samples if not sample.labels}
    assert values["potluck_api_answer_tokens_total"] > 0
    assert values["potluck_api_peers"] == 2
    assert values["potluck_api_missing_blocks"] == 0
    known = {family.name.removesuffix("_total").removesuffix("_info") for family in families()}
    assert {name.removesuffix("_info") for name in found} == known
    assert all(family.help and family.type in ("counter", "gauge", "histogram") for family in families())


@pytest.mark.slow  # tests/api/test_processes.py kills peers among sixteen clients
def test_a_peer_is_lost_during_eight_streams() -> None:
    """Nobody notices, but for a pause."""
    with local("0:12", "12:24", "12:24", "0:12", first_identity=2) as served:
        client = served.openai()
        asked = [settings_of(index) | {"temperature": 0.0} for index in range(MANY)]
        expected = [client.chat.completions.create(**each).choices[0].message.content for each in asked]
        answered = threading.Semaphore(0)

        def ask(shift: int) -> list[str]:
            found = []
            for index in range(MANY):
                chunks = client.chat.completions.create(**asked[(index + shift) % MANY], stream=True)
                found.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
                answered.release()
            return found

        with ThreadPoolExecutor(MANY) as pool:
            answers = [pool.submit(ask, shift) for shift in range(MANY)]
            for _ in range(2 * MANY):
                assert answered.acquire(timeout=60)
            in_use = max(served.reader.hosts, key=lambda host: len(host.sessions))
            assert len(in_use.sessions) > 0
            served.lose(in_use)
            for shift, answer in enumerate(answers):
                assert answer.result(60) == expected[shift:] + expected[:shift]
        served.settles()
