"""A conversation of several turns. What the turns before left in the cache is found there again, page by page."""

from typing import Unpack

from dsv3.infer.loaded import LoadedModel, SamplingSettings, sampling_params
from dsv3.infer.text import TextStream


class Conversation:
    """Turns of a user and a model. Each turn computes only the tokens that are new, and those of the last page.

    A model tuned to chat reads the turns in its tokenizer's chat format, and a conversation that outgrows its context
    is refused. A base model reads one running text: what the user wrote and how the model went on, a line break after
    each; the oldest turns are dropped once text and answer are longer than what it was trained on.
    """

    def __init__(self, loaded: LoadedModel, *, system: str = "", as_text: bool) -> None:
        self.as_text = as_text
        """Whether turns are read as one running text, for a base model, rather than in the chat format."""
        self._loaded = loaded
        self._opening = [{"role": "system", "content": system}] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget all turns, but not the system text."""
        self.turns: list[dict[str, str]] = []

    def ask(self, question: str, **settings: Unpack[SamplingSettings]) -> TextStream:
        """Return the answer in pieces. Nothing is remembered until `remember` says what was said.

        Raises:
            ConfigError: the conversation leaves no room in the model's context.
        """
        params = sampling_params(**settings)
        if self.as_text:
            ids = self._text_ids(question, room=self._loaded.trained_length - (params.max_tokens or 0))
        else:
            ids = self._loaded.chat_ids([*self._opening, *self.turns, {"role": "user", "content": question}])
        return self._loaded.stream_ids(ids, params=params)

    def remember(self, question: str, *, answer: str) -> None:
        """Add a turn; an answer that was stopped half-way is remembered as far as it got."""
        self.turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _text_ids(self, question: str, *, room: int) -> list[int]:
        """Return system text, turns and question as one text, without the oldest turns that would not fit in `room`."""
        texts = [message["content"] for message in self.turns] + [question]
        for first in range(0, len(texts), 2):
            opening = [message["content"] for message in self._opening]
            ids = self._loaded.prompt_ids("\n".join([*opening, *texts[first:]]))
            if len(ids) <= room:
                break
        return ids
