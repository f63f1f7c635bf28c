"""Tool calls in the two published formats, V3's and V3.1's: asked for, forced by a grammar, and read from a text."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import msgspec

from dsv3.serve.grammar import GrammarSpec


class ToolCallDelta(msgspec.Struct, frozen=True):
    """What became known of one tool call."""

    index: int
    """Which call of the answer, from 0."""
    id: str | None = None
    """With the name, in the first delta of a call alone."""
    name: str | None = None
    arguments: str = ""
    """The next piece of the arguments' JSON text."""


class ToolCallParser:
    """Reads content and tool calls from a text that arrives in pieces."""

    def add(self, text: str) -> list[str | ToolCallDelta]:
        """Take the next piece; return what is certain now: content as str, and pieces of calls."""
        raise NotImplementedError

    def finish(self) -> list[str | ToolCallDelta]:
        """Return what was held back; a call that was not complete comes back as content where nothing of it was out."""
        raise NotImplementedError


def render_tools(
    messages: Sequence[Mapping[str, Any]], *, tools: Sequence[Mapping[str, Any]], format: Literal["v3", "v3.1"]
) -> list[dict[str, Any]]:
    """Return OpenAI-style messages as the chat template reads them, the tools described in the system message."""
    raise NotImplementedError


def tool_call_grammar(
    tools: Sequence[Mapping[str, Any]],
    *,
    choice: str | Mapping[str, Any],
    format: Literal["v3", "v3.1"],
    parallel: bool = True,
) -> GrammarSpec | None:
    """Return the grammar that forces a call where `choice` is "required" or names a function; None for auto, none."""
    raise NotImplementedError


def tool_format(chat_template: str) -> Literal["v3", "v3.1"]:
    """Return which format a chat template writes."""
    raise NotImplementedError
