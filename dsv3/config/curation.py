"""How raw text becomes a corpus at any size: what `dsv3 data prepare` keeps, and by which rules."""

from dataclasses import dataclass, field

from dsv3.config.check import require_choice, require_fraction, require_not_negative, require_positive
from dsv3.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ReadingConfig:
    """What a document is."""

    max_document_bytes: int = 2**19
    """A longer text is cut into documents of about this size at line ends, so that memory stays flat: as many tokens of
    English as V3's longest context has."""
    max_line_bytes: int = 4 * 2**20
    """A longer line of JSON is not read: it would have to fit in memory several times over."""
    max_page_bytes: int = 2**20
    """A larger web page is not read: its tree takes 20 times its bytes (Common Crawl long cut pages here)."""
    max_page_tags: int = 30_000
    """A web page with more tags is not read: each takes 800 bytes of memory, and time that grows with their square."""
    max_remarks: int = 5
    """Documents shown for each reason to drop one."""
    repair: bool = True
    """Whether misread encodings, control characters and line ends are mended."""

    def __post_init__(self) -> None:
        require_positive(self, "max_document_bytes", "max_line_bytes", "max_page_bytes", "max_page_tags", "max_remarks")


@dataclass(frozen=True, kw_only=True)
class LanguageConfig:
    """Which natural languages stay; code is not asked for its language."""

    keep: tuple[str, ...] = ()
    """ISO 639 codes, as `["en", "zh"]`; empty keeps all."""
    min_score: float = 0.2
    """A text whose likeliest language is less likely than this is dropped as none (FineWeb: 0.65 of a larger model)."""

    def __post_init__(self) -> None:
        require_fraction(self, "min_score")


@dataclass(frozen=True, kw_only=True)
class QualityConfig:
    """Rules in the manner of Gopher (Rae et al. 2021, table A1), C4 (Raffel et al. 2020), FineWeb (Penedo et al. 2024).

    The report names no rules. Code is held to the rules for code alone, since those for prose drop nearly all of it;
    mathematics is spared those that count symbols and digits.
    """

    enabled: bool = True
    min_words: int = 20
    """Gopher: 50; ours is lower, since short reference texts are worth keeping. A Chinese character is a word."""
    max_words: int = 1_000_000
    min_mean_word_length: float = 2.5
    """In letters, for scripts with spaces (Gopher: 3)."""
    max_mean_word_length: float = 12.0
    """Gopher: 10."""
    max_symbol_ratio: float = 0.1
    """Number signs and ellipses per word (Gopher)."""
    max_bullet_lines: float = 0.9
    max_ellipsis_lines: float = 0.3
    min_letter_words: float = 0.7
    """Share of what stands between spaces that has a letter (Gopher: 0.8)."""
    min_stop_words: int = 2
    """English alone: different ones of the, be, to, of, and, that, have, with."""
    max_repeated_lines: float = 0.3
    """Share of lines that were there before (Gopher)."""
    max_repeated_line_characters: float = 0.2
    max_top_ngram: tuple[float, ...] = (0.2, 0.18, 0.16)
    """Share of all characters in the most frequent 2-, 3- and 4-gram (Gopher). Where each character counts as a word,
    as in Chinese, n-grams are of twice as many: a word has about two."""
    max_repeated_ngram: tuple[float, ...] = (0.15, 0.14, 0.13, 0.12, 0.11, 0.1)
    """Share of all characters in 5- to 10-grams that were there before (Gopher)."""
    maths_repetition: float = 2.5
    """Of mathematics the shares of n-grams may be so many times higher: a proof says its formulas again and again."""
    max_digits: float = 0.25
    """Share of digits in all characters but those of mathematics: logs and tables (ours)."""
    max_short_lines: float = 0.67
    """Share of lines of 30 characters or fewer (FineWeb), for texts of web pages."""
    min_line_ends: float = 0.12
    """Share of lines that end with a mark of punctuation (FineWeb), for texts of web pages."""
    forbidden: tuple[str, ...] = ("lorem ipsum",)
    """Texts with one of these phrases are dropped (C4)."""
    policy_lines: tuple[str, ...] = ("terms of use", "privacy policy", "cookie policy", "uses cookies", "use cookies")
    """Lines with one of these phrases are taken out of the texts of web pages (C4)."""
    max_code_line: int = 1000
    """Code with a longer line on average over its ten longest is generated (StarCoder's limit, applied so)."""
    min_code_letters: float = 0.25
    """Share of letters and digits in code (StarCoder)."""

    def __post_init__(self) -> None:
        require_not_negative(self, "min_words", "min_stop_words", "max_code_line", "max_symbol_ratio")
        require_positive(self, "max_words", "maths_repetition")
        shares = ("max_bullet_lines", "max_ellipsis_lines", "min_letter_words", "max_repeated_lines")
        require_fraction(self, *shares, "max_repeated_line_characters", "max_short_lines", "min_line_ends")
        require_fraction(self, "min_code_letters", "max_digits")
        if len(self.max_top_ngram) != 3 or len(self.max_repeated_ngram) != 6:
            raise ConfigError("max_top_ngram has a share for 2, 3 and 4 words, max_repeated_ngram one for 5 to 10")


@dataclass(frozen=True, kw_only=True)
class DuplicateConfig:
    """Which texts count as the same."""

    exact: bool = True
    """Whether a text that is another one but for the space around it is dropped."""
    near: bool = True
    """Whether MinHash looks for texts that are nearly another one."""
    min_near_words: int = 50
    """A shorter text is a copy of what is exactly the same alone: two sums that differ in a number are not copies."""
    shingle_words: int = 5
    bands: int = 14
    rows: int = 8
    """Two texts with a share s of common shingles are found with probability 1 - (1 - s^rows)^bands: as FineWeb, 92% at
    s = 0.8, half at 0.72."""
    seed: int = 1

    def __post_init__(self) -> None:
        require_not_negative(self, "min_near_words")
        require_positive(self, "shingle_words", "bands", "rows")


@dataclass(frozen=True, kw_only=True)
class ContaminationConfig:
    """When a text counts as one that has an evaluation's item."""

    enabled: bool = True
    words: int = 13
    """So many words in a row of an item (Brown et al. 2020)."""
    min_exact_words: int = 8
    """An item with fewer words than `words` is looked for whole if it has at least so many; one with fewer still must
    be a whole line."""
    min_line_words: int = 4
    """Items with fewer words are looked for no more: such a line says nothing."""

    def __post_init__(self) -> None:
        require_positive(self, "words", "min_exact_words", "min_line_words")


@dataclass(frozen=True, kw_only=True)
class PersonalConfig:
    """What is masked: addresses of people and machines, numbers of cards and accounts, keys."""

    emails: bool = True
    addresses: bool = True
    """Public IP addresses."""
    phones: bool = True
    cards: bool = True
    """Numbers of credit cards and IBANs whose check digits are right."""
    secrets: bool = True
    """Private keys and tokens of well-known forms."""


@dataclass(frozen=True, kw_only=True)
class TokensConfig:
    """How kept documents become shards."""

    tokenizer: str = ""
    """A tokenizer.json, or a folder that holds one; empty trains one of `vocab_size` entries on what was kept."""
    vocab_size: int = 4096
    fim_rate: float = 0.1
    """As `data.fim_rate` of a run, which must have the same."""
    boundary_split_rate: float = 0.1
    """As `data.boundary_split_rate` of a run, which must have the same."""
    held_out_rate: float = 0.01
    max_held_out_documents: int = 400
    """Of each source and domain."""
    shard_tokens: int = 10_000_000
    """Tokens of one shard; one of each source and domain is held in memory while a task writes."""
    seed: int = 0
    """Decides where FIM cuts and which tokens are split."""

    def __post_init__(self) -> None:
        require_fraction(self, "fim_rate", "boundary_split_rate", "held_out_rate")
        require_positive(self, "vocab_size", "max_held_out_documents", "shard_tokens")


@dataclass(frozen=True, kw_only=True)
class InputConfig:
    """One source of raw text."""

    path: str
    """A file, folder or pattern on a disk or behind a URL (s3://, gs://, hf://datasets/...), `hf://NAME` for a dataset
    of the Hugging Face hub read as rows, or `builtin://NAME`."""
    name: str
    kind: str = "auto"
    """'auto' goes by the file's ending; 'web' (rules for web pages too), 'prose', 'code' or 'maths' is what all is."""
    domain: str = ""
    """The domain of all its documents; empty tags each by itself."""
    provenance: str = ""
    """Of text that a model made: which, and how. It stands in the data card, and the domain is 'synthetic'."""

    def __post_init__(self) -> None:
        require_choice(self, "kind", choices=("auto", "web", "prose", "code", "maths"))


@dataclass(frozen=True, kw_only=True)
class CurationConfig:
    """A whole preparation."""

    recipe: str = ""
    inputs: tuple[InputConfig, ...] = ()
    """Earlier ones win where two hold the same text."""
    tasks: int = 0
    """Parts that the input is divided into, each restartable; 0 makes one of every `task_bytes`."""
    task_bytes: int = 256 * 2**20
    reading: ReadingConfig = field(default_factory=ReadingConfig)
    language: LanguageConfig = field(default_factory=LanguageConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    duplicates: DuplicateConfig = field(default_factory=DuplicateConfig)
    personal: PersonalConfig = field(default_factory=PersonalConfig)
    contamination: ContaminationConfig = field(default_factory=ContaminationConfig)
    tokens: TokensConfig = field(default_factory=TokensConfig)

    def __post_init__(self) -> None:
        require_not_negative(self, "tasks")
        require_positive(self, "task_bytes")
        names = [source.name for source in self.inputs]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"two inputs are called '{name}'; give each a name: --input NAME=PATH")
