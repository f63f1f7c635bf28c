"""The steps of the first stage, as datatrove runs them: each takes documents, changes or drops them, and counts.

What a step needs (a model, a table) is made when its task begins, in the process that runs it.
"""

import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from datatrove.data import Document
from datatrove.pipeline.base import PipelineStep

from dsv3.config.curation import CurationConfig
from dsv3.data.curation.account import StepAccount, write_account
from dsv3.data.curation.document_file import KeptDocument, document_file, write_documents
from dsv3.data.curation.domain import domain_of, has_maths
from dsv3.data.curation.duplicates import Signer, bands_of, save_signatures
from dsv3.data.curation.evaluation_items import ItemFinder
from dsv3.data.curation.files import planned_files
from dsv3.data.curation.kinds import CODE, MATHS, PROSE, WEB
from dsv3.data.curation.language import LanguageModel
from dsv3.data.curation.personal import mask
from dsv3.data.curation.quality import Judge
from dsv3.data.curation.reading import read_raw
from dsv3.data.curation.repair import repair
from dsv3.data.curation.words import WordCounter, Words
from dsv3.data.document import ReadingLog

Documents = Iterator[Document]


class CurationStep(PipelineStep):  # type: ignore[misc]  # datatrove has no types
    """One step; a subclass says what becomes of a document."""

    type = "dsv3"

    def __init__(self, config: CurationConfig, *, folder: Path) -> None:
        super().__init__()
        self.config = config
        self.folder = folder
        self.account = StepAccount(name=self.name)

    def begin(self) -> None:
        """Make what the step needs."""

    def judge(self, document: Document) -> str:
        """Change a document as the step does, and return why it is dropped; '' keeps it."""
        raise NotImplementedError

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:  # noqa: ARG002
        """Pass on what is kept."""
        account = self.account = StepAccount(name=self.name)  # One worker may run several tasks in turn.
        self.begin()
        for document in data:
            size = document.metadata["bytes"]
            account.documents += 1
            account.bytes += size
            started = time.thread_time()
            before = document.text
            reason = self.judge(document)
            account.seconds += time.thread_time() - started
            if reason:
                self.drop(document, reason=reason)
                continue
            if document.text is not before:
                size = document.metadata["bytes"] = len(document.text.encode())
            account.keep(size)
            yield document

    def drop(self, document: Document, *, reason: str) -> None:
        """Count a document that goes no further."""
        self.account.drop(
            document.id,
            text=document.text,
            size=document.metadata["bytes"],
            reason=reason,
            keep=self.config.reading.max_remarks,
        )


class ReadFiles(CurationStep):
    """Reads the files of a task."""

    name = "read"

    def run(self, data: Documents | None = None, rank: int = 0, world_size: int = 1) -> Documents:  # noqa: ARG002
        """Yield every document there is."""
        log = ReadingLog()
        account = self.account = StepAccount(name=self.name)
        for file in planned_files(self.folder, task=rank):
            started = time.thread_time()
            source = self.config.inputs[file.source]
            for raw in read_raw(file, source=source, config=self.config.reading, log=log):
                size = len(raw.text.encode())
                account.documents += 1
                account.bytes += size
                account.keep(size)
                account.seconds += time.thread_time() - started
                about: dict[str, Any] = {
                    "bytes": size,
                    "source": raw.source,
                    "kind": raw.kind,
                    "code": raw.language,
                    "provenance": raw.provenance,
                }
                yield Document(text=raw.text, id=raw.name, metadata=about)
                started = time.thread_time()
        for reason, entry in log.skipped.items():
            account.dropped[reason] = [int(entry[0]), 0]
            account.samples[reason] = [(place, str(name), "") for place, name in enumerate(entry[1:])]
        account.noted.update({reason: int(entry[0]) for reason, entry in log.changed.items()})


class Repair(CurationStep):
    """Mends text."""

    name = "repair"

    def judge(self, document: Document) -> str:
        """Do it to one document."""
        if self.config.reading.repair:
            mended = repair(document.text, is_code=document.metadata["kind"] == CODE)
            if mended != document.text:
                document.text = mended
                self.account.noted["changed"] += 1
        return "" if document.text.strip() else "nothing is left"


class IdentifyLanguage(CurationStep):
    """Notes the language of prose, and drops what is in none, or in one that is not wanted."""

    name = "language"

    def begin(self) -> None:
        """Load it."""
        self._model = LanguageModel()

    def judge(self, document: Document) -> str:
        """Do it to one document."""
        about = document.metadata
        if about["kind"] == CODE:
            about["language"] = ""
            return ""
        about["language"], score = self._model.predict(document.text)
        if about["kind"] == PROSE and has_maths(document.text):
            about["kind"] = MATHS
        if score < self.config.language.min_score and about["kind"] != MATHS:
            return "no language is likely"
        wanted = self.config.language.keep
        return f"language {about['language']}" if wanted and about["language"] not in wanted else ""


class MaskPersonal(CurationStep):
    """Masks personal data and secrets."""

    name = "mask"

    def judge(self, document: Document) -> str:
        """Do it to one document."""
        text, found = mask(document.text, config=self.config.personal)
        if found:
            document.text = text
            self.account.noted.update(found)
        return ""


class JudgeQuality(CurationStep):
    """Drops what is not worth training on. Counts the words, which later steps use."""

    name = "quality"

    def begin(self) -> None:
        """Load it."""
        self._judge = Judge(self.config.quality)
        self._counter = WordCounter()

    def judge(self, document: Document) -> str:
        """Do it to one document."""
        about = document.metadata
        enabled = self.config.quality.enabled
        if enabled and about["kind"] == WEB:
            document.text = self._judge.without_policies(document.text)
        words = about["words"] = self._counter.words(document.text)
        if not enabled:
            return ""
        return self._judge.why_not(document.text, words=words, kind=about["kind"], language=about["language"])


class Decontaminate(CurationStep):
    """Drops what has an item of an evaluation."""

    name = "decontaminate"

    def begin(self) -> None:
        """Load it."""
        self._finder = ItemFinder(self.folder, config=self.config.contamination)

    def judge(self, document: Document) -> str:
        """Do it to one document."""
        if not self._finder:
            return ""
        return self._finder.find(document.text, words=document.metadata["words"])


class WriteDocuments(CurationStep):
    """The end of the stage: domains, signatures, the documents themselves, and the account of all steps."""

    name = "write"

    def __init__(self, config: CurationConfig, *, folder: Path, steps: list[CurationStep]) -> None:
        super().__init__(config, folder=folder)
        self.steps = steps

    def run(self, data: Documents, rank: int = 0, world_size: int = 1) -> Documents:  # noqa: ARG002
        """Write all; nothing comes out."""
        account = self.account = StepAccount(name=self.name)
        signer = Signer(self.config.duplicates)
        bands = bands_of(self.config.duplicates)
        languages: Counter[str] = Counter()
        domains: Counter[str] = Counter()
        lengths: Counter[int] = Counter()
        signatures = []
        with write_documents(document_file(self.folder, task=rank)) as writer:
            for document in data:
                started = time.thread_time()
                about = document.metadata
                kept = self._kept(document)
                writer.write(kept)
                words: Words = about["words"]
                signatures.append(signer.sign(document.text, words=words))
                languages[about["language"] or f"code: {about['code'] or 'other'}"] += about["bytes"]
                domains[kept.domain] += about["bytes"]
                lengths[about["bytes"].bit_length()] += 1
                account.documents += 1
                account.bytes += about["bytes"]
                account.keep(about["bytes"])
                account.seconds += time.thread_time() - started
        save_signatures(signatures, folder=self.folder / "signatures", task=rank, bands=bands)
        write_account(
            [*(step.account for step in self.steps), account],
            path=self.folder / "accounts" / "documents" / f"{rank:05d}.json",
            documents=writer.num_documents,
            languages=languages,
            domains=domains,
            lengths=lengths,
        )
        yield from ()

    def _kept(self, document: Document) -> KeptDocument:
        about = document.metadata
        source = self.config.inputs[about["source"]]
        domain = domain_of(
            kind=about["kind"],
            language=about["language"],
            provenance=about["provenance"],
            configured=source.domain,
        )
        return KeptDocument(
            name=document.id,
            text=document.text,
            source=about["source"],
            domain=domain,
            provenance=about["provenance"],
        )


def document_steps(config: CurationConfig, *, folder: Path) -> list[PipelineStep]:
    """Return the first stage: files to documents that have passed all rules, but for copies of others."""
    steps: list[CurationStep] = [
        step(config, folder=folder)
        for step in (ReadFiles, Repair, IdentifyLanguage, MaskPersonal, JudgeQuality, Decontaminate)
    ]
    return [*steps, WriteDocuments(config, folder=folder, steps=steps)]
