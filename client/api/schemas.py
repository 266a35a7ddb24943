"""What requests may say: OpenAI's fields, a few more that other servers know too, and `potluck`, our own.

Fields that only concern OpenAI's billing and storage are taken and ignored; what nobody knows is refused, as OpenAI
does: a misspelt field shall not change an answer silently.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

MOST_CHOICES = 16
MOST_STOPS = 16
MOST_LOGPROBS = 20

Stops = Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOPS)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class Body(BaseModel):
    """Any part of a request."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Potluck(Body):
    """Our own extension. `trace`: stream which peers answer."""

    trace: bool = False


class StreamOptions(Body):
    """`include_usage`: one more chunk at the end, with counts of tokens."""

    include_usage: bool = False
    include_obfuscation: bool | None = None


class Common(Body):
    """What all kinds of requests may say."""

    model: str | None = None
    stream: bool = False
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    top_k: Annotated[int | None, Field(ge=0)] = None
    min_p: Annotated[float | None, Field(ge=0, le=1)] = None
    frequency_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    presence_penalty: Annotated[float | None, Field(ge=-2, le=2)] = None
    repetition_penalty: Annotated[float | None, Field(gt=0, le=2)] = None
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    seed: int | None = None
    stop: Annotated[str, Field(min_length=1)] | Stops | None = None
    potluck: Potluck = Potluck()

    # Taken, and without effect here.
    user: Any = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None

    @property
    def stops(self) -> tuple[str, ...]:
        """The strings that end an answer."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)


class TextPart(Body):
    """A part of a message; others than text are not understood here."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str | None = None
    annotations: Any = None
    logprobs: Any = None


Content = str | list[TextPart] | None
Prompt = str | Annotated[list[str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)]


class Called(Body):
    """Which function a tool call is of; `arguments`: JSON, as text."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that the model made earlier in the conversation."""

    id: str
    type: Literal["function"] = "function"
    function: Called


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Content = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: str | None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None

    @property
    def text(self) -> str:
        """All that it says."""
        return text_of(self.content)


def text_of(content: Content) -> str:
    """A message's parts in one."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


class Function(Body):
    """A function that the model may call; `parameters`: a JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool; functions are the only kind here."""

    type: Literal["function"]
    function: Function


class ChosenFunction(Body):
    """The function that must be called."""

    name: str


class ToolChoice(Body):
    """The tool that must be called."""

    type: Literal["function"]
    function: ChosenFunction


class JsonSchema(Body):
    """The JSON schema that an answer shall follow."""

    name: str = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(Body):
    """What an answer shall look like."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _has_schema(self) -> ResponseFormat:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema is missing")
        return self

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that the answer must follow; None: it may be any text."""
        if self.type == "text":
            return None
        if self.json_schema is None or self.json_schema.schema_ is None:
            return {"type": "object"}
        return self.json_schema.schema_


class ChatRequest(Common):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    logprobs: bool = False
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    response_format: ResponseFormat = ResponseFormat()
    stream_options: StreamOptions | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None

    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None
    prediction: Any = None
    modalities: list[Literal["text"]] | None = None

    @model_validator(mode="after")
    def _fits(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs to be true")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        return self

    @property
    def most_tokens(self) -> int | None:
        """The longest answer that is wanted."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Common):
    """`POST /v1/completions`."""

    prompt: Prompt
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] = 1
    best_of: int | None = None
    echo: bool = False
    logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    suffix: None = None
    response_format: ResponseFormat = ResponseFormat()
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _fits(self) -> CompletionRequest:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream to be true")
        if self.best_of is not None and self.best_of != self.n:
            raise ValueError("best_of other than n is not supported")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo with logprobs is not supported: the prompt's own probabilities are not computed")
        return self

    @property
    def prompts(self) -> tuple[str | list[int], ...]:
        """Each prompt, as text or as tokens."""
        if isinstance(self.prompt, str):
            return (self.prompt,)
        if isinstance(self.prompt[0], int):
            return (self.prompt,)  # one list of tokens
        return tuple(self.prompt)


class ResponseFunction(Function):
    """A function, as the Responses API writes it."""

    type: Literal["function"]


class ResponseToolChoice(Body):
    """The tool that must be called, as the Responses API writes it."""

    type: Literal["function"]
    name: str


class TextFormat(Body):
    """What an answer shall look like, as the Responses API writes it."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = "answer"
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @property
    def schema_wanted(self) -> dict[str, Any] | None:
        """The schema that the answer must follow; None: it may be any text."""
        return None if self.type == "text" else self.schema_ or {"type": "object"}


class TextSettings(Body):
    """`text` of a response."""

    format: TextFormat = TextFormat()
    verbosity: Any = None


class InputMessage(Body):
    """A message of a response's input."""

    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    id: str | None = None
    status: Any = None
    phase: Any = None


class InputCall(Body):
    """A call that the model made earlier."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: Any = None


class InputOutput(Body):
    """What came of a call."""

    type: Literal["function_call_output"]
    call_id: str
    output: Content
    id: str | None = None
    status: Any = None


class ResponseRequest(Common):
    """`POST /v1/responses`. Nothing is stored: each request brings its whole conversation."""

    input: str | Annotated[list[InputMessage | InputCall | InputOutput], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: Annotated[int | None, Field(ge=1)] = None
    text: TextSettings = TextSettings()
    tools: list[ResponseFunction] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponseToolChoice | None = None
    top_logprobs: Annotated[int | None, Field(ge=0, le=MOST_LOGPROBS)] = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    conversation: None = None
    include: list[Literal["message.output_text.logprobs", "reasoning.encrypted_content"]] | None = None

    parallel_tool_calls: Any = None
    reasoning: Any = None
    max_tool_calls: Any = None
    stream_options: Any = None

    @property
    def messages(self) -> list[Message]:
        """The conversation as chat completions write it."""
        told = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        if isinstance(self.input, str):
            return [*told, Message(role="user", content=self.input)]
        return [*told, *(_as_message(item) for item in self.input)]

    @property
    def chat_tools(self) -> list[Tool] | None:
        """Its tools as chat completions write them."""
        if not self.tools:
            return None
        return [Tool(type="function", function=Function(**tool.model_dump(exclude={"type"}))) for tool in self.tools]

    @property
    def chat_choice(self) -> str | ToolChoice | None:
        """Which of them is chosen, as chat completions write it."""
        if isinstance(self.tool_choice, ResponseToolChoice):
            return ToolChoice(type="function", function=ChosenFunction(name=self.tool_choice.name))
        return self.tool_choice


def _as_message(item: InputMessage | InputCall | InputOutput) -> Message:
    match item:
        case InputMessage():
            return Message(role=item.role, content=item.content)
        case InputCall():
            called = ToolCall(id=item.call_id, function=Called(name=item.name, arguments=item.arguments))
            return Message(role="assistant", tool_calls=[called])
        case InputOutput():
            return Message(role="tool", content=item.output, tool_call_id=item.call_id)
