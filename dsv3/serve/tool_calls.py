"""Tool calls: described to a model, forced by a grammar, read from its text, and written back into a conversation.

Two formats are published (the chat templates of V3, R1 and V3.1). V3 and R1 write

    <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME
    ```json
    {...}
    ```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

with a line break between two calls; V3.1 writes `<｜tool▁call▁begin｜>NAME<｜tool▁sep｜>{...}<｜tool▁call▁end｜>` for
each, with nothing between.
"""

import json
import re
import uuid
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import Any, Literal

import msgspec

from dsv3.errors import ConfigError
from dsv3.serve.grammar import GrammarSpec, json_grammar

CALLS_BEGIN = "<｜tool▁calls▁begin｜>"
CALLS_END = "<｜tool▁calls▁end｜>"
CALL_BEGIN = "<｜tool▁call▁begin｜>"
CALL_END = "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
OUTPUTS_BEGIN = "<｜tool▁outputs▁begin｜>"
OUTPUTS_END = "<｜tool▁outputs▁end｜>"
OUTPUT_BEGIN = "<｜tool▁output▁begin｜>"
OUTPUT_END = "<｜tool▁output▁end｜>"

MAX_CALLS = 32
"""Most calls that a grammar lets one answer make."""

MAX_HEADER_CHARACTERS = 256
"""Longest text before a call's arguments; what is longer is no call."""

NAME = "[a-zA-Z0-9_-]{1,64}"
V3_HEADER = re.compile(rf"function{re.escape(SEPARATOR)}\s*({NAME})\s*(?:```(?:json)?\s*)?")
V31_HEADER = re.compile(rf"\s*({NAME})\s*{re.escape(SEPARATOR)}\s*")

ToolFormat = Literal["v3", "v3.1"]


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What became known of one tool call."""

    index: int
    """Which call of the answer, from 0."""
    id: str | None = None
    """Set in the first delta of a call alone, as is `name`."""
    name: str | None = None
    arguments: str = ""
    """The next piece of the arguments, a JSON text if the model wrote one: pieces are passed on unread."""


class _Part(Enum):
    """What the text that comes next belongs to."""

    CONTENT = auto()
    BETWEEN_CALLS = auto()
    HEADER = auto()
    ARGUMENTS = auto()
    NO_CALL = auto()
    """Something that began like a call."""


class ToolCallParser:
    """Parts a text that arrives in pieces into content and tool calls, in either format.

    What comes back, joined, does not depend on how the text was cut. Arguments are passed on while they are written.
    What has no name, or arguments that do not begin with `{`, was no call: it is content, tags included. Text between
    calls is content too, except for blank lines.
    """

    def __init__(self, *, new_id: Callable[[], str] = lambda: f"call_{uuid.uuid4().hex[:24]}") -> None:
        self._new_id = new_id
        self._part = _Part.CONTENT
        self._held = ""
        self._opening = ""
        """The tag that opened the calls, as long as nothing has shown whether there are any."""
        self._fenced = False
        self.num_calls = 0
        """Calls found so far: where there are any, the answer ends for their sake."""

    def add(self, text: str) -> list[str | ToolCallDelta]:
        """Take the next piece; return what is certain now: content as `str`, and pieces of calls."""
        self._held += text
        found: list[str | ToolCallDelta] = []
        steps = {
            _Part.CONTENT: self._read_content,
            _Part.BETWEEN_CALLS: self._read_between,
            _Part.HEADER: self._read_header,
            _Part.ARGUMENTS: self._read_arguments,
            _Part.NO_CALL: self._read_no_call,
        }
        before = None
        while before != (self._part, self._held):
            before = (self._part, self._held)
            found += [piece for piece in steps[self._part]() if piece]
        return found

    def finish(self) -> list[str | ToolCallDelta]:
        """Return what was held back. Of a call that breaks off in its arguments, what was passed on stays a call."""
        rest, self._held = self._held, ""
        if self._part is _Part.ARGUMENTS:
            return []
        if self._part is _Part.HEADER:
            rest = CALL_BEGIN + rest
        elif self._part is _Part.BETWEEN_CALLS and self.num_calls and not rest.strip():
            return []
        content = self._take_opening() + rest
        return [content] if content else []

    def _read_content(self) -> list[str | ToolCallDelta]:
        content, tag = self._take_until(CALLS_BEGIN)
        if tag:
            self._part, self._opening = _Part.BETWEEN_CALLS, CALLS_BEGIN
        return [content]

    def _read_between(self) -> list[str | ToolCallDelta]:
        text = self._held.lstrip()
        if text.startswith(CALL_BEGIN):
            self._part, self._held = _Part.HEADER, text.removeprefix(CALL_BEGIN)
        elif text.startswith(CALLS_END):
            self._part, self._held = _Part.CONTENT, text.removeprefix(CALLS_END)
            return [] if self.num_calls else [self._take_opening() + CALLS_END]
        elif not CALL_BEGIN.startswith(text) and not CALLS_END.startswith(text):
            self._part = _Part.NO_CALL
        return []

    def _read_header(self) -> list[str | ToolCallDelta]:
        header, brace, _ = self._held.partition("{")
        if not brace and CALL_END not in header and len(header) <= MAX_HEADER_CHARACTERS:
            return []
        matched = V3_HEADER.fullmatch(header) or V31_HEADER.fullmatch(header)
        if not brace or not matched or len(header) > MAX_HEADER_CHARACTERS:
            self._part = _Part.NO_CALL
            return [self._take_opening() + CALL_BEGIN]
        self._part, self._held, self._opening = _Part.ARGUMENTS, self._held[len(header) :], ""
        self._fenced = "```" in header
        self.num_calls += 1
        return [ToolCallDelta(index=self.num_calls - 1, id=self._new_id(), name=matched[1])]

    def _read_arguments(self) -> list[str | ToolCallDelta]:
        whole, tag, rest = self._held.partition(CALL_END)
        if tag:
            arguments = whole.rstrip()
            if self._fenced:
                arguments = arguments.removesuffix("```").rstrip()
            self._part, self._held = _Part.BETWEEN_CALLS, rest
        else:
            arguments = self._held[: len(self._held) - _overlap(self._held, tag=CALL_END)]
            # Never pass on what the lines above would strip once the tag is there.
            arguments = re.sub(r"\s*`{0,3}\s*$", "", arguments) if self._fenced else arguments.rstrip()
            self._held = self._held[len(arguments) :]
        return [ToolCallDelta(index=self.num_calls - 1, arguments=arguments)] if arguments else []

    def _read_no_call(self) -> list[str | ToolCallDelta]:
        content, tag = self._take_until(CALL_BEGIN, CALL_END, CALLS_END)
        if tag == CALL_BEGIN:
            self._part, tag = _Part.HEADER, ""
        elif tag:
            self._part = _Part.BETWEEN_CALLS if tag == CALL_END else _Part.CONTENT
        shown = content + tag
        return [self._take_opening() + shown] if shown else []

    def _take_until(self, *tags: str) -> tuple[str, str]:
        """Take the held text up to the first of `tags`, and that tag; without one, all that can be no part of it."""
        places = [(self._held.find(tag), tag) for tag in tags if tag in self._held]
        if places:
            place, tag = min(places)
            text, self._held = self._held[:place], self._held[place + len(tag) :]
            return text, tag
        cut = len(self._held) - max(_overlap(self._held, tag=tag) for tag in tags)
        text, self._held = self._held[:cut], self._held[cut:]
        return text, ""

    def _take_opening(self) -> str:
        opening, self._opening = self._opening, ""
        return opening


def _overlap(text: str, *, tag: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `tag`, and not all of it."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)


def tool_format(chat_template: str) -> ToolFormat:
    """Return which format a chat template writes; V3's for one that writes none, as our own."""
    writes_calls = CALL_BEGIN in chat_template
    return "v3.1" if writes_calls and "```json" not in chat_template else "v3"


def render_tools(
    messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]] = (), chat_template: str
) -> list[dict[str, Any]]:
    """Return OpenAI-style messages as `chat_template` reads them, with the tools described in the first system text.

    The published templates have no place for descriptions, so they are written as text. Calls become a part of their
    message's content, in the template's own format: V3's template loses calls that stand beside content, and leaves
    the list open after a single one. A tool's result keeps its role where the template knows it, and is a user's
    message in V3's tags elsewhere. `developer` becomes `system`.

    Raises:
        ConfigError: a message, call or tool that is not as the OpenAI API has it.
    """
    format = tool_format(chat_template)
    rendered = [_render(message, format=format) for message in messages]
    if OUTPUT_BEGIN not in chat_template:
        rendered = _results_as_users(rendered)
    if not tools:
        return rendered
    described = describe_tools(tools, format=format)
    for place, message in enumerate(rendered):
        if message["role"] == "system":
            text = "\n\n".join(filter(None, [message["content"], described]))
            return [*rendered[:place], message | {"content": text}, *rendered[place + 1 :]]
    return [{"role": "system", "content": described}, *rendered]


def describe_tools(tools: Sequence[Mapping[str, Any]], *, format: ToolFormat) -> str:
    """Return what a model is told about its tools: each one's name, purpose and parameters, and how to call them."""
    example = _write_call("NAME", arguments="{ARGUMENTS}", format=format)
    joint = "a line break" if format == "v3" else "nothing"
    parts = ["## Tools", "These tools can be called:"]
    for tool in tools:
        function = _function(tool)
        purpose = function.get("description") or "none given"
        schema = json.dumps(_parameters(function), ensure_ascii=False)
        parts.append(f"### {function['name']}\nDescription: {purpose}\n\nParameters: {schema}")
    parts.append(
        f"To call tools, write this and nothing after it, with {joint} between two calls:\n"
        f"{CALLS_BEGIN}{example}{CALLS_END}\n"
        "NAME is one of the names above, and {ARGUMENTS} a JSON object that its parameters allow."
    )
    return "\n\n".join(parts)


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]], *, choice: str | Mapping[str, Any], format: ToolFormat, parallel: bool = True
) -> GrammarSpec | None:
    """Return the grammar of an answer that calls a tool, if `choice` (`tool_choice`) demands one; None if it does not.

    "required" asks for any tool, and for several calls where `parallel`; naming a function asks for one call of it.
    Arguments obey the parameters' schema. The calls are the whole answer.

    Raises:
        ConfigError: no tools, an unknown choice or name, or parameters that cannot be followed.
    """
    if choice in ("auto", "none"):
        return None
    functions = [_function(tool) for tool in tools]
    if isinstance(choice, Mapping):
        wanted = _function(choice)["name"]
        known = [function["name"] for function in functions]
        if wanted not in known:
            raise ConfigError(f"tool_choice names the function {wanted!r}; known are: {', '.join(known) or 'none'}")
        functions, parallel = [functions[known.index(wanted)]], False
    elif choice != "required":
        raise ConfigError(f"tool_choice is {choice!r}; use auto, none, required, or an object that names a function")
    if not functions:
        raise ConfigError("tool_choice asks for a call, and there are no tools; give tools, or leave tool_choice out")
    more = ("" if format == "v3.1" else '"\\n" ') + "call"
    rest = f" ({more}){{0,{MAX_CALLS - 1}}}" if parallel else ""
    names = " | ".join(f"call_{place}" for place in range(len(functions)))
    rules = [f"start: {CALLS_BEGIN} call{rest} {CALLS_END}", f"call: {names}"]
    for place, function in enumerate(functions):
        rules += _call_rules(function, place=place, format=format)
    return GrammarSpec("lark", "\n".join(rules) + "\n")


def _call_rules(function: Mapping[str, Any], *, place: int, format: ToolFormat) -> list[str]:
    arguments = f"arguments_{place}: %json {json.dumps(json_grammar(_parameters(function)))}"
    if format == "v3.1":
        body = f'"{function["name"]}" {SEPARATOR} arguments_{place}'
    else:
        body = f'"function" {SEPARATOR} "{function["name"]}\\n```json\\n" arguments_{place} "\\n```"'
    return [f"call_{place}: {CALL_BEGIN} {body} {CALL_END}", arguments]


def _write_call(name: str, *, arguments: str, format: ToolFormat) -> str:
    if format == "v3.1":
        return f"{CALL_BEGIN}{name}{SEPARATOR}{arguments}{CALL_END}"
    return f"{CALL_BEGIN}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"


def _render(message: Mapping[str, Any], *, format: ToolFormat) -> dict[str, Any]:
    role = message.get("role")
    if role not in ("system", "developer", "user", "assistant", "tool"):
        raise ConfigError(f"a message has the role {role!r}; use system, developer, user, assistant or tool")
    content = _text(message.get("content"))
    calls = message.get("tool_calls") or []
    if calls and role != "assistant":
        raise ConfigError(f"only an assistant's message may hold tool_calls; found them in a message of role {role}")
    if calls:
        written = [_write_call(name, arguments=arguments, format=format) for name, arguments in map(_call, calls)]
        content += CALLS_BEGIN + ("\n" if format == "v3" else "").join(written) + CALLS_END
    others = {key: value for key, value in message.items() if key != "tool_calls"}
    return others | {"role": "system" if role == "developer" else role, "content": content}


def _text(content: Any) -> str:
    """Return a message's text: it may be a string, nothing, or a list of parts that are all text."""
    if content is None or isinstance(content, str):
        return content or ""
    parts = content if isinstance(content, list) else [content]
    for part in parts:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ConfigError(
                f"a message's content must be a text, or a list of parts of type 'text'; found {json.dumps(part)[:80]}"
            )
    return "".join(part["text"] for part in parts)


def _call(call: Any) -> tuple[str, str]:
    """Return name and arguments of a call in a message; arguments are a JSON text, or the object itself."""
    function = _function(call)
    arguments = function.get("arguments", "{}")
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    if not isinstance(arguments, str):
        raise ConfigError(
            f"the arguments of a call of {function['name']} must be a JSON text or an object; "
            f"found {type(arguments).__name__}"
        )
    return function["name"], arguments


def _function(tool: Any) -> Mapping[str, Any]:
    """Return the `function` of a tool, a call or a choice, its name checked."""
    function = (
        tool.get("function") if isinstance(tool, Mapping) and tool.get("type", "function") == "function" else None
    )
    if not isinstance(function, Mapping):
        raise ConfigError(
            f"a tool must be an object of type 'function' with a 'function' in it; found {str(tool)[:80]}"
        )
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(NAME, name):
        raise ConfigError(f"a function's name must be 1 to 64 letters, digits, _ or -; found {name!r}")
    return function


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    """Return the schema of a function's arguments, which are always an object."""
    schema = function.get("parameters") or {}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise ConfigError(f"the parameters of {function['name']} must be a JSON schema of type object")
    return {"type": "object", **schema}


def _results_as_users(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Write the results of tools, neighbours together, into user messages."""
    told: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] != "tool":
            told.append(message)
            continue
        output = OUTPUT_BEGIN + message["content"] + OUTPUT_END
        last = told[-1]["content"] if told and told[-1]["role"] == "user" else ""
        if last.startswith(OUTPUTS_BEGIN) and last.endswith(OUTPUTS_END):
            told[-1] = {"role": "user", "content": f"{last.removesuffix(OUTPUTS_END)}\n{output}{OUTPUTS_END}"}
        else:
            told.append({"role": "user", "content": OUTPUTS_BEGIN + output + OUTPUTS_END})
    return told
