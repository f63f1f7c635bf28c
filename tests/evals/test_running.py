"""A task is scored item by item; what is wrong is told and the rest goes on; nothing is asked twice."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.errors import ConfigError, DataError, EngineError, MissingExtraError, TrainingError
from dsv3.evals import running
from dsv3.evals.answerer import Answerer, Continuation
from dsv3.evals.benchmarks import run_benchmarks
from dsv3.evals.question import EvalTask, Question
from dsv3.evals.results import read_results
from dsv3.evals.running import CannotAnswerError, ItemsFile, read_outcomes, run_task
from dsv3.evals.suite import suite_named
from dsv3.runtime.hold import hold_folder

MODEL = {"model": "one"}


class Reader:
    """Likes texts by the number in them, one nat a unit, and answers a prompt with its last word."""

    def __init__(self, *, breaks=lambda text: None):
        self.asked, self.breaks = [], breaks

    def _look(self, texts):
        for text in texts:
            self.breaks(text)
        self.asked += texts

    def continuations(self, pairs):
        self._look([context + text for context, text in pairs])
        return [
            Continuation(
                logprob=-float(text.split("=")[1].split()[0]), is_greedy=False, num_tokens=len(text.split()), num_cut=0
            )
            for text in (context + text for context, text in pairs)
        ]

    def rolling(self, texts):
        self._look(list(texts))
        return [-math.log(2) * 3 * len(text) for text in texts]

    def generate(self, prompts, *, stops, max_tokens):
        self._look(list(prompts))
        return [prompt.split()[-1] for prompt in prompts]


def words(count, **changes):
    questions = [
        Question(id=f"w{i}", prompt=f"say {i % 3}", answer=str(i % 2), more={"kind": "ab"[i % 2]}) for i in range(count)
    ]
    settings = {
        "name": "words",
        "protocol": "generate",
        "metric": "EM",
        "shots": 0,
        "questions": lambda folder: iter(questions),
        "grade": lambda question, answer: {"EM": float(answer == question.answer)},
    }
    return EvalTask(**(settings | changes))


def choices(questions, **changes):
    settings = {"name": "pick", "protocol": "choices", "metric": "EM", "shots": 0}
    return EvalTask(**(settings | {"questions": lambda folder: iter(questions)} | changes))


def run(task, folder, *, answerer=None, limit=None):
    items = ItemsFile(folder, model=MODEL)
    return run_task(task, answerer=answerer or Reader(), data=folder, items=items, limit=limit)


def test_the_reader_of_these_tests_is_an_answerer():
    assert isinstance(Reader(), Answerer)


# ---- what is scored ----


def test_answers_are_judged_by_the_rule_of_the_task(tmp_path):
    done = run(words(6), tmp_path)
    assert [outcome.scores["EM"] for outcome in done.outcomes] == [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert [outcome.answer for outcome in done.outcomes] == list("012012")
    assert done.first_prompt == "say 0"


@pytest.mark.parametrize(
    ("normalise", "picked"),
    [
        ("none", 0),  # -5 against -6
        ("bytes", 1),  # -5/3 against -6/8: "é=5" has four bytes, but its first is the space's
        ("tokens", 1),  # -5/1 against -6/2
    ],
)
def test_the_likeliest_choice_is_picked_by_its_length_where_the_task_says_so(tmp_path, normalise, picked):
    question = Question(id="a", prompt="q", choices=(" x=5", " a long=6"), answer=picked)
    [outcome] = run(choices([question], normalise=normalise), tmp_path).outcomes
    assert outcome.answer == picked
    assert outcome.scores == {"EM": 1.0}
    assert outcome.logprobs == (-5.0, -6.0)


def test_bytes_are_counted_without_the_space_before_a_choice_and_in_utf_8(tmp_path):
    # 5/4 (é has two bytes) is more than 6/5; counted with the space 5/5 would be less than 6/6 or equal.
    question = Question(id="a", prompt="q", choices=(" é=5", " abc=6"), answer=1)
    [outcome] = run(choices([question], normalise="bytes"), tmp_path).outcomes
    assert outcome.answer == 1


def test_each_choice_follows_its_own_context_where_there_are_several(tmp_path):
    reader = Reader()
    question = Question(id="a", prompt="", contexts=("Ann =7", "Bob =3"), choices=(" x", " x"), answer=1)
    [outcome] = run(choices([question]), tmp_path, answerer=reader).outcomes
    assert outcome.answer == 1
    assert reader.asked == ["Ann =7 x", "Bob =3 x"]


def test_rolling_counts_bits_and_bytes(tmp_path):
    task = EvalTask(
        name="text",
        protocol="rolling",
        metric="BPB",
        shots=0,
        questions=lambda folder: iter([Question(id="a", prompt="héllo")]),
    )
    [outcome] = run(task, tmp_path).outcomes
    assert outcome.scores == pytest.approx({"bits": 15.0, "bytes": 6.0})


def test_a_limit_takes_the_first_items_and_reads_no_further(tmp_path):
    def questions(folder):
        yield from words(4).questions(folder)
        raise AssertionError("read on")

    done = run(words(4, questions=questions), tmp_path, limit=3)
    assert [outcome.id for outcome in done.outcomes] == ["w0", "w1", "w2"]
    assert done.troubles == []


def test_answers_are_no_longer_than_is_allowed_and_another_length_is_another_question(tmp_path):
    class Counted(Reader):
        def generate(self, prompts, *, stops, max_tokens):
            return [str(most) for most in max_tokens]

    questions = [Question(id="a", prompt="p", max_tokens=8192), Question(id="b", prompt="p", max_tokens=16)]
    task, items = words(0, questions=lambda folder: iter(questions)), ItemsFile(tmp_path, model=MODEL)
    setting = {"answerer": Counted(), "data": tmp_path, "items": items}
    assert [one.answer for one in run_task(task, max_tokens=100, **setting).outcomes] == ["100", "16"]
    again = run_task(task, **setting)
    assert [one.answer for one in again.outcomes] == ["8192", "16"]
    assert again.num_kept == 1


# ---- a run that is killed ----


@given(place=st.integers(0, 99))
@settings(max_examples=5, deadline=None)
def test_a_run_that_breaks_anywhere_goes_on_and_asks_nothing_twice_that_was_kept(tmp_path_factory, place):
    folder = tmp_path_factory.mktemp("run")
    task = words(100, questions=lambda folder: (Question(id=str(i), prompt=f"n {i}") for i in range(100)))

    def breaks(text):
        if text == f"n {place}":
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(task, folder, answerer=Reader(breaks=breaks))
    kept = {outcome.id for outcome in read_outcomes(folder)[1]}
    assert len(kept) == place // running.BATCH * running.BATCH
    reader = Reader()
    done = run(task, folder, answerer=reader)
    assert len(reader.asked) == 100 - len(kept)
    assert done.num_kept == len(kept)
    assert [outcome.id for outcome in done.outcomes] == [str(i) for i in range(100)]
    again = Reader()
    assert run(task, folder, answerer=again).outcomes == done.outcomes
    assert again.asked == []


def test_a_last_line_that_was_half_written_is_dropped(tmp_path):
    whole = run(words(5), tmp_path).outcomes
    file = tmp_path / running.ITEMS
    content = file.read_bytes()
    file.write_bytes(content[:-20])
    reader = Reader()
    assert run(words(5), tmp_path, answerer=reader).outcomes == whole
    assert len(reader.asked) == 1
    assert file.read_bytes() == content


def test_a_damaged_line_in_the_middle_is_told(tmp_path):
    run(words(3), tmp_path)
    file = tmp_path / running.ITEMS
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:10], lines[3]]) + "\n")
    with pytest.raises(DataError, match="line 3: not JSON"):
        ItemsFile(tmp_path, model=MODEL)


def test_an_item_that_is_asked_in_another_form_is_asked_again(tmp_path):
    run(words(2), tmp_path)
    reader = Reader()
    changed = [Question(id="w0", prompt="say 0", answer="0"), Question(id="w1", prompt="say 5", answer="1")]
    done = run(words(2, questions=lambda folder: iter(changed)), tmp_path, answerer=reader)
    assert reader.asked == ["say 5"]
    assert [outcome.answer for outcome in done.outcomes] == ["0", "5"]


def test_the_answers_of_another_model_are_left_alone(tmp_path):
    run(words(2), tmp_path)
    with pytest.raises(ConfigError, match="choose another folder with --output"):
        ItemsFile(tmp_path, model={"model": "two"})


# ---- what is wrong is told, and the rest goes on ----


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"answer": 2}, "the answer is 2, and should be a choice's place, 0 to 1"),
        ({"answer": "A"}, "the answer is 'A'"),
        ({"answer": -1}, "the answer is -1"),
        ({"choices": (" =1",)}, "two choices with text are wanted"),
        ({"choices": (" =1", " ")}, "two choices with text are wanted"),
        ({"contexts": ("a",)}, "there are 1 contexts for 2 choices"),
        ({"id": "first"}, "another item has the same id"),
    ],
)
def test_a_wrong_item_is_told_and_the_others_are_scored(tmp_path, changes, told):
    right = {"id": "x", "prompt": "q", "choices": (" =1", " =2"), "answer": 0}
    questions = [
        Question(**(right | {"id": "first"})),
        Question(**(right | changes)),
        Question(**(right | {"id": "z"})),
    ]
    done = run(choices(questions), tmp_path)
    assert [outcome.id for outcome in done.outcomes] == ["first", "z"]
    assert [(trouble.item, told in trouble.reason) for trouble in done.troubles] == [(questions[1].id, True)]


def test_an_item_that_the_model_refuses_is_found_among_those_asked_with_it(tmp_path):
    def breaks(text):
        if text == "too long 17":
            raise DataError("17 is too long")

    task = words(0, questions=lambda folder: (Question(id=str(i), prompt=f"too long {i}") for i in range(40)))
    done = run(task, tmp_path, answerer=Reader(breaks=breaks))
    assert [outcome.id for outcome in done.outcomes] == [str(i) for i in range(40) if i != 17]
    assert [(trouble.item, trouble.reason) for trouble in done.troubles] == [("17", "17 is too long")]


def test_a_task_is_given_up_when_no_item_can_be_scored(tmp_path):
    def breaks(text):
        raise ConfigError("an answer of 512 tokens leaves no room")

    done = run(words(100), tmp_path, answerer=Reader(breaks=breaks))
    assert len(done.troubles) == running.TROUBLES_IN_A_ROW + 1
    assert done.troubles[-1].item == ""
    assert "given up" in done.troubles[-1].reason


def test_data_that_are_missing_or_break_off_are_told_and_what_came_before_is_scored(tmp_path):
    def questions(folder):
        yield Question(id="a", prompt="say 1", answer="1")
        raise DataError("words.jsonl, item b: there is no answer")

    done = run(words(0, questions=questions), tmp_path)
    assert [outcome.id for outcome in done.outcomes] == ["a"]
    assert [trouble.reason for trouble in done.troubles] == [
        "words.jsonl, item b: there is no answer; the 1 items before it are scored"
    ]


def test_an_answer_that_cannot_be_judged_is_told_and_not_drawn_again(tmp_path):
    def grade(question, answer):
        if question.id == "w1":
            raise DataError("no such test")
        return {"EM": 1.0}

    reader = Reader()
    done = run(words(3, grade=grade), tmp_path, answerer=reader)
    assert len(reader.asked) == len(done.outcomes) + 1 == 3
    assert [trouble.item for trouble in done.troubles] == ["w1"]


def test_a_rule_whose_package_is_missing_ends_its_task(tmp_path):
    def grade(question, answer):
        raise MissingExtraError(package="math-verify", extra="rl", purpose="mathematics")

    done = run(words(3, grade=grade), tmp_path)
    assert [(trouble.item, "pip install" in trouble.reason) for trouble in done.troubles] == [("", True)]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_probability_that_is_no_number_is_told(tmp_path, value):
    class Broken(Reader):
        def continuations(self, pairs):
            return [Continuation(logprob=-value, is_greedy=False, num_tokens=1, num_cut=0) for _ in pairs]

    question = Question(id="a", prompt="q", choices=(" a", " b"), answer=0)
    done = run(choices([question]), tmp_path, answerer=Broken())
    assert [(trouble.item, trouble.reason) for trouble in done.troubles] == [("a", running.UNSCORED)]


# ---- several tasks ----


def test_what_a_model_cannot_be_asked_leaves_other_tasks_alone_and_a_model_that_breaks_does_not(tmp_path):
    class NoLikelihood(Reader):
        def continuations(self, pairs):
            raise CannotAnswerError("no log-probabilities")

    question = Question(id="a", prompt="q", choices=(" a", " b"), answer=0)
    setting = {"suite": suite_named("quick"), "model": MODEL, "data": tmp_path, "folder": tmp_path / "out"}
    told = []
    results = run_benchmarks(
        [choices([question]), words(4)], answerer_for=lambda task: NoLikelihood(), told=told.append, **setting
    )
    assert [task["count"] for task in results["tasks"]] == [0, 4]
    assert results["tasks"][0]["troubles"] == [{"item": "", "reason": "no log-probabilities"}]
    assert [run.task.name for run in told] == ["pick", "words"]
    assert read_results(tmp_path / "out") == json.loads(json.dumps(results))

    def breaks(text):
        raise EngineError("gone")

    with pytest.raises(EngineError, match="gone"):
        run_benchmarks([words(5)], answerer_for=lambda task: Reader(breaks=breaks), **setting)


def test_a_folder_is_written_by_one_process_at_a_time(tmp_path):
    setting = {"suite": suite_named("quick"), "model": MODEL, "data": tmp_path, "folder": tmp_path / "out"}
    with (
        hold_folder(tmp_path / "out", lock="evaluation.lock", doing="evaluating"),
        pytest.raises(TrainingError, match="another process is evaluating"),
    ):
        run_benchmarks([words(5)], answerer_for=lambda task: Reader(), **setting)
