"""Chat completions through the official client."""

from __future__ import annotations

from typing import Any

from tests.api.local import DEMO, Local

QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]


def test_an_answer(served: Local) -> None:
    answer = served.openai().chat.completions.create(model=DEMO, messages=QUESTION)
    (choice,) = answer.choices
    assert choice.message.content == "Paris"
    assert choice.finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    served.settles()


def test_a_stream_is_the_same_answer(served: Local) -> None:
    stream = served.openai().chat.completions.create(
        model=DEMO, messages=QUESTION, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "Paris"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None
