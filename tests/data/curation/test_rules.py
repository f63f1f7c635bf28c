"""Each rule by a text that breaks it and one that does not; code and mathematics survive the rules for prose."""

import inspect
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3.config.curation import ContaminationConfig, PersonalConfig, QualityConfig
from dsv3.data.curation.domain import domain_of, has_maths
from dsv3.data.curation.evaluation_items import EvaluationItem, ItemFinder, items_of_file, write_tables
from dsv3.data.curation.kinds import kind_of
from dsv3.data.curation.personal import is_card, is_iban, mask
from dsv3.data.curation.quality import Judge, repeated_words, top_characters
from dsv3.data.curation.repair import repair
from dsv3.data.curation.words import WordCounter
from dsv3.errors import DataError

GOOD = (
    "The committee met in the old library to discuss the plans for the new bridge over the river. Most of the "
    "members had read the long report beforehand, and they were prepared to ask difficult questions about money.\n"
    "After two hours the chair proposed a vote, which was carried with a small majority of those who were present."
)


def judged(text: str, *, kind: str = "prose", language: str = "en", **settings: object) -> str:
    config = QualityConfig(**settings)  # type: ignore[arg-type]
    return Judge(config).why_not(text, words=WordCounter().words(text), kind=kind, language=language)


def test_good_prose_is_kept():
    assert judged(GOOD) == ""


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("too few words (Gopher)", "Too short."),
        (
            "no stop words (Gopher)",
            "monday tuesday wednesday thursday friday saturday sunday january february march " * 3,
        ),
        ("number signs and ellipses (Gopher)", GOOD.replace(" ", " #", 20)),
        ("bullets (Gopher)", "\n".join(f"- the plan of {word} with that" for word in GOOD.split()[:12])),
        ("lines that end in an ellipsis (Gopher)", "\n".join(f"{line}..." for line in GOOD.split(". "))),
        ("repeated lines (Gopher)", GOOD + "\nread more of the text" * 4),
        (
            "mean length of words (Gopher)",
            "the of and " + "abcdefghijklmnopqrstuvwxyz" * 20 + " internationalisation" * 20,
        ),
        ("words without a letter (Gopher)", GOOD + " 12 34 56 78 90" * 10),
        ("forbidden phrase (C4)", GOOD + " Lorem ipsum dolor."),
        ("most frequent 2-gram (Gopher)", GOOD + " " + " ".join(f"wonderful holidays {w}" for w in "abcdefghijk")),
    ],
)
def test_a_text_that_breaks_a_rule_is_dropped_for_it(reason, text):
    assert judged(text) == reason


def test_repeated_passages_are_found():
    passage = " ".join(GOOD.split()[:12])
    assert judged(f"{GOOD} {passage} and now. {passage}").startswith("repeated 5-grams")


def test_rules_for_web_pages_hold_for_web_pages_alone():
    menu = "\n".join(
        f"{word} of the page"
        for word in ["home", "news", "sport", "culture", "travel", "weather", "that", "with", "about"]
    )
    assert judged(menu, min_words=5, kind="web") == "lines without a mark at their end (FineWeb)"
    assert judged(menu, min_words=5, max_top_ngram=(1.0, 1.0, 1.0), max_repeated_ngram=(1.0,) * 6) == ""


def test_policy_lines_are_taken_out_of_pages():
    page = f"{GOOD}\nWe use cookies to improve this site.\nThe end of it."
    assert Judge(QualityConfig()).without_policies(page) == f"{GOOD}\nThe end of it."


@pytest.mark.parametrize("module", [json.decoder, inspect, re])
def test_code_survives(module):
    assert judged(inspect.getsource(module), kind="code", language="") == ""


def test_generated_code_does_not():
    assert judged("x = [" + "1," * 5000 + "]", kind="code") == "code: lines too long"
    assert judged("{};[]()\n" * 50, kind="code") == "code: too few letters"


def test_mathematics_survives_the_rules_that_count_signs():
    proof = "Let $n \\geq 2$ be such that $n^2 = 4 + 3 x$ with $x > 0$ and so $\\frac{n}{2} = 1 + 2$. "
    text = " ".join(proof.replace("2", str(number)) for number in range(9))
    relaxed = {"max_top_ngram": (1.0, 1.0, 1.0), "max_repeated_ngram": (1.0,) * 6}
    assert has_maths(text)
    assert judged(text, kind="maths", **relaxed) == ""
    assert not has_maths(GOOD * 3)


def test_chinese_is_not_measured_by_the_length_of_its_words():
    text = "春天来了，花园里的花都开了。孩子们在河边放风筝，老人坐在树下喝茶聊天，远处的山上还有一点雪。"
    assert judged(text, language="zh") == ""


@given(st.lists(st.sampled_from("abc"), max_size=40), st.integers(2, 10))
def test_ngram_measures_are_those_of_a_plain_count(words, size):
    counted = WordCounter().words(" ".join(words))
    grams = [tuple(words[place : place + size]) for place in range(len(words) - size + 1)]
    covered = set()
    for place, gram in enumerate(grams):
        if gram in grams[:place]:
            covered.update(range(place, place + size))
    rows = counted.rows_by_size(10)[size]
    assert set(repeated_words(rows, size=size, count=len(words)).nonzero()[0].tolist()) == covered
    most = max(map(grams.count, grams), default=0)
    assert top_characters(rows, size=size, lengths=counted.lengths) == (most * size if most > 1 else 0)


@pytest.mark.parametrize(
    ("broken", "meant"),
    [
        ("cafÃ© and naÃ¯ve", "café and naïve"),
        ("It\u00e2\u20ac\u2122s here", "It’s here"),
        ("one\r\ntwo\rthree", "one\ntwo\nthree"),
        ("N\x08NA\x08AM\x08ME\x08E", "NAME"),
        ("\x1b[1mbold\x1b[0m\x00", "bold"),
        ("trailing   \nspaces", "trailing\nspaces"),
        ("春天来了，“你好”", "春天来了，“你好”"),
    ],
)
def test_text_is_mended(broken, meant):
    assert repair(broken, is_code=False) == meant


def test_code_keeps_its_spaces_and_entities():
    assert repair('x = "&amp;  "  \n\n\n\n\ny', is_code=True) == 'x = "&amp;  "  \n\n\n\n\ny'


@given(st.text(max_size=200))
def test_mending_twice_is_mending_once_for_code(text):
    once = repair(text, is_code=True)
    assert repair(once, is_code=True) == once


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("mail ann.lee@mail.org now", "mail <EMAIL> now"),
        ("mail a@example.com now", "mail a@example.com now"),
        ("at 8.8.8.8 or 192.168.0.1", "at <IP> or 192.168.0.1"),
        ("version 1.2.3.0", "version 1.2.3.0"),
        ("call +49 30 901 820 99 soon", "call <PHONE> soon"),
        ("call (415) 555-2671", "call <PHONE>"),
        ("打 138-0013-8000 吧", "打 <PHONE> 吧"),
        ("card 4111 1111 1111 1111.", "card <CARD>."),
        ("number 4111 1111 1111 1112", "number 4111 1111 1111 1112"),
        ("to GB82 WEST 1234 5698 7654 32", "to <IBAN>"),
        ("key AKIAIOSFODNN7EXAMPLE", "key <SECRET>"),
        ("@decorator\ndef f(a): return a@b", "@decorator\ndef f(a): return a@b"),
        ("2 ** 64 = 18446744073709551616", "2 ** 64 = 18446744073709551616"),
    ],
)
def test_personal_data_is_masked_and_what_only_looks_like_it_is_not(text, masked):
    assert mask(text, config=PersonalConfig())[0] == masked


def test_check_digits_are_the_published_ones():
    assert is_card("5500005555555559")
    assert not is_card("5500005555555558")
    assert is_iban("DE89370400440532013000")
    assert not is_iban("DE88370400440532013000")


ITEMS = [
    EvaluationItem(
        set="long", text="Which of these seven rivers flows through the middle of the old town of Prague today?"
    ),
    EvaluationItem(set="middle", text="Who wrote the first book about the red planet?"),
    EvaluationItem(set="short", text="Where do black swans live?"),
    EvaluationItem(set="tiny", text="Is it so?"),
]


@pytest.fixture
def found(tmp_path):
    write_tables(ITEMS, folder=tmp_path, config=ContaminationConfig())
    finder, counter = ItemFinder(tmp_path, config=ContaminationConfig()), WordCounter()
    return lambda text: finder.find(text, words=counter.words(text))


@pytest.mark.parametrize("item", ITEMS[:3])
def test_every_item_is_found_in_any_case_and_with_any_signs(found, item):
    planted = f"{GOOD}\n{item.text.upper().replace(' ', '  ').rstrip('?')}!\n{GOOD}"
    assert found(planted) == item.set


def test_thirteen_words_of_an_item_are_enough_and_twelve_are_not(found):
    words = ITEMS[0].text.split()
    assert found(f"{GOOD} {' '.join(words[1:14])} {GOOD}") == "long"
    assert found(f"{GOOD} {' '.join(words[1:13])} {GOOD}") == ""


def test_short_items_must_be_lines_and_tiny_ones_are_not_looked_for(found):
    assert found(f"{GOOD} Where do black swans live? {GOOD}") == ""
    assert found(f"{GOOD}\nIs it so?\n{GOOD}") == ""


def test_items_of_a_file_of_your_own(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text('{"question": "What is asked?", "answer": "This."}\n')
    assert [item.text for item in items_of_file(file)] == ["What is asked?", "This."]
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="no text"):
        list(items_of_file(tmp_path / "empty.txt"))


def test_domains():
    known = {"kind": "prose", "language": "en", "provenance": "", "configured": ""}
    assert domain_of(**known) == "english"
    assert domain_of(**known | {"language": "zh"}) == "chinese"
    assert domain_of(**known | {"language": "fr"}) == "other-languages"
    assert domain_of(**known | {"kind": "code"}) == "code"
    assert domain_of(**known | {"provenance": "r1"}) == "synthetic"
    assert domain_of(**known | {"configured": "law"}) == "law"


@pytest.mark.parametrize(
    ("name", "kind", "language"),
    [
        ("a.py", "code", "python"),
        ("A.TXT", "prose", ""),
        ("x.md.gz", "prose", ""),
        ("ls.1.gz", "code", "roff"),
        ("Makefile", "code", "make"),
        ("page.html", "web", ""),
        ("paper.tex", "maths", ""),
        ("crawl.warc.gz", "web", ""),
    ],
)
def test_kinds_go_by_the_name_of_a_file(name, kind, language):
    found = kind_of(name)
    assert found is not None
    assert (found.kind, found.language) == (kind, language)


def test_what_is_no_text_has_no_kind():
    assert kind_of("photo.jpg") is None
    assert kind_of("core") is None
