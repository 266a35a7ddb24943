"""Completions of bare texts and tokens."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from tests.api.local import DEMO, Local

PROMPT = "<|user|>What is the capital of France?<|end|><|assistant|>"


def complete(served: Local, prompt: Any = PROMPT, **more: Any) -> Any:
    return served.openai().completions.create(model=DEMO, prompt=prompt, **more)


def test_a_text_goes_on(served: Local) -> None:
    found = complete(served)
    assert found.choices[0].text == "Paris"
    assert found.choices[0].finish_reason == "stop"
    ids = served.gateway.prompts.tokenizer(PROMPT)["input_ids"]
    assert found.usage.prompt_tokens == len(ids)
    assert complete(served, ids).choices[0].text == "Paris"


def test_sixteen_tokens_where_nothing_is_said(served: Local) -> None:
    found = complete(served, logit_bias={str(end): -100 for end in served.gateway.prompts.ends})
    assert found.usage.completion_tokens == 16
    assert found.choices[0].finish_reason == "length"


def test_the_prompt_may_be_repeated(served: Local) -> None:
    assert complete(served, "Spell table.", echo=True, max_tokens=2).choices[0].text.startswith("Spell table.")
    chunks = list(complete(served, "Spell table.", echo=True, max_tokens=2, stream=True))
    assert "".join(c.choices[0].text for c in chunks).startswith("Spell table.")


def test_several_prompts(served: Local) -> None:
    other = PROMPT.replace("France", "Italy")
    found = complete(served, [PROMPT, other], n=2)
    assert [choice.text for choice in found.choices] == ["Paris", "Paris", "Rome", "Rome"]
    assert (
        found.usage.prompt_tokens == complete(served).usage.prompt_tokens + complete(served, other).usage.prompt_tokens
    )
    ids = [served.gateway.prompts.tokenizer(prompt)["input_ids"] for prompt in (PROMPT, other)]
    assert [choice.text for choice in complete(served, ids).choices] == ["Paris", "Rome"]


def test_probabilities(served: Local) -> None:
    found = complete(served, logprobs=2).choices[0].logprobs
    assert "".join(found.tokens) == "Paris"
    assert found.text_offset == [sum(map(len, found.tokens[:i])) for i in range(len(found.tokens))]
    assert all(
        len(top) == 2 and max(top, key=top.get) == t for top, t in zip(found.top_logprobs, found.tokens, strict=True)
    )
    assert all(value <= 0 for value in found.token_logprobs)


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [5, 10**6]}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"best_of": 3}, None),
        ({"echo": True, "logprobs": 1}, None),
    ],
)
def test_what_is_refused(served: Local, settings: dict[str, Any], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        complete(served, **settings)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
