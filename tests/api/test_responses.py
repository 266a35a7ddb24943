"""The Responses API, without a memory, through the official client."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

from tests.api.local import DEMO, Local
from tests.api.test_chat import SCHEMA, TEMPLATE

QUESTION = "What is the capital of France?"


def respond(served: Local, given: Any = QUESTION, **more: Any) -> Any:
    return served.openai().responses.create(model=DEMO, input=given, **more)


def test_an_answer(served: Local) -> None:
    found = respond(served)
    assert found.output_text == "Paris"
    assert found.status == "completed"
    assert found.usage.total_tokens == found.usage.input_tokens + found.usage.output_tokens
    assert found.output[0].content[0].type == "output_text"


def test_a_conversation(served: Local) -> None:
    given = [
        {"role": "user", "content": [{"type": "input_text", "text": "What is the capital of Italy?"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "Rome"}]},
        {"role": "user", "content": QUESTION},
    ]
    assert respond(served, given, instructions="Be brief.").output_text == "Paris"


def test_a_cut_answer_is_incomplete(served: Local) -> None:
    found = respond(served, "Count from 1 to 9.", max_output_tokens=2)
    assert found.status == "incomplete"
    assert found.incomplete_details.reason == "max_output_tokens"


def test_a_stream_in_the_official_form(served: Local) -> None:
    with served.openai().responses.stream(model=DEMO, input=QUESTION) as stream:
        events = list(stream)
        final = stream.get_final_response()
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.output_text.delta") == "Paris"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert final.output_text == "Paris"
    assert final.usage is not None
    assert final.usage.output_tokens > 1


def test_a_schema(served: Local) -> None:
    form = {"type": "json_schema", "name": "city", "schema": SCHEMA, "strict": True}
    found = respond(served, text={"format": form}, max_output_tokens=64)
    assert json.loads(found.output_text)["city"] in ("Paris", "Rome")


def test_a_tool_is_called(served: Local, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(served.gateway.prompts.tokenizer, "chat_template", TEMPLATE)
    tools: list[Any] = [
        {"type": "function", "name": "now", "parameters": {"type": "object", "additionalProperties": False}}
    ]
    arguments: dict[str, Any] = {"tools": tools, "tool_choice": "required", "max_output_tokens": 200}
    (call,) = respond(served, **arguments).output
    assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "now", {})
    events = list(respond(served, stream=True, **arguments))
    assert [event.type for event in events][-5:] == [
        "response.output_item.added",
        "response.function_call_arguments.delta",
        "response.function_call_arguments.done",
        "response.output_item.done",
        "response.completed",
    ]


@pytest.mark.parametrize(
    ("settings", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.name"),
    ],
)
def test_what_is_refused(served: Local, settings: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        respond(served, **settings)
    assert caught.value.param == param
