"""Bodies of requests, with the range of every parameter. What is not here is refused by name."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Logprob = Annotated[int, Field(ge=0, le=20)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


class Body(BaseModel):
    """A body that is obeyed or refused, never in part."""

    model_config = ConfigDict(extra="forbid", strict=False)


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool = False
    """A last chunk with the usage of the whole."""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk."""


class Sampling(Body):
    """Parameters that completions and chats share."""

    model: Annotated[str, Field(max_length=1024)] = ""
    """The served model; anything else is answered with 404."""
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    """0 or -1 leaves all in."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None
    logit_bias: (
        dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Annotated[float, Field(ge=-100, le=100)]] | None
    ) = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | Annotated[list[StopText], Field(max_length=16)] | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=64)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    """Go on past the end token, as benchmarks want it."""
    guided_regex: Annotated[str, Field(min_length=1)] | None = None
    """A regular expression that the whole answer matches; as vLLM names it, like the next three."""
    guided_choice: Annotated[list[str], Field(min_length=1)] | None = None
    guided_json: dict[str, Any] | None = None
    guided_grammar: Annotated[str, Field(min_length=1)] | None = None
    """A Lark grammar."""
    user: str | None = None
    """Taken, and used for nothing; so are the next three."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    safety_identifier: str | None = None


class CompletionBody(Sampling):
    """POST /v1/completions."""

    prompt: (
        str
        | list[str]
        | Annotated[list[TokenId], Field(min_length=1)]
        | list[Annotated[list[TokenId], Field(min_length=1)]]
    )
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    echo: bool | None = None
    """Put the prompt in front of the answer, with its log-probabilities if those are asked for."""
    logprobs: Logprob | None = None
    suffix: None = None
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None


class TextPart(Body):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class FunctionCall(Body):
    """What a call calls."""

    name: str
    arguments: str | dict[str, Any] = "{}"


class ToolCall(Body):
    """A call in an assistant's message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Body):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    """Thoughts of an earlier answer; not shown to the model again, as the published templates have it."""
    reasoning: str | None = None
    refusal: None = None


class Function(Body):
    """A tool's description."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None
    """Calls that are demanded always obey their schema."""


class Tool(Body):
    """A tool."""

    type: Literal["function"]
    function: Function


class NamedFunction(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """A tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Body):
    """A schema that the answer obeys."""

    name: str | None = None
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None
    """The schema is always obeyed to the letter."""


class ResponseFormat(Body):
    """What the answer must be."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


class Thinking(Body):
    """Whether the model is to think first."""

    type: Literal["enabled", "disabled"]


class ChatBody(Sampling):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31 - 1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Logprob | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Field(max_length=128)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    thinking: Thinking | None = None
