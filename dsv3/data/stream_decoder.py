"""Text that appears while tokens arrive: a character may be spread over several byte-level tokens."""

import codecs
from collections.abc import Callable


class StreamDecoder:
    """Turns token ids into text one at a time, and holds back bytes until they make whole characters.

    All pieces joined, `finish()` included, are what decoding the whole list at once gives.
    """

    def __init__(self, token_bytes: Callable[[int], bytes]) -> None:
        self._token_bytes = token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token: int) -> str:
        """Return the characters completed by this token; empty while one is incomplete."""
        return self._decoder.decode(self._token_bytes(token))

    def finish(self) -> str:
        """Return what is still held back; an incomplete character shows as U+FFFD."""
        return self._decoder.decode(b"", final=True)
