"""The rules keep nearly all of what is known to be good, and nearly nothing of what is known to be junk."""

import base64
import gzip
import json
import random
import string
import sysconfig
from collections import Counter
from functools import cache
from pathlib import Path

import pytest

pytest.importorskip("fasttext", reason="needs the extra 'data'")

from dsv3.config.curation import QualityConfig
from dsv3.data.curation.domain import has_maths
from dsv3.data.curation.kinds import CODE, MATHS, PROSE, WEB
from dsv3.data.curation.language import LanguageModel
from dsv3.data.curation.quality import Judge
from dsv3.data.curation.repair import repair
from dsv3.data.curation.words import WordCounter

MOST, LONGEST = 40, 8_000
"""Texts of each set, from all places of it, and characters of each. docs/data.md has the shares of 400 whole ones."""


@pytest.fixture(scope="module")
def model():
    return LanguageModel()


def share_kept(texts: list[str], *, kind: str, model: LanguageModel) -> tuple[float, dict[str, int]]:
    """Judge as `dsv3 data prepare` does, and return the share that stays and why the others do not."""
    judge, counter, reasons = Judge(QualityConfig()), WordCounter(), Counter()
    for text in texts:
        mended = repair(text[:LONGEST], is_code=kind == CODE)
        language, score = ("", 1.0) if kind == CODE else model.predict(mended)
        about = MATHS if kind == PROSE and has_maths(mended) else kind
        if score < 0.2 and about != MATHS:
            reasons["no language is likely"] += 1
        else:
            reasons[judge.why_not(mended, words=counter.words(mended), kind=about, language=language)] += 1
    return reasons.pop("", 0) / len(texts), dict(reasons)


@cache
def records(file: Path) -> list[dict]:
    with gzip.open(file, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def pages(folder: Path, language: str) -> list[str]:
    found: dict[str, list[str]] = {}
    for pair in records(folder / "python-docs-en-zh/pairs.jsonl.gz"):
        found.setdefault(pair["file"], []).append(pair[language])
    return ["\n\n".join(page) for page in found.values()]


def articles(folder: Path) -> list[str]:
    with gzip.open(folder / "wikitext2/valid.txt.gz", "rt", encoding="utf-8") as file:
        return [f"= {one}" for one in file.read().split("\n = ") if len(one) > 500 and not one.startswith("= ")]


GOOD = {
    "Wikipedia, English": (PROSE, articles),
    "LSAT": (PROSE, lambda folder: [one["passage"] for one in records(folder / "agieval/lsat-rc.jsonl.gz")]),
    "Wikipedia, Chinese": (PROSE, lambda folder: [one["context"] for one in records(folder / "cmrc2018/dev.jsonl.gz")]),
    "Romance of the Three Kingdoms": (
        PROSE,
        lambda folder: [one["text"] for one in records(folder / "chinese-classics/sanguo_yanyi.jsonl.gz")],
    ),
    "Chinese poems": (
        PROSE,
        lambda folder: [one["text"] for one in records(folder / "chinese-classics/poems.jsonl.gz")],
    ),
    "Python's documentation, English": (PROSE, lambda folder: pages(folder, "en")),
    "Python's documentation, Chinese": (PROSE, lambda folder: pages(folder, "zh")),
    "GSM8K": (
        PROSE,
        lambda folder: [f"{one['question']}\n{one['answer']}" for one in records(folder / "gsm8k/train.jsonl.gz")],
    ),
    "MATH": (
        PROSE,
        lambda folder: [f"{one['problem']}\n{one['solution']}" for one in records(folder / "math/train4500.jsonl.gz")],
    ),
    "HumanEval": (
        CODE,
        lambda folder: [
            one["prompt"] + one["canonical_solution"] for one in records(folder / "humaneval/HumanEval.jsonl.gz")
        ],
    ),
    "MBPP": (CODE, lambda folder: [one["code"] for one in records(folder / "mbpp/mbpp.jsonl.gz")]),
}


@pytest.mark.parametrize("name", GOOD)
def test_good_text_is_kept(name, shared_data, model):
    kind, read = GOOD[name]
    texts = read(shared_data)
    kept, reasons = share_kept(texts[:: max(1, len(texts) // MOST)][:MOST], kind=kind, model=model)
    assert kept >= (0.75 if name == "Python's documentation, English" else 0.88), reasons


def test_the_standard_library_is_kept(model):
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[::5]
    kept, reasons = share_kept([file.read_text(encoding="utf-8") for file in files], kind=CODE, model=model)
    assert kept >= 0.97, reasons


CHANCE = random.Random(0)


def made_up(number: int, *, least: int = 3, most: int = 9) -> list[str]:
    return ["".join(CHANCE.choices(string.ascii_lowercase, k=CHANCE.randint(least, most))) for _ in range(number)]


VOCABULARY = made_up(400)


def log_line() -> str:
    numbers = [CHANCE.randint(1, 99_999) for _ in range(3)]
    return f"2024-03-0{CHANCE.randint(1, 9)}T12:07:0{CHANCE.randint(1, 9)}.{numbers[0]} [{numbers[1]}] {numbers[2]} ok"


def minified() -> str:
    return "".join(f"var {a}=function({b}){{return {b}+1}};" for a, b in zip(made_up(200), made_up(200), strict=True))


JUNK = {
    "letters at random": (PROSE, lambda: " ".join(made_up(200, most=14))),
    "base64": (PROSE, lambda: base64.b64encode(CHANCE.randbytes(1500)).decode()),
    "one sentence again and again": (PROSE, lambda: "Buy the best of shoes with free shipping to that land. " * 20),
    "key words": (PROSE, lambda: ", ".join(f"cheap {one}" for one in CHANCE.choices(VOCABULARY[:6], k=90))),
    "tables of numbers": (
        PROSE,
        lambda: "\n".join(",".join(f"{CHANCE.random():.4f}" for _ in range(12)) for _ in range(30)),
    ),
    "logs": (PROSE, lambda: "\n".join(log_line() for _ in range(30))),
    "lorem ipsum": (PROSE, lambda: "Lorem ipsum dolor sit amet, consectetur adipiscing elit. " + " ".join(made_up(60))),
    "menus": (WEB, lambda: "\n".join(" ".join(CHANCE.choices(VOCABULARY, k=2)).title() for _ in range(30))),
    "teasers": (
        PROSE,
        lambda: "\n".join(f"The {' '.join(CHANCE.choices(VOCABULARY, k=9))} of that and ..." for _ in range(30)),
    ),
    "too short": (PROSE, lambda: f"Click here to read the {made_up(1)[0]}."),
    "minified scripts": (CODE, minified),
    "data in code": (CODE, lambda: "x = [\n" + "  [{}], [{}], [{}], [{}],\n" * 60 + "]"),
}


@pytest.mark.parametrize("name", JUNK)
def test_junk_is_dropped(name, model):
    kind, make = JUNK[name]
    kept, _ = share_kept([make() for _ in range(MOST // 2)], kind=kind, model=model)
    assert kept <= 0.02
