"""Real text of this machine, what is planted in it, and files that are large in every way."""

import gzip
import json
import random
import shutil
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from dsv3.config.curation import InputConfig, ReadingConfig
from dsv3.data.contamination import WORD
from dsv3.data.curation.files import list_files
from dsv3.data.curation.reading import read_raw
from dsv3.data.document import ReadingLog

EXACT, NEAR, CONTAMINATED = 200, 400, 200
SHINGLE = 5


@dataclass(frozen=True, kw_only=True)
class Planted:
    """Names of the documents that must be gone."""

    exact: list[str]
    near: dict[str, float]
    """With the share of shingles that each has in common with its original."""
    contaminated: list[str]
    items_file: Path


def real_folders(*, quick: bool) -> dict[str, Path]:
    """Return folders of real text on this machine, by name."""
    documents, manuals = Path("/usr/share/doc"), Path("/usr/share/man")
    code = Path(sysconfig.get_path("stdlib"))
    if quick:
        return {"json": code / "json", "manuals": manuals / "de"}
    installed = {"debian-python": Path("/usr/lib/python3"), "python": Path("/usr/lib/python3.11")}
    folders = {"documents": documents, "manuals": manuals, **installed}
    return {name: folder for name, folder in folders.items() if folder.is_dir()}


def links(folders: dict[str, Path], *, folder: Path, megabytes: int, every: int = 1) -> list[str]:
    """Fill folders with links to so many MB of real files, every nth of them, and return them as inputs."""
    log, inputs = ReadingLog(), []
    for name, place in folders.items():
        files = list_files(InputConfig(name=name, path=str(place)), number=0, log=log)
        random.Random(name).shuffle(files)
        (folder / name).mkdir(parents=True)
        taken = 0
        for number, file in enumerate(files):
            if taken > megabytes * 1_000_000 // len(folders):
                break
            taken += file.size
            if number % every == 0:
                (folder / name / f"{number:06d}-{file.name}").symlink_to(file.url)
        inputs.append(f"{name}={folder / name}")
    return inputs


def sentences(chance: random.Random, *, words: list[str], count: int) -> str:
    """Return made-up prose that no rule drops."""
    lines = []
    for _ in range(count):
        some = chance.sample(words, 11)
        lines.append(
            f"The {some[0]} {some[1]} of the {some[2]} is to {' '.join(some[3:8])} with that {' '.join(some[8:])}."
        )
    return "\n".join(lines)


def shingles(text: str) -> set[tuple[str, ...]]:
    words = WORD.findall(text.lower())
    return {tuple(words[place : place + SHINGLE]) for place in range(len(words) - SHINGLE + 1)}


def plant(folder: Path) -> Planted:
    """Write a folder of planted documents."""
    chance = random.Random(0)
    folder.mkdir(parents=True)
    words = sorted({word for word in WORD.findall(Path(json.__file__).read_text().lower()) if len(word) > 3})
    words += [first + second for first in words[:150] for second in ("er", "ing", "ship")]
    exact, near, contaminated, items = [], {}, [], []
    for number in range(EXACT):
        text = sentences(chance, words=words, count=12)
        (folder / f"a-{number:04d}.txt").write_text(text)
        (folder / f"exact-{number:04d}.txt").write_text("\n" + text + "  \n")
        exact.append(f"planted/exact-{number:04d}.txt")
    for number in range(NEAR):
        text = sentences(chance, words=words, count=25)
        changed = text.split(" ")
        for place in chance.sample(range(len(changed)), chance.randint(2, 22)):
            changed[place] = "altered"
        other = " ".join(changed)
        (folder / f"b-{number:04d}.txt").write_text(text)
        (folder / f"near-{number:04d}.txt").write_text(other)
        first, second = shingles(text), shingles(other)
        near[f"planted/near-{number:04d}.txt"] = len(first & second) / len(first | second)
    for number in range(CONTAMINATED):
        item = sentences(chance, words=words, count=1).replace("The ", "Which ").rstrip(".") + " at noon?"
        text = sentences(chance, words=words, count=12)
        (folder / f"item-{number:04d}.txt").write_text(f"{text}\n{item.upper()}\n{text[:300]}.")
        contaminated.append(f"planted/item-{number:04d}.txt")
        items.append(item)
    write_junk(folder, chance=chance)
    items_file = folder / "items.jsonl"
    items_file.write_text("".join(json.dumps({"question": item}) + "\n" for item in items))
    outside = folder.with_name("items.jsonl")
    items_file.rename(outside)  # The items themselves are no text to train on.
    return Planted(exact=exact, near=near, contaminated=contaminated, items_file=outside)


def write_junk(folder: Path, *, chance: random.Random) -> None:
    """Write what no reader should fall over."""
    (folder / "junk.bin").write_bytes(chance.randbytes(2_000_000))
    (folder / "junk.txt").write_bytes(chance.randbytes(2_000_000))
    (folder / "junk.jsonl").write_bytes(
        chance.randbytes(100_000) + b'\n{"text": \n[1, 2]\n"text"\n{"text": "\\ud800 half"}\n'
    )
    (folder / "cut.txt.gz").write_bytes(b"\x1f\x8b\x08\x00" + chance.randbytes(5000))
    (folder / "latin.txt").write_bytes("Der Bär grüßt die Möwe über dem Fluß. ".encode("latin-1") * 60)
    (folder / "wide.txt").write_text("The sea and the land of that time. " * 60, encoding="utf-16")
    (folder / "broken.txt").write_bytes(b"Half a \xe4\xb8 character and \xff\xfe of that. " * 60)
    (folder / "empty.txt").touch()


def write_large(folder: Path, *, megabytes: int) -> None:
    """Write a single line of so many MB, as text and as JSON, a page of a fifth of it, and gzip of each.

    An eighth of the line is text that is kept; the rest says the same again and again. Beside them lie what is just
    within the limits: a page with nearly as many tags and bytes as may be, a line of JSON in Chinese.
    """
    folder.mkdir(parents=True)
    chance, limits = random.Random(1), ReadingConfig()
    words = [f"{first}{second}{third}" for first in "bdfgklmnprst" for second in "aeiou" for third in "lmnrst"]
    words += ["the", "of", "and", "to", "with", "that"] * 20
    blocks = [" ".join(chance.choices(words, k=3000)).encode() + b". " for _ in range(40 * megabytes // 8)]
    repeated = megabytes * 7 // 8 * 1_000_000 // len(blocks[0])
    with (folder / "line.txt").open("wb") as text, (folder / "line.jsonl").open("wb") as line:
        line.write(b'{"text": "')
        for block in (*chance.choices(blocks, k=megabytes * 125_000 // len(blocks[0])), *[blocks[0]] * repeated):
            text.write(block)
            line.write(block)
        line.write(b'"}\n{"text": "after a long line"}\n')
    with (folder / "page.html").open("wb") as page:
        page.write(b"<html><body><article>")
        for number in range(megabytes // 5 * 1_000_000 // 1000):
            page.write(b"<p>" + blocks[number % len(blocks)][:1000] + b"</p>\n")
    for name in ("line.txt", "line.jsonl", "page.html"):
        with (folder / name).open("rb") as whole, gzip.open(folder / f"{name}.gz", "wb", compresslevel=1) as packed:
            shutil.copyfileobj(whole, packed, 2**20)
    tags = limits.max_page_tags * 9 // 10 // 4
    cells = (f"<p>{words[n % 300]} and <a href=/>{words[n * 7 % 360]} {n}</a></p>\n" for n in range(tags))
    (folder / "tags.html").write_text(f"<html><body>{''.join(cells)}</body></html>")
    signs = "".join(map(chr, range(0x4E00, 0x4E00 + 3000)))
    chinese = "".join(chance.choices(signs, k=limits.max_line_bytes * 9 // 10 // 3))
    (folder / "chinese.jsonl").write_text(json.dumps({"text": chinese}, ensure_ascii=False) + "\n", encoding="utf-8")


def sample_lines(inputs: list[str], *, folder: Path, megabytes: int) -> float:
    """Write documents of the inputs as JSON lines, and return how many MB of text they are."""
    folder.mkdir()
    total, log = 0, ReadingLog()
    share = megabytes * 1_000_000 // len(inputs)
    with (folder / "lines.jsonl").open("w", encoding="utf-8") as file:
        for number, given in enumerate(inputs):
            name, path = given.split("=", 1)
            source = InputConfig(name=name, path=path)
            files = list_files(source, number=number, log=log)
            random.Random(number).shuffle(files)
            taken = 0
            for one in files:
                for raw in read_raw(one, source=source, config=ReadingConfig(max_document_bytes=200_000), log=log):
                    file.write(json.dumps({"id": raw.name, "text": raw.text}) + "\n")
                    taken += len(raw.text.encode())
                    if taken > share:
                        break
                if taken > share:
                    break
            total += taken
    return total / 1e6
