"""Stop strings over text that arrives in pieces."""

from dsv3.errors import ConfigError


class StopStrings:
    """Passes text on until one of the strings is complete, and never shows any part of it.

    A stop string may begin in one token and end in another, so text that could still become one is held back. The
    first string to be complete wins, which makes the outcome the same however the text was cut into pieces; of two
    that end together the longer one counts.
    """

    def __init__(self, stop: tuple[str, ...]) -> None:
        if "" in stop:
            raise ConfigError("an empty stop string would stop before the first word; leave it out")
        self._stop = stop
        self._held = ""
        self.found: str | None = None
        """The stop string that was met."""

    def add(self, text: str) -> str:
        """Take the next piece and return what may be shown; nothing more once a stop string was met."""
        if self.found is not None:
            return ""
        self._held += text
        matches = [(self._held.find(stop) + len(stop), -len(stop), stop) for stop in self._stop if stop in self._held]
        if matches:
            end, _, self.found = min(matches)
            shown, self._held = self._held[: end - len(self.found)], ""
            return shown
        keep = max((_overlap(self._held, stop=stop) for stop in self._stop), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def finish(self) -> str:
        """Return what was held back, when the text ends and no stop string came of it."""
        rest, self._held = self._held, ""
        return rest


def _overlap(text: str, *, stop: str) -> int:
    """Return the length of the longest end of `text` that is a beginning of `stop`, and not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((size for size in range(longest, 0, -1) if text.endswith(stop[:size])), 0)
