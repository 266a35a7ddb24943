"""Chat completions through the official client."""

from __future__ import annotations

import json
import math
from typing import Any

import openai
import pytest

from tests.api.local import DEMO, Local

Messages = list[Any]


def said(text: str) -> Messages:
    return [{"role": "user", "content": text}]


QUESTION = said("What is the capital of France?")
LONG = said("Now say: nvSPWS8SWyOZlG. Thanks.")
REPETITIVE = said("Now say: zzzzzzzzzzzz. Thanks.")


def ask(served: Local, messages: Messages = QUESTION, **more: Any) -> Any:
    return served.openai().chat.completions.create(model=DEMO, messages=messages, **more)


def text_of(chunks: list[Any], index: int = 0) -> str:
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(delta.content or "" for delta in deltas)


def test_an_answer(served: Local) -> None:
    answer = ask(served)
    (choice,) = answer.choices
    assert choice.message.content == "Paris"
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is None
    assert answer.model == DEMO
    tokenizer = served.gateway.prompts.tokenizer
    assert answer.usage.completion_tokens == len(tokenizer("Paris")["input_ids"]) + 1  # and the end
    assert answer.usage.prompt_tokens == len(served.gateway.prompts.tokenizer(QUESTION[0]["content"])["input_ids"]) + 3
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    served.settles()


def test_a_stream_is_the_same_answer(served: Local) -> None:
    chunks = list(ask(served, stream=True, stream_options={"include_usage": True}))
    assert text_of(chunks) == "Paris"
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == "stop"
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == ask(served).usage


def test_parts_and_roles(served: Local) -> None:
    parts = [{"type": "text", "text": "What is the capital "}, {"type": "text", "text": "of France?"}]
    messages = [{"role": "developer", "content": "Be brief."}, {"role": "user", "content": parts}]
    assert ask(served, messages).choices[0].message.content == "Paris"


def test_an_answer_that_is_cut_says_so(served: Local) -> None:
    answer = ask(served, LONG, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    whole = ask(served, LONG)
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].message.content.startswith(answer.choices[0].message.content)
    assert ask(served, LONG, max_completion_tokens=3).usage.completion_tokens == 3


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings(served: Local, stream: bool) -> None:
    whole = ask(served, LONG).choices[0].message.content
    stop = whole[3:6]
    expected = whole.partition(stop)[0]
    found = ask(served, LONG, stop=[stop, "nothing like it"], stream=stream)
    if stream:
        chunks = list(found)
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert found.choices[0].message.content == expected
        assert found.choices[0].finish_reason == "stop"


def test_probabilities(served: Local) -> None:
    content = ask(served, logprobs=True, top_logprobs=3).choices[0].logprobs.content
    assert "".join(token.token for token in content) == "Paris"
    for token in content:
        assert bytes(token.bytes).decode() == token.token
        assert [top.logprob for top in token.top_logprobs] == sorted(
            (t.logprob for t in token.top_logprobs), reverse=True
        )
        assert token.top_logprobs[0].token == token.token  # greedy
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1.0001
    chunks = list(ask(served, logprobs=True, stream=True))
    streamed = [t for chunk in chunks for c in chunk.choices if c.logprobs for t in c.logprobs.content]
    assert [token.token for token in streamed] == [token.token for token in content]


def test_several_choices_have_seeds_of_their_own(served: Local) -> None:
    settings: dict[str, Any] = {"temperature": 2.0, "max_tokens": 12, "seed": 5}
    first = ask(served, LONG, n=3, **settings)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len(set(texts)) > 1
    assert first.usage.prompt_tokens == ask(served, LONG, max_tokens=1).usage.prompt_tokens
    chunks = list(ask(served, LONG, n=3, stream=True, **settings))
    assert [text_of(chunks, index) for index in range(3)] == texts


def test_penalties_bias_and_cuts_change_answers(served: Local) -> None:
    tokenizer = served.gateway.prompts.tokenizer
    first = tokenizer("Paris")["input_ids"][0]
    assert not ask(served, logit_bias={str(first): -100}).choices[0].message.content.startswith("Paris")
    whole = ask(served, LONG).choices[0].message.content
    penalties = {"frequency_penalty": 2.0, "presence_penalty": 2.0}
    plain, penalized = (ask(served, REPETITIVE, **more).choices[0].message.content for more in ({}, penalties))
    assert penalized.count("z") < plain.count("z")
    for settings in ({"top_k": 1}, {"min_p": 1.0}):
        extra = {"temperature": 2.0, "extra_body": settings}
        assert ask(served, LONG, **extra).choices[0].message.content == whole
    assert ask(served, LONG, temperature=2.0, top_p=1e-6).choices[0].message.content == whole


SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "sure": {"type": "boolean"}},
    "required": ["city", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_an_answer_that_follows_a_schema(served: Local, temperature: float) -> None:
    wanted = {"type": "json_schema", "json_schema": {"name": "city", "schema": SCHEMA, "strict": True}}
    answer = ask(served, response_format=wanted, temperature=temperature, max_tokens=64, seed=1)
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content)
    assert found["city"] in ("Paris", "Rome")
    assert isinstance(found["sure"], bool)


def test_json_mode(served: Local) -> None:
    answer = ask(served, response_format={"type": "json_object"}, max_tokens=400)
    if answer.choices[0].finish_reason == "stop":
        assert isinstance(json.loads(answer.choices[0].message.content), dict)
    else:
        assert answer.choices[0].message.content.startswith("{")


TEMPLATE = (
    "{% if tools %}<tool_call> {{ tools | tojson }}{% endif %}"
    "{% for message in messages %}<|user|>{{ message.content }}<|end|>{% endfor %}<|assistant|>"
)
TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"enum": ["Paris", "Rome"]}},
                "required": ["city"],
                "additionalProperties": False,
            },
        },
    }
]


def test_tools_are_refused_where_the_template_knows_none(served: Local) -> None:
    with pytest.raises(openai.BadRequestError, match="knows no tools") as caught:
        ask(served, tools=TOOLS)
    assert caught.value.param == "tools"
    assert ask(served, tools=TOOLS, tool_choice="none").choices[0].message.content == "Paris"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_is_called(served: Local, stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.gateway.prompts.tokenizer, "chat_template", TEMPLATE)
    found = ask(served, tools=TOOLS, tool_choice="required", max_tokens=200, stream=stream)
    if stream:
        chunks = list(found)
        (call,) = [call for c in chunks for call in c.choices[0].delta.tool_calls or []]
        reason = chunks[-1].choices[0].finish_reason
        assert text_of(chunks) == ""
    else:
        (call,) = found.choices[0].message.tool_calls
        reason = found.choices[0].finish_reason
        assert found.choices[0].message.content is None
    assert reason == "tool_calls"
    assert call.function.name == "weather"
    assert json.loads(call.function.arguments)["city"] in ("Paris", "Rome")


def test_a_stream_may_carry_traces(served: Local) -> None:
    chunks = list(ask(served, LONG, stream=True, extra_body={"potluck": {"trace": True}}))
    traces = [chunk.model_extra["potluck"] for chunk in chunks if "potluck" in (chunk.model_extra or {})]
    peers = [(host.identity.peer_id, str(host.model.span)) for host in served.hosts]
    assert [(hop["peer_id"], hop["blocks"]) for hop in traces[-1]["chain"]] == peers
    assert all(hop["ms"] > 0 for hop in traces[-1]["chain"])
    assert (traces[-1]["reroutes"], traces[-1]["events"]) == (0, [])
    assert traces[-1]["tokens"] > 1
