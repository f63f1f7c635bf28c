"""Tells what a model thinks from what it answers: `<think>` and `</think>` in text that arrives in pieces."""

from enum import Enum, auto

from dsv3.data.special_tokens import THINK_BEGIN, THINK_END


class _Part(Enum):
    """Where in its answer a model is."""

    OPENING = auto()
    BEFORE_REASONING = auto()
    REASONING = auto()
    BEFORE_CONTENT = auto()
    CONTENT = auto()


class ReasoningSplitter:
    """Parts a text into reasoning and content while it arrives.

    All pieces joined are the same however the text was cut. The tags are dropped, and so are the line breaks beside
    them, which belong to the chat format. Only the first pair of tags counts: one that comes later is content. A text
    that is never closed is all reasoning, and one that does not open with `<think>` is all content.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        """`starts_inside`: the prompt ended with `<think>`, so the text begins in the middle of the thoughts.

        V3.1's and R1's templates do that; who waits for an opening tag there finds no reasoning at all.
        """
        self._part = _Part.BEFORE_REASONING if starts_inside else _Part.OPENING
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Take the next piece; return the (reasoning, content) that are certain now, either or both empty."""
        self._held += text
        reasoning = content = ""
        if self._part is _Part.OPENING:
            self._open()
        if self._part is _Part.BEFORE_REASONING:
            self._skip_line_breaks(then=_Part.REASONING)
        if self._part is _Part.REASONING:
            reasoning = self._reason()
        if self._part is _Part.BEFORE_CONTENT:
            self._skip_line_breaks(then=_Part.CONTENT)
        if self._part is _Part.CONTENT:
            content, self._held = self._held, ""
        return reasoning, content

    def finish(self) -> tuple[str, str]:
        """Return what was held back for the sake of a tag that never came."""
        rest, self._held = self._held, ""
        return ("", rest) if self._part is _Part.OPENING else (rest, "")

    def _open(self) -> None:
        text = self._held.lstrip()
        if text.startswith(THINK_BEGIN):
            self._held = text.removeprefix(THINK_BEGIN)
            self._part = _Part.BEFORE_REASONING
        elif not THINK_BEGIN.startswith(text):  # Otherwise it may still become the tag.
            self._part = _Part.CONTENT

    def _skip_line_breaks(self, *, then: _Part) -> None:
        self._held = self._held.lstrip("\n")
        if self._held:
            self._part = then

    def _reason(self) -> str:
        """Return the thoughts that are certain; line breaks at their end wait, since a tag may follow them."""
        reasoning, tag, content = self._held.partition(THINK_END)
        if tag:
            self._part, self._held = _Part.BEFORE_CONTENT, content
            return reasoning.rstrip("\n")
        certain = self._held[: len(self._held) - _overlap(self._held, tag=THINK_END)].rstrip("\n")
        self._held = self._held[len(certain) :]
        return certain


def _overlap(text: str, *, tag: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `tag`, and not all of it."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
