"""What is read, and how text becomes rows of tokens (report 4.1)."""

from dataclasses import dataclass

from dsv3.config.check import require_fraction, require_not_negative, require_positive


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of the training mixture."""

    path: str
    """A file or folder (.txt .md .py .jsonl .jsonl.gz .parquet), `hf://NAME` for a Hugging Face dataset read as a
    stream, or `builtin://NAME` for text that arrives with installed packages."""
    name: str = ""
    """How reports call it; empty takes the last part of the path."""
    weight: float = 0.0
    """Share of the training rows drawn from it, relative to the other sources; 0 takes its number of tokens."""

    def __post_init__(self) -> None:
        require_not_negative(self, "weight")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and the transformations between text and packed rows."""

    sources: tuple[SourceConfig, ...] = ()
    """Empty stands for the built-in corpus of the quickstart."""
    tokenizer: str = ""
    """A tokenizer.json, or a folder that holds one; empty trains one of `model.vocab_size` entries on the corpus."""
    fim_rate: float = 0.1
    """Share of documents rearranged prefix-suffix-middle, before packing (report 4.1)."""
    boundary_split_rate: float = 0.1
    """Share of combined punctuation-and-newline tokens split in two while training (report 4.1; share unpublished)."""
    held_out_rate: float = 0.01
    """Share of documents, chosen by a hash of their text, that are kept for validation and never trained on."""
    max_held_out_documents: int = 400
    """Validation documents kept per source; further held-out documents are left unread."""
    shard_tokens: int = 50_000_000
    """Tokens of one shard file; packing looks at one shard at a time, so that a corpus may be larger than memory."""

    def __post_init__(self) -> None:
        require_fraction(self, "fim_rate", "boundary_split_rate", "held_out_rate")
        require_positive(self, "max_held_out_documents", "shard_tokens")
