"""What is read, and how text becomes rows of tokens (report 4.1)."""

from dataclasses import dataclass, field

from dsv3.config.check import require_fraction, require_not_negative, require_positive
from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One part of the training mixture."""

    path: str
    """A file or folder (.txt .md .py .jsonl .jsonl.gz .parquet), `hf://NAME` for a Hugging Face dataset read as a
    stream, `builtin://NAME` for text that arrives with installed packages, or, as the only source, a corpus that
    `dsv3 data prepare` has made, whose tokenizer and shards are read as they are."""
    name: str = ""
    """How reports call it; empty takes the last part of the path."""
    weight: float = 0.0
    """Share of the training rows drawn from it, relative to the other sources; 0 takes its number of tokens."""

    def __post_init__(self) -> None:
        require_not_negative(self, "weight")


@dataclass(frozen=True, kw_only=True)
class ShareConfig:
    """What part of the training rows comes from where."""

    of: str
    """A source, a domain, or 'source/domain', as a prepared corpus lists them; the closest one counts."""
    weight: float = 0.0
    """Share of the rows, relative to the other shares; 0, without `epochs`, draws none."""
    epochs: float = 0.0
    """Instead of a weight: how often it is read while what has no share is read once."""

    def __post_init__(self) -> None:
        require_not_negative(self, "weight", "epochs")


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """How rows are drawn from the sources and domains of a corpus; by their tokens where nothing else is said."""

    shares: tuple[ShareConfig, ...] = ()
    temperature: float = 1.0
    """Within a share, and where there is none, tokens count to the power of 1 / temperature: above 1 raises what is
    small."""
    annealing: tuple[ShareConfig, ...] = ()
    """The shares of the last part of a run."""
    annealing_tokens: int = 0
    """How long that is."""

    def __post_init__(self) -> None:
        require_positive(self, "temperature")
        require_not_negative(self, "annealing_tokens")
        if bool(self.annealing) != bool(self.annealing_tokens):
            raise ConfigError("annealing and annealing_tokens go together: which shares, and for how many tokens")
        for shares in (self.shares, self.annealing):
            if any(share.epochs for share in shares) and any(share.weight for share in shares):
                raise ConfigError("a mixture gives weights or epochs, not both; they are not on one scale")


@dataclass(frozen=True, kw_only=True)
class RulesConfig:
    """Which rules of `dsv3 data prepare`, as its settings have them, hold for text that a run reads itself."""

    mend: bool = False
    """Mistaken encodings (where ftfy is installed), control characters and line ends are mended."""
    mask: bool = False
    """Mail addresses, public IP addresses, phone numbers, cards, accounts and keys are masked."""
    judge: bool = False
    """What is not worth training on is dropped: prose and code by the rules for each."""
    near_copies: bool = False
    """A text that is nearly an earlier one is dropped; keeps about a kilobyte of memory for each document."""
    evaluations: tuple[str, ...] = ()
    """Files of evaluations; a document that has a text of theirs is dropped."""

    @property
    def any(self) -> bool:
        """Whether there is one."""
        return self != RulesConfig()


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Corpus, tokenizer and the transformations between text and packed rows."""

    sources: tuple[SourceConfig, ...] = ()
    """Empty stands for the built-in corpus of the quickstart."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    """How rows are drawn, where `weight` of the sources does not say it."""
    tokenizer: str = ""
    """A tokenizer.json, or a folder that holds one; empty trains one of `model.vocab_size` entries on the corpus."""
    rules: RulesConfig = field(default_factory=RulesConfig)
    """What becomes of a text before it is encoded; exact copies are always dropped."""
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
