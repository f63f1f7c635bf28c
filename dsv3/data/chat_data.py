"""Conversations to be taught (report 5.1): read from the shapes they come in, and as tokens of which some are trained.

{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
{"prompt": "...", "completion": "..."}            either may be a list of messages
{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}        (ShareGPT)
"""

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pyarrow
import pyarrow.parquet

from dsv3.batch import IGNORE
from dsv3.data.chat_template import render_chat
from dsv3.data.hub import HUB, open_hub
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import DataError

Message = dict[str, Any]
SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
SHAPES = "'messages', 'prompt' with 'completion', or 'conversations'"


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """What was said, and where it stood."""

    messages: list[Message]
    name: str
    """File and number of the record."""


@dataclass(frozen=True, kw_only=True)
class TaughtTokens:
    """A conversation as tokens."""

    ids: list[int]
    trained: list[bool]
    """Whether each is something that the model is to say itself."""
    name: str

    @property
    def inputs(self) -> list[int]:
        """All tokens but the last."""
        return self.ids[:-1]

    @property
    def targets(self) -> list[int]:
        """The next token at each place, or `IGNORE` where it is not trained."""
        pairs = zip(self.ids[1:], self.trained[1:], strict=True)
        return [token if trained else IGNORE for token, trained in pairs]


def read_conversations(paths: Sequence[str]) -> Iterator[Conversation]:
    """Yield the conversations of files and datasets, in their order.

    Raises:
        DataError: a path cannot be read, or a record is none of the known shapes; says which.
    """
    for path in paths:
        for number, record in enumerate(read_records(path), start=1):
            name = f"{path}#{number}"
            yield Conversation(messages=messages_of(record, name=name), name=name)


def messages_of(record: Any, *, name: str) -> list[Message]:
    """Return the messages of a record in any of the known shapes.

    Raises:
        DataError: it has none of them, a role nobody knows, or no answer.
    """
    if not isinstance(record, dict):
        raise DataError(f"{name} is a JSON {type(record).__name__}; a conversation is an object with {SHAPES}")
    if isinstance(record.get("messages"), list):
        messages = record["messages"]
    elif record.get("completion") is not None and record.get("prompt") is not None:
        messages = _as_messages(record["prompt"], role="user") + _as_messages(record["completion"], role="assistant")
    elif isinstance(record.get("conversations"), list):
        messages = [_from_sharegpt(turn, name=name) for turn in record["conversations"]]
    else:
        raise DataError(f"{name} has the fields {', '.join(map(repr, record)) or 'none'}; it needs {SHAPES}")
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise DataError(f"{name} has a message without a role: {json.dumps(message, ensure_ascii=False)[:100]}")
        if not isinstance(message.get("content"), str):
            raise DataError(f"{name} has a message of '{message['role']}' whose content is no text")
    if not any(message["role"] == "assistant" for message in messages):
        raise DataError(f"{name} has no answer: no message has the role 'assistant'")
    return cast(list[Message], messages)


def as_tokens(conversation: Conversation, *, tokenizer: Tokenizer, train_prompts: bool = False) -> TaughtTokens:
    """Render a conversation by the tokenizer's own template, and mark what the assistant says, its end token included.

    Where the template begins an answer, a new piece of text begins for the tokenizer too, as it does when the model is
    asked. A template that shows earlier answers otherwise than the last one (without their reasoning, as R1's) leaves
    the last one alone to be trained.

    Raises:
        DataError: the template does not begin the last answer as it asks for one.
        TokenizerError: it refuses the conversation.
    """
    messages = conversation.messages
    answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]

    def text(count: int, *, asks: bool) -> str:
        return render_chat(tokenizer, messages=messages[:count], add_generation_prompt=asks)

    whole = text(answers[-1] + 1, asks=False)
    pieces: list[tuple[str, bool]] = []
    done = ""
    for place in answers:
        before, after = text(place, asks=True), text(place + 1, asks=False)
        if whole.startswith(after) and before.startswith(done) and after.startswith(before):
            pieces += [(before[len(done) :], False), (after[len(before) :], True)]
            done = after
    if done != whole:
        raise DataError(
            f"{conversation.name} cannot be taught: the chat template does not begin an answer as it asks for one"
        )
    ids: list[int] = []
    trained: list[bool] = []
    for piece, encoded in zip(pieces, tokenizer.encode_batch([text for text, _ in pieces]), strict=True):
        ids += encoded
        trained += [piece[1] or train_prompts] * len(encoded)
    return TaughtTokens(ids=ids, trained=trained, name=conversation.name)


def _as_messages(said: Any, *, role: str) -> list[Message]:
    return said if isinstance(said, list) else [{"role": role, "content": said}]


def _from_sharegpt(turn: Any, *, name: str) -> Message:
    speaker = turn.get("from") if isinstance(turn, dict) else None
    if speaker not in SHAREGPT_ROLES:
        raise DataError(f"{name} has a turn from {speaker!r}; known are {', '.join(SHAREGPT_ROLES)}")
    return {"role": SHAREGPT_ROLES[speaker], "content": turn.get("value")}


def read_records(path: str) -> Iterator[Any]:
    """Yield the records of a file of JSON lines or Parquet, or of a dataset.

    Raises:
        DataError: it cannot be read; says why.
    """
    if path.startswith(HUB):
        yield from open_hub(path)
        return
    file = Path(path)
    try:
        if file.suffix.lower() == ".parquet":
            with pyarrow.parquet.ParquetFile(file) as table:
                for batch in table.iter_batches():
                    yield from batch.to_pylist()
        else:
            with gzip.open(file, "rb") if file.name.lower().endswith(".gz") else file.open("rb") as lines:
                for number, line in enumerate(lines, start=1):
                    if line.strip():
                        yield _parse(line, name=f"{path}, line {number}")
    except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
        raise DataError(f"cannot read {path} ({type(error).__name__}: {error})") from error


def _parse(line: bytes, *, name: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise DataError(f"{name} is no JSON ({error}); conversations are one JSON object a line") from error
