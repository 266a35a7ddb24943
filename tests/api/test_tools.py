"""Calls of tools in what models write, and what chat templates are told."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.api.schemas import Message, Tool
from client.api.tools import ToolText, as_template_sees, forced, knows_tools

TOOLS = [
    Tool.model_validate({"type": "function", "function": {"name": name, "parameters": {"type": "object"}}})
    for name in ("weather", "time")
]
ARGUMENTS = {"city": "Köln", "days": [1, {"two": 2}]}
CALL = json.dumps({"name": "weather", "arguments": ARGUMENTS})
LLAMA = json.dumps({"name": "weather", "parameters": ARGUMENTS})


def taken(text: str, size: int = 1) -> tuple[str, list[tuple[str, object]]]:
    """What is shown, and the calls, if the text comes in pieces of this size."""
    taker = ToolText(TOOLS)
    shown = "".join(taker.add(text[i : i + size]) for i in range(0, len(text), size))
    rest, calls = taker.end()
    return shown + rest, [(call.name, json.loads(call.arguments)) for call in calls]


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("text", "shown", "count"),
    [
        (f"<tool_call>\n{CALL}\n</tool_call>", "", 1),
        (f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>{CALL}</tool_call>", "Let me see.\n", 2),
        (f"[TOOL_CALLS][{CALL}, {CALL}]", "", 2),
        (f"<|python_tag|>{LLAMA}", "", 1),
        (LLAMA, "", 1),
        (f"  {LLAMA}", "", 1),
    ],
)
def test_calls_are_found(text: str, shown: str, count: int, size: int) -> None:
    assert taken(text, size) == (shown, [("weather", ARGUMENTS)] * count)


@pytest.mark.parametrize(
    "text",
    [
        "It is 20 degrees.",
        "a < b <tool",
        '{"temperature": 20}',
        '{"name": "unknown", "parameters": {}}',
        '<tool_call>{"name": "weather", "arguments": {"ci',
        "",
        "  ",
    ],
)
def test_the_rest_is_text(text: str) -> None:
    assert taken(text) == (text, [])


@given(st.text(alphabet='<tool_ca>{}"[]TOL |', max_size=40), st.integers(1, 9))
def test_nothing_is_lost(text: str, size: int) -> None:
    shown, calls = taken(text, size)
    assert calls or shown == text


def test_templates_say_whether_they_know_tools() -> None:
    assert knows_tools("{% if tools %}...{% endif %}")
    assert knows_tools({"default": "{{ messages }}", "tool_use": "{{ tools }}"})
    assert not knows_tools("{{ messages }}")
    assert not knows_tools(None)


def test_what_templates_see() -> None:
    said = Message.model_validate(
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "two"}],
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "time", "arguments": '{"zone": "UTC"}'}}
            ],
        }
    )
    call = {"id": "1", "type": "function", "function": {"name": "time", "arguments": {"zone": "UTC"}}}
    assert as_template_sees(said) == {"role": "assistant", "content": "One two", "tool_calls": [call]}
    assert as_template_sees(Message(role="developer", content="Be brief"))["role"] == "system"


def test_a_forced_call_is_written_as_the_template_wants_it() -> None:
    assert "<tool_call>" in forced("... <tool_call> ...", TOOLS)
    assert "<tool_call>" not in forced("...", TOOLS)
