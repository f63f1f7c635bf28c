"""The rules of `dsv3 data prepare` for `dsv3 prepare`: the same functions, for one document after the other.

Needs none of the extra `data`. Chinese, Japanese and Korean are told by their script and English by its words, so that
what comes out does not hang on what is installed.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

from dsv3.config import RulesConfig
from dsv3.config.curation import ContaminationConfig, DuplicateConfig, PersonalConfig, QualityConfig, ReadingConfig
from dsv3.data.chance import hash_parts
from dsv3.data.curation.account import StepAccount, read_account, write_account
from dsv3.data.curation.domain import domain_of, has_maths
from dsv3.data.curation.duplicates import EXACT, NEAR, Signer
from dsv3.data.curation.evaluation_items import ItemFinder, items_of_file, write_tables
from dsv3.data.curation.kinds import CODE, MATHS, PROSE, kind_of
from dsv3.data.curation.language import excerpt
from dsv3.data.curation.personal import mask
from dsv3.data.curation.quality import STOP_WORDS, Judge
from dsv3.data.curation.repair import repair
from dsv3.data.curation.words import WordCounter
from dsv3.data.document import Document, ReadingLog

STEPS = ("read", "repair", "mask", "quality", "decontaminate", "copies")
ACCOUNT = "account.json"
SCRIPTS = (
    ("ja", re.compile("[\u3040-\u30ff]")),
    ("ko", re.compile("[\uac00-\ud7af]")),
    ("zh", re.compile("[\u4e00-\u9fff]")),
)
"""Japanese has Chinese signs too, and stands before it."""
MIN_SCRIPT_SHARE = 0.15
MIN_STOP_WORD_SHARE = 0.08
"""Every sixth word of English prose is one of Gopher's eight."""


def plain_language(text: str) -> str:
    """Return 'zh', 'ja' or 'ko' where the script says so, 'en' where the words do; '' for all others."""
    seen = excerpt(text)
    for name, sign in SCRIPTS:
        if len(sign.findall(seen)) > MIN_SCRIPT_SHARE * len(seen):
            return name
    words = seen.lower().split()
    return "en" if sum(word in STOP_WORDS for word in words) > MIN_STOP_WORD_SHARE * len(words) else ""


class PlainRules:
    """Applies rules to the documents of one source after the other, and keeps account."""

    def __init__(self, config: RulesConfig, *, folder: Path) -> None:
        """Make what the rules need; tables of evaluations lie below `folder`.

        Raises:
            DataError: a file of an evaluation cannot be read.
        """
        self.config = config
        if config.evaluations:
            items = (item for file in config.evaluations for item in items_of_file(Path(file).expanduser()))
            write_tables(items, folder=folder, config=ContaminationConfig())
        self._finder = ItemFinder(folder, config=ContaminationConfig(enabled=bool(config.evaluations)))
        self._judge = Judge(QualityConfig())
        self._counter = WordCounter()
        self._signer = Signer(DuplicateConfig())
        self._bands: set[int] = set()
        self.begin()

    def begin(self) -> None:
        """Begin the account of a source."""
        self._steps = {name: StepAccount(name=name) for name in STEPS}
        self._told: dict[str, dict[str, int]] = {"languages": {}, "domains": {}, "lengths": {}}

    def apply(self, document: Document, *, log: ReadingLog) -> Document | None:
        """Return a document as the rules leave it, or None where one drops it, which `log` counts."""
        found = kind_of(document.name.split("#")[0])
        kind = found.kind if found is not None else PROSE
        self._pass("read", document.text)
        document = self._cleaned(document, kind=kind, log=log)
        if not document.text.strip():
            self._drop("repair", document, reason="nothing is left", log=log)
            return None
        language = "" if kind == CODE else plain_language(document.text)
        kind = MATHS if kind == PROSE and has_maths(document.text) else kind
        for step, reason in self._reasons(document.text, kind=kind, language=language).items():
            if reason:
                self._drop(step, document, reason=reason, log=log)
                return None
            self._pass(step, document.text)
        self._tell(document, kind=kind, language=language)
        return document

    def _cleaned(self, document: Document, *, kind: str, log: ReadingLog) -> Document:
        """Mend and mask."""
        text = repair(document.text, is_code=kind == CODE) if self.config.mend else document.text
        if text.strip() != document.text.strip():  # Empty lines at its ends are no news.
            log.change(document.name, reason="mended")
            self._steps["repair"].noted["changed"] += 1
        if not text.strip():
            return replace(document, text="")
        self._pass("repair", text)
        if self.config.mask:
            text, found = mask(text, config=PersonalConfig())
            self._steps["mask"].noted.update(found)
            for what in found:
                log.change(document.name, reason=f"masked: {what}")
        self._pass("mask", text)
        return document if text == document.text else replace(document, text=text)

    def _reasons(self, text: str, *, kind: str, language: str) -> dict[str, str]:
        """Return why each step that drops documents would drop this one; '' where it would not."""
        reasons = {"quality": "", "decontaminate": ""}
        if not self.config.judge and not self._finder:
            return reasons
        words = self._counter.words(text)
        if self.config.judge:
            reasons["quality"] = self._judge.why_not(text, words=words, kind=kind, language=language)
        if self._finder:
            reasons["decontaminate"] = self._finder.find(text, words=words)
        return reasons

    def is_near_copy(self, document: Document, *, log: ReadingLog) -> bool:
        """Tell whether a document is nearly one that was kept; if not, it is known from now on."""
        if self.config.near_copies and not self.remember(document.text):
            self._drop("copies", document, reason=NEAR, log=log)
            return True
        self._pass("copies", document.text)
        return False

    def remember(self, text: str) -> bool:
        """Know a text that is kept, and return whether it was like none before; one that was is not remembered."""
        if not self.config.near_copies:
            return True
        bands = self._signer.sign(text, words=self._counter.words(text))
        hashed = {hash_parts(number, band.tobytes().hex()) for number, band in enumerate(bands)}
        is_new = self._bands.isdisjoint(hashed)
        if is_new:
            self._bands |= hashed
        return is_new

    def note_copy(self, document: Document) -> None:
        """Count a document that is exactly an earlier one."""
        self._count_drop("copies", document, reason=EXACT)

    @property
    def not_applied(self) -> list[str]:
        """Steps that let everything pass."""
        config = self.config
        applied = (
            ("repair", config.mend),
            ("mask", config.mask),
            ("quality", config.judge),
            ("decontaminate", bool(config.evaluations)),
        )
        return [step for step, is_applied in applied if not is_applied]

    def save(self, folder: Path) -> None:
        """Write the account of the source, for a preparation that goes on."""
        write_account(self._steps.values(), path=folder / ACCOUNT, told=self._told)

    def _pass(self, step: str, text: str) -> None:
        size = len(text.encode())
        account = self._steps[step]
        account.documents += 1
        account.bytes += size
        account.keep(size)

    def _drop(self, step: str, document: Document, *, reason: str, log: ReadingLog) -> None:
        log.skip(document.name, reason=reason)
        self._count_drop(step, document, reason=reason)

    def _count_drop(self, step: str, document: Document, *, reason: str) -> None:
        size = len(document.text.encode())
        account = self._steps[step]
        account.documents += 1
        account.bytes += size
        keep = ReadingConfig().max_remarks
        account.drop(document.name, text=document.text, size=size, reason=reason, keep=keep)

    def _tell(self, document: Document, *, kind: str, language: str) -> None:
        size = len(document.text.encode())
        domain = domain_of(kind=kind, language=language, provenance=document.provenance, configured="")
        told = (
            ("languages", language or kind, size),
            ("domains", domain, size),
            ("lengths", str(size.bit_length()), 1),
        )
        for what, name, count in told:
            self._told[what][name] = self._told[what].get(name, 0) + count


def source_account(folder: Path) -> tuple[list[StepAccount], dict[str, dict[str, int]]]:
    """Return what became of the documents of a source, and what is told of them."""
    steps, more = read_account(folder / ACCOUNT)
    told: dict[str, Any] = more["told"]
    return steps, told
