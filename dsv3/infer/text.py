"""Text as it is generated: whole characters, with stop strings taken out."""

from collections.abc import Iterator

from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.events import FinishReason
from dsv3.infer.stop import StopStrings
from dsv3.infer.stream import TokenStream
from dsv3.runtime.log import get_logger

log = get_logger(__name__)


class TextStream:
    """Iterator over pieces of generated text, none of them empty; joined they are the answer.

    A token may end inside a character or begin a stop string; such text is held back until it is settled.
    """

    def __init__(self, tokens: TokenStream, *, tokenizer: Tokenizer, stop: tuple[str, ...], prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        """Tokens of the prompt, the begin token included."""
        self._tokens = tokens
        self._decoder = tokenizer.stream_decoder()
        self._stop = StopStrings(stop)
        self._ended = False

    @property
    def finish_reason(self) -> FinishReason | None:
        """Why the text ended; None while it has not."""
        return FinishReason.STOP_STRING if self._stop.found is not None else self._tokens.finish_reason

    @property
    def completion_tokens(self) -> int:
        """Tokens generated so far, the end token not counted."""
        return self._tokens.num_generated

    @property
    def prompt_seconds(self) -> float:
        """Seconds from the prompt to the first token."""
        return self._tokens.prompt_seconds

    @property
    def tokens_per_second(self) -> float:
        """Speed of decoding after the first token, the reader's own time not counted; 0 before there is a second."""
        seconds = self._tokens.decode_seconds
        return (self.completion_tokens - 1) / seconds if seconds > 0 else 0.0

    @property
    def drafts(self) -> tuple[int, int]:
        """Tokens that MTP modules drafted, and those of them that were right."""
        return self._tokens.num_drafted, self._tokens.num_accepted

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        while not self._ended:
            piece = self._next_piece()
            if piece:
                return piece
        raise StopIteration

    def _next_piece(self) -> str:
        token = next(self._tokens, None)
        if token is None:
            self._ended = True
            if self.finish_reason is FinishReason.CONTEXT_LIMIT:
                log.warning(
                    "stopped after %d tokens: prompt and answer fill the model's context", self.completion_tokens
                )
            shown = self._stop.add(self._decoder.finish())
            return shown + self._stop.finish()
        shown = self._stop.add(self._decoder.add(token))
        self._ended = self._stop.found is not None
        if self._ended:
            self._tokens.close()
        return shown
