"""Tells what a model thinks from what it answers: `<think>` and `</think>` in text that arrives in pieces."""

from dsv3.data.special_tokens import THINK_BEGIN, THINK_END


class ReasoningSplitter:
    """Parts a text into reasoning and content while it arrives.

    All pieces joined are the same however the text was cut. The tags are dropped, and so are the line breaks beside
    them, which belong to the chat format. Only the first pair of tags counts: one that comes later is content. A text
    that is never closed is all reasoning, and one that does not open with `<think>` is all content.
    """

    def __init__(self, *, starts_inside: bool) -> None:
        """`starts_inside`: the prompt already ended with `<think>`, so the model begins in the middle of its thoughts.

        V3.1's and R1's templates do that; a reader who waits for an opening tag would find no reasoning at all.
        """
        self._read = self._read_leading if starts_inside else self._read_opening
        self._held = ""

    def add(self, text: str) -> tuple[str, str]:
        """Take the next piece; return the (reasoning, content) that are certain now, either or both empty."""
        self._held += text
        return self._read()

    def finish(self) -> tuple[str, str]:
        """Return what was held back for the sake of a tag that never came."""
        held, self._held = self._held, ""
        return ("", held) if self._read in (self._read_opening, self._read_content) else (held, "")

    def _read_opening(self) -> tuple[str, str]:
        text = self._held.lstrip()
        if THINK_BEGIN.startswith(text):  # Nothing yet, or a part of the tag.
            return "", ""
        if text.startswith(THINK_BEGIN):
            return self._go_on(self._read_leading, text.removeprefix(THINK_BEGIN))
        return self._go_on(self._read_content, self._held)

    def _read_leading(self) -> tuple[str, str]:
        text = self._held.lstrip("\n")
        self._held = text
        return self._go_on(self._read_reasoning, text) if text else ("", "")

    def _read_reasoning(self) -> tuple[str, str]:
        reasoning, tag, content = self._held.partition(THINK_END)
        if tag:
            _, shown = self._go_on(self._read_after, content)
            return reasoning.rstrip("\n"), shown
        kept = self._held[: len(self._held) - _partial(self._held, tag=THINK_END)].rstrip("\n")
        self._held = self._held[len(kept) :]
        return kept, ""

    def _read_after(self) -> tuple[str, str]:
        text = self._held.lstrip("\n")
        self._held = text
        return self._go_on(self._read_content, text) if text else ("", "")

    def _read_content(self) -> tuple[str, str]:
        content, self._held = self._held, ""
        return "", content

    def _go_on(self, read, text: str) -> tuple[str, str]:  # type: ignore[no-untyped-def]
        self._read, self._held = read, text
        return self._read()


def _partial(text: str, *, tag: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `tag`, and not all of it."""
    return next((size for size in range(min(len(text), len(tag) - 1), 0, -1) if text.endswith(tag[:size])), 0)
