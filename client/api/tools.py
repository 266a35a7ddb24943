"""Tools: what the chat template is told of them, and the calls that a model writes into its answer. Pure.

Models write calls in a few common forms, each with a beginning that gives it away:

    <tool_call>{"name": "f", "arguments": {...}}</tool_call>      Hermes, Qwen
    [TOOL_CALLS][{"name": "f", "arguments": {...}}]               Mistral
    <|python_tag|>{"name": "f", "parameters": {...}}              Llama 3
    {"name": "f", "parameters": {...}}                            Llama 3 too: nothing but the call
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from client.api.schemas import Message, Tool
from client.api.stops import Stops

HERMES, MISTRAL, LLAMA = "<tool_call>", "[TOOL_CALLS]", "<|python_tag|>"
OPENINGS = (HERMES, MISTRAL, LLAMA)

Template = str | Mapping[str, str] | None  # one, or several by name


@dataclass(frozen=True, slots=True)
class Call:
    """A function that the model wants to be called; `arguments`: JSON, as text."""

    id: str
    name: str
    arguments: str

    def as_json(self) -> dict[str, Any]:
        """As chat completions write it."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


def knows_tools(template: Template) -> bool:
    """Does a chat template do anything with tools?"""
    match template:
        case None:
            return False
        case str():
            return "tools" in template
        case _:
            return any("tools" in text for text in template.values())


def as_template_sees(message: Message) -> dict[str, Any]:
    """A message as templates expect it: one text, arguments of calls as objects."""
    seen: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.name is not None:
        seen["name"] = message.name
    if message.tool_call_id is not None:
        seen["tool_call_id"] = message.tool_call_id
    if message.tool_calls:
        seen["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _object(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return seen


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


class ToolText:
    """Takes an answer apart, piece by piece: what is text, and, at its end, which calls it makes.

    Args:
        tools: those that the model was told of; what calls another one is text.
    """

    def __init__(self, tools: Collection[Tool]) -> None:
        self._names = frozenset(tool.function.name for tool in tools)
        self._openings = Stops(OPENINGS)
        self._calls_began = False
        self._shown = ""
        self._rest = ""  # from the beginning of the first call on

    def add(self, text: str) -> str:
        """More of the answer. Returns what is certainly text."""
        self._rest += text
        if self._calls_began or self._is_bare_json():
            return ""
        text, self._rest = self._rest, ""
        shown = self._openings.add(text)
        if self._openings.found is not None:
            self._calls_began = True
            self._rest = self._openings.found + self._openings.rest
        self._shown += shown
        return shown

    def end(self) -> tuple[str, tuple[Call, ...]]:
        """The text that is left, and the calls."""
        held = self._openings.end()
        calls = tuple(self._calls(self._rest))
        if not calls:
            return held + self._rest, ()
        return held, calls

    def _is_bare_json(self) -> bool:
        return not self._shown and self._rest.lstrip()[:1] in ("{", "")

    def _calls(self, text: str) -> Iterator[Call]:
        for found in _objects(text):
            name, arguments = found.get("name"), found.get("arguments", found.get("parameters", {}))
            if isinstance(name, str) and name in self._names:
                written = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
                yield Call(f"call_{secrets.token_hex(12)}", name, written)


def taken_apart(text: str, tools: Collection[Tool]) -> tuple[str, tuple[Call, ...]]:
    """A whole answer: what is text, and the calls that it makes; all is text where there are no tools."""
    if not tools:
        return text, ()
    taker = ToolText(tools)
    shown = taker.add(text)
    rest, calls = taker.end()
    return shown + rest, calls


def forced(template: Template, tools: Sequence[Tool]) -> str:
    """A grammar, in llguidance's language, of one call of one of these tools and nothing else."""
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": tool.function.name},
                "arguments": tool.function.parameters or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for tool in tools
    ]
    schema = {"x-guidance": {"whitespace_flexible": False}, "anyOf": calls}
    call = f"call: %json {json.dumps(schema)}"
    if HERMES in str(template):
        return f'start: "<tool_call>\\n" call "\\n</tool_call>"\n{call}\n'
    return f"start: call\n{call}\n"


def _objects(text: str) -> Iterator[dict[str, Any]]:
    """The outermost JSON objects in a text, whatever is between them."""
    decoder, at = json.JSONDecoder(), 0
    while (at := text.find("{", at)) >= 0:
        try:
            found, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError):
            at += 1
            continue
        if isinstance(found, dict):
            yield found
