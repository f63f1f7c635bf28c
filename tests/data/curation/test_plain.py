"""The rules of `dsv3 data prepare` in one process: `dsv3 prepare` with them, stopped and not, and its card."""

import json
import random
from dataclasses import replace

import pytest

from dsv3.config import RulesConfig, SourceConfig
from dsv3.data import spool
from dsv3.data.curation.plain import PlainRules, plain_language
from dsv3.data.document import Document, ReadingLog
from dsv3.data.prepare import prepare_corpus
from dsv3.recipes import tiny
from dsv3.report.data_card import write_card

WORDS = [
    "river",
    "stone",
    "light",
    "paper",
    "window",
    "garden",
    "winter",
    "music",
    "letter",
    "market",
    "bridge",
    "silver",
    "forest",
    "engine",
    "planet",
    "number",
    "question",
    "answer",
    "animal",
    "island",
    "weather",
    "history",
    "kitchen",
    "language",
    "mountain",
    "problem",
    "reason",
    "teacher",
    "village",
    "machine",
]
ALL = RulesConfig(mend=True, mask=True, judge=True, near_copies=True)


def prose(seed: int) -> str:
    chance, made = random.Random(seed), []
    for _ in range(12):
        words = chance.sample(WORDS, 9)
        first, last = " and ".join(words[2:5]), " ".join(words[5:])
        made.append(f"The {words[0]} of the {words[1]} is to {first} with that {last}.")
    return "\n".join(made)


def test_each_rule_changes_or_drops_what_it_should_and_says_so(tmp_path):
    (tmp_path / "exam.jsonl").write_text(
        json.dumps({"question": "Who of the seven came first to the old bridge?"}) + "\n"
    )
    rules = PlainRules(replace(ALL, evaluations=(str(tmp_path / "exam.jsonl"),)), folder=tmp_path)
    log = ReadingLog()

    def became(text: str, name: str = "a.txt") -> str | None:
        document = rules.apply(Document(name=name, text=text), log=log)
        return None if document is None else document.text

    assert became(f"{prose(1)}\r\nWrite to ann.lee@mail.org.\x00") == f"{prose(1)}\nWrite to <EMAIL>."
    assert became("too short") is None
    assert became(f"{prose(2)}\nwho of the seven came first to the old bridge\n{prose(3)}") is None
    assert became("import os\n", name="a.py") == "import os"
    assert [(remark.reason, remark.count) for remark in log.skipped_remarks()] == [
        ("exam.jsonl", 1),
        ("too few words (Gopher)", 1),
    ]
    assert [remark.reason for remark in log.changed_remarks()] == ["masked: EMAIL", "mended"]


def test_near_copies_of_what_was_kept_are_found_and_sums_are_none(tmp_path):
    rules, log = PlainRules(RulesConfig(near_copies=True), folder=tmp_path), ReadingLog()
    texts = [prose(1), prose(2), prose(1) + "\nOne line more.", "What is 3 + 4?\n7", "What is 3 + 5?\n8"]
    found = [rules.is_near_copy(Document(name=str(n), text=text), log=log) for n, text in enumerate(texts)]
    assert found == [False, False, True, False, False]


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("春天来了，花开了。" * 4, "zh"),
        ("これはとても良い本です。" * 4, "ja"),
        (prose(1), "en"),
        ("Der Bär und die Möwe", ""),
    ],
)
def test_languages_are_told_by_script_and_words(text, language):
    assert plain_language(text) == language


@pytest.fixture
def config(tmp_path):
    for folder, numbers in (("first", range(1, 30)), ("second", range(20, 45))):
        (tmp_path / folder).mkdir()
        for number in numbers:
            more = "\nCall +49 30 901 820 99 soon." if folder == "first" else ""
            (tmp_path / folder / f"{number:02d}.txt").write_text(prose(number) + more)
    settings = tiny()
    return replace(
        settings,
        data=replace(
            settings.data,
            sources=tuple(SourceConfig(path=str(tmp_path / name)) for name in ("first", "second")),
            held_out_rate=0.1,
            rules=ALL,
        ),
        model=replace(settings.model, vocab_size=400),
        batch=replace(settings.batch, sequence_length=32),
    )


def test_a_run_prepares_its_text_by_the_rules_and_leaves_a_card(config, tmp_path):
    corpus = prepare_corpus(config, folder=tmp_path / "corpus")
    first, second = corpus.sources
    near = {remark.reason: remark.count for remark in second.skipped}["nearly the same text"]
    assert near == 10  # 20 to 29 are in both, but for a line.
    assert {remark.reason for remark in first.changed} == {"masked: PHONE"}
    assert (first.documents + first.held_out_documents, second.documents + second.held_out_documents) == (29, 15)
    card = json.loads((corpus.folder / "data_card.json").read_text())
    steps = {step["name"]: step for step in card["steps"]}
    assert (steps["read"]["documents"], steps["copies"]["kept_documents"]) == (54, 44)
    assert steps["mask"]["noted"] == {"PHONE": 29}
    page = write_card(corpus.folder).read_text()
    assert "dsv3 prepare" in page
    assert "decontaminate (not applied)" in page


def test_a_preparation_that_is_stopped_between_sources_ends_with_the_same(config, tmp_path, monkeypatch):
    whole = prepare_corpus(config, folder=tmp_path / "whole")
    real, count = spool.PlainRules.save, 0

    def stop(self: PlainRules, folder: object) -> None:
        nonlocal count
        count += 1
        if count == 2:
            raise KeyboardInterrupt
        real(self, folder)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(spool.PlainRules, "save", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(config, folder=tmp_path / "stopped")
    again = prepare_corpus(config, folder=tmp_path / "stopped")
    assert again.sources == whole.sources
    for file in ("data_card.json", "corpus.json", "sources/01-second/shard-00000.bin"):
        assert (again.folder / file).read_bytes() == (whole.folder / file).read_bytes()
