"""Distillation: what is kept is right, short, new and of no evaluation, and a set that was stopped is the same set."""

import json
import threading
from contextlib import contextmanager
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3 import __version__
from dsv3.config.files import read_config
from dsv3.config.teaching import REFLECTION, DistillConfig, SftConfig
from dsv3.data.chat_data import read_conversations
from dsv3.data.chat_template import render_template
from dsv3.data.contamination import Exclusions, normalised, rows_of
from dsv3.errors import CheckpointError, ConfigError, DataError, EngineError, TrainingError
from dsv3.evals import endpoint as asking
from dsv3.infer.model_folder import find_model
from dsv3.posttrain import endpoint, teacher
from dsv3.posttrain.distill import distill
from dsv3.posttrain.distilled_set import with_system
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import Reward
from dsv3.posttrain.rollout import answer_seed
from dsv3.posttrain.selection import CONTAMINATED, COPY, CUT_OFF, EMPTY, SURPLUS, TOO_SHORT, WORTH_LESS, select
from dsv3.posttrain.sft import sft, sft_settings
from dsv3.posttrain.tasks import Task
from dsv3.posttrain.teacher import Candidate, weights_hash
from dsv3.runtime.hold import hold_folder

PROBLEMS = tuple(
    Problem(messages=({"role": "user", "content": f"{a} and {b}"},), answer=str(a + b), name=f"{a}+{b}")
    for a in range(4)
    for b in range(3)
)
SUMS = Task(name="sums", training=PROBLEMS, held_out=())
ANY = Reward(name="any", score=lambda problem, text: 1.0)
EVEN = Reward(name="even", score=lambda problem, text: float(sum(map(ord, text)) % 2 == 0))


def lines_of(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def of_teacher(path):
    return [line for line in lines_of(path) if line["provenance"]["kind"] == "teacher"]


# ---- which answers are kept ----

CONFIG = DistillConfig(teacher="any", candidates=4, keep=2, min_answer_tokens=2, min_reward=1.0)


def candidate(number, *, text="so 3", tokens=4, finished=True, reward=1.0):
    return Candidate(number=number, seed=number, text=text, num_tokens=tokens, finished=finished, reward=reward)


def chosen(candidates, *, config=CONFIG, contaminated=(), known=()):
    return select(
        candidates,
        config=config,
        is_contaminated=lambda text: text in contaminated,
        is_known=lambda text: text in known,
    )


def test_every_reason_to_reject_an_answer_is_told():
    selection = chosen(
        [
            candidate(0, finished=False),
            candidate(1, text=" \n"),
            candidate(2, tokens=1),
            candidate(3, text="seen"),
            candidate(4, reward=0.5, text="worse"),
            candidate(5, text="known"),
            candidate(6, text="a"),
            candidate(7, text="a "),
            candidate(8, text="b", tokens=3),
            candidate(9, text="c", tokens=9),
            candidate(10, text="nan", reward=float("nan")),
        ],
        contaminated={"seen"},
        known={"known"},
    )
    assert [one.number for one in selection.kept] == [8, 6]  # the shortest first
    assert selection.rejected == {
        0: CUT_OFF,
        1: EMPTY,
        2: TOO_SHORT,
        3: CONTAMINATED,
        4: WORTH_LESS,
        5: COPY,
        7: COPY,
        9: SURPLUS,
        10: WORTH_LESS,
    }


def test_what_is_worth_more_goes_before_what_is_shorter():
    selection = chosen([candidate(0, text="a", tokens=2), candidate(1, text="b", tokens=50, reward=1.5)])
    assert [one.number for one in selection.kept] == [1, 0]


ANSWERS = st.builds(
    lambda text, tokens, finished, reward: {"text": text, "tokens": tokens, "finished": finished, "reward": reward},
    st.sampled_from(["a", "a ", "b", "c", " ", "seen"]),
    st.integers(0, 6),
    st.booleans(),
    st.sampled_from([0.0, 1.0, 1.2]),
)


@given(answers=st.lists(ANSWERS, max_size=12), keep=st.integers(1, 4))
def test_kept_answers_are_distinct_good_and_the_best_there_are(answers, keep):
    candidates = [candidate(number, **one) for number, one in enumerate(answers)]
    config = replace(CONFIG, keep=keep)
    selection = chosen(candidates, config=config, contaminated={"seen"})
    kept = selection.kept
    texts = [one.text.strip() for one in kept]
    assert len(kept) <= keep
    assert len(set(texts)) == len(texts)
    assert all(one.finished and one.reward >= 1 and one.num_tokens >= 2 and one.text.strip() for one in kept)
    assert {one.number for one in kept} | selection.rejected.keys() == set(range(len(candidates)))
    assert not {one.number for one in kept} & selection.rejected.keys()
    if kept and len(kept) == keep:
        worst = max((-one.reward, one.num_tokens) for one in kept)
        surplus = [candidates[number] for number, reason in selection.rejected.items() if reason == SURPLUS]
        assert all((-one.reward, one.num_tokens) >= worst for one in surplus)
    else:
        assert SURPLUS not in selection.rejected.values()


# ---- evaluations that are kept out ----

LONG = " ".join(f"word{number}" for number in range(20))


def test_a_question_is_met_whole_or_by_thirteen_words_in_a_row(tmp_path):
    text, lines = tmp_path / "eval.txt", tmp_path / "eval.jsonl"
    text.write_text("What is 3 + 4?\nAnother\u2028line.\n" + LONG.replace(" word10", "\nword10"))
    lines.write_text(
        json.dumps({"item": [{"question": "Who  WROTE\u2028it"}], "answer": 7}, ensure_ascii=False) + "\n\n"
    )
    exclusions = Exclusions([str(text), str(lines)])
    assert exclusions.with_question(["what is 3 + 4"]) == {str(text): "whole"}
    assert exclusions.with_question(["what is 3 - 4?"]) == {}
    assert exclusions.with_question(["Be kind.", "who wrote it?"]) == {str(lines): "whole"}
    words = LONG.split()
    assert exclusions.with_question(["so: " + ", ".join(words[3:16]).upper() + "!"]) == {str(text): "in a row"}
    assert exclusions.with_question([" ".join(words[3:15])]) == {}
    assert exclusions.with_answer(" ".join(words[7:])) == [str(text)]
    assert exclusions.with_answer("What is 3 + 4?") == []
    assert Exclusions([]).with_question(["anything"]) == {}


@given(words=st.lists(st.sampled_from(["one", "2", "Ünit", "天"]), max_size=30), cut=st.integers(0, 20))
def test_words_in_a_row_are_those_of_a_window_that_moves(words, cut):
    text = " ".join(words)
    assert len(rows_of(text)) <= max(0, len(words) - 12)
    assert bool(rows_of(text)) == (len(words) > 12)
    assert rows_of(" ".join(words[cut:])) <= rows_of(text)
    assert rows_of(text.upper()) == rows_of(f" {text}!")
    assert normalised(f"  {text}?? ") == normalised(text.upper())


def test_scripts_without_spaces_are_read_by_the_character():
    assert rows_of("小明有三个苹果他又买了两个") == rows_of("小明 有三个苹果，他又买了 两个。")
    assert len(rows_of("小明有三个苹果他又买了两个")) == 1


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"\xff\xfe", "cannot read .*UTF-8"), (b"{", "line 1 is no JSON"), (b"\n", "no text that could be left out")],
)
def test_an_evaluation_that_cannot_be_read_is_refused(tmp_path, content, told):
    file = tmp_path / "eval.jsonl"
    file.write_bytes(content)
    with pytest.raises(DataError, match=told):
        Exclusions([str(file)])


# ---- a teacher of ours ----


def settings_for(taught, **changes):
    options = {"candidates": 8, "max_answer_tokens": 5, "ask_with_system": False, "keep": 2, "seed": 3}
    return DistillConfig(teacher=str(taught), **(options | changes))


def test_a_set_says_where_every_line_is_from_and_its_card_what_became_of_the_rest(taught, tmp_path):
    output = tmp_path / "set.jsonl"
    config = settings_for(taught)
    told = []
    result = distill(config, output=output, task=SUMS, rewards=[EVEN], on_record=told.append)
    assert result.finished
    assert told[-1] == told[-1] | {"answered": 12, "now": 12, "total": 12}
    lines = lines_of(output)
    places = [line["provenance"]["problem"] for line in lines]
    assert places == sorted(places)
    assert [line["messages"][1]["content"] for line in lines if line["provenance"]["kind"] == "original"] == [
        problem.answer for problem in PROBLEMS
    ]
    own = of_teacher(output)
    assert own
    for line in own:
        about, [system, question, answer] = line["provenance"], line["messages"]
        problem = PROBLEMS[about["problem"]]
        assert (system["content"], question["content"]) == (REFLECTION, problem.messages[0]["content"])
        assert about["scores"] == {"even": EVEN.score(problem, answer["content"])} == {"even": 1.0}
        assert about["seed"] == answer_seed(3, place=about["problem"], number=about["candidate"])
        assert 1 <= about["tokens"] <= 5
        wanted = {"teacher": str(taught), "task": "sums", "name": problem.name, "temperature": 1.0, "reward": 1.0}
        assert about == about | wanted | {"weights": weights_hash(find_model(taught)), "dsv3": __version__}
    card = json.loads(output.with_suffix(".json").read_text())
    assert card == result.card
    answers = card["answers"]
    assert answers["drawn"] == 12 * 8 == answers["kept"] + sum(answers["rejected"].values())
    assert card["lines"] == {"original": 12, "teacher": len(own)}
    assert answers["kept"] == len(own)
    assert answers["mean tokens kept"] == pytest.approx(sum(one["provenance"]["tokens"] for one in own) / len(own))
    assert card["problems"] == {
        "given": 12,
        "contaminated": 0,
        "asked": 12,
        "with an answer kept": len({one["provenance"]["problem"] for one in own}),
    }
    conversations = {json.dumps(line["messages"]) for line in lines}
    assert len(conversations) == len(lines)


def test_a_set_that_was_stopped_anywhere_becomes_the_same_set(taught, tmp_path):
    """Whatever byte the process was killed at, and with no problem answered twice."""
    config, options = settings_for(taught, candidates=3), {"task": SUMS, "rewards": [EVEN]}
    whole = tmp_path / "whole.jsonl"
    distill(config, output=whole, **options)
    said = whole.with_suffix(".candidates.jsonl").read_bytes()

    @settings(max_examples=6)
    @given(place=st.integers(0, len(said)))
    def check(place):
        cut = tmp_path / f"cut-{place}.jsonl"
        cut.with_suffix(".candidates.jsonl").write_bytes(said[:place])
        there = max(0, said[:place].count(b"\n") - 1)
        records = []
        distill(config, output=cut, on_record=records.append, **options)
        assert len(records) == 12 - there
        assert cut.read_bytes() == whole.read_bytes()
        assert cut.with_suffix(".candidates.jsonl").read_bytes() == said

    check()


def test_a_set_in_the_making_has_no_file_yet(taught, tmp_path, monkeypatch):
    monkeypatch.setattr(teacher, "ANSWERS_AT_ONCE", 8)
    config = settings_for(taught, candidates=2)  # four problems at once
    output = tmp_path / "set.jsonl"
    first = distill(config, output=output, task=SUMS, rewards=[ANY], stop_after_problems=3)
    assert (first.answered, first.total, first.finished, first.card) == (4, 12, False, None)
    assert not output.exists()
    assert not output.with_suffix(".json").exists()
    assert distill(config, output=output, task=SUMS, rewards=[ANY]).finished
    made = output.read_bytes()
    again = []
    assert distill(config, output=output, task=SUMS, rewards=[ANY], on_record=again.append).finished
    assert not again
    assert output.read_bytes() == made


def test_another_config_for_the_same_output_is_refused_with_what_differs(taught, tmp_path):
    output = tmp_path / "set.jsonl"
    config = settings_for(taught)
    distill(config, output=output, task=SUMS, rewards=[ANY], stop_after_problems=1)
    with pytest.raises(ConfigError, match=r"temperature was 1.0 and is now 0.5.*--output"):
        distill(replace(config, temperature=0.5), output=output, task=SUMS, rewards=[ANY])
    with pytest.raises(ConfigError, match=r"data was .*; rewards was \['any=1'\] and is now \['even=1'\]"):
        distill(config, output=output, task=replace(SUMS, training=PROBLEMS[:5]), rewards=[EVEN])
    assert distill(replace(config, concurrency=2, retries=0), output=output, task=SUMS, rewards=[ANY]).finished


def test_a_set_has_one_writer_and_its_candidates_are_read_with_care(taught, tmp_path):
    output = tmp_path / "set.jsonl"
    with hold_folder(tmp_path, lock=".set.jsonl.lock", doing="x"), pytest.raises(TrainingError, match="--output"):
        distill(settings_for(taught), output=output, task=SUMS, rewards=[ANY])
    output.with_suffix(".candidates.jsonl").write_text("[1]\n")
    with pytest.raises(DataError, match="line 1 is no answer of a teacher"):
        distill(settings_for(taught), output=output, task=SUMS, rewards=[ANY])
    with pytest.raises(ConfigError, match=r"name it .*set.jsonl"):
        distill(settings_for(taught), output=output.with_suffix(".json"), task=SUMS, rewards=[ANY])


def test_problems_of_an_evaluation_are_not_asked_and_counted_by_file(taught, tmp_path):
    text, lines = tmp_path / "eval.txt", tmp_path / "eval.jsonl"
    text.write_text("0 and 0\n1 AND 2?\n")
    lines.write_text(json.dumps({"q": "1 and 2"}) + "\n")
    exclude = (str(text), str(lines))
    output = tmp_path / "set.jsonl"
    result = distill(settings_for(taught, exclude=exclude), output=output, task=SUMS, rewards=[ANY])
    assert result.total == 10
    assert result.card["problems"]["contaminated"] == 2
    assert result.card["contaminated"] == {
        str(text): {"whole": 2, "in a row": 0, "answers": 0},
        str(lines): {"whole": 1, "in a row": 0, "answers": 0},
    }
    names = {line["provenance"]["name"] for line in lines_of(output)}
    assert not names & {"0+0", "1+2"}
    text.write_text("".join(f"{one.messages[0]['content']}\n" for one in PROBLEMS))
    with pytest.raises(DataError, match="of 12 problems 12 are in an evaluation"):
        distill(settings_for(taught, exclude=exclude), output=tmp_path / "none.jsonl", task=SUMS, rewards=[ANY])


def test_nothing_right_is_no_set(taught, tmp_path):
    never = Reward(name="never", score=lambda problem, text: 0.0)
    output = tmp_path / "set.jsonl"
    with pytest.raises(DataError, match="worth too little"):
        distill(settings_for(taught, originals=False), output=output, task=SUMS, rewards=[never])
    assert not output.exists()
    assert not list(tmp_path.glob("*.partial"))


def test_originals_are_the_response_that_came_with_a_problem(taught, tmp_path):
    problem = replace(PROBLEMS[5], more={"response": "Let me see: 3."})
    task = Task(name="one", training=(problem, replace(problem, name="again")), held_out=())
    output = tmp_path / "set.jsonl"
    config = settings_for(taught, write_system=False, system_prompt="")
    result = distill(config, output=output, task=task, rewards=[ANY])
    assert lines_of(output)[0]["messages"][-1] == {"role": "assistant", "content": "Let me see: 3."}
    assert [message["role"] for message in of_teacher(output)[0]["messages"]] == ["user", "assistant"]
    assert result.card["originals"] == {"copy": 1, "kept": 1}


def test_a_system_prompt_comes_before_one_that_is_there():
    own = ({"role": "system", "content": "B"}, {"role": "user", "content": "?"})
    assert with_system(own, prompt="A")[0] == {"role": "system", "content": "A\n\nB"}
    assert with_system(own[1:], prompt="A") == ({"role": "system", "content": "A"}, own[1])
    assert with_system(own, prompt="") == own


def test_sft_reads_a_set_and_passes_over_where_it_is_from(taught, base, tmp_path):
    output = tmp_path / "set.jsonl"
    distill(settings_for(taught, system_prompt="Think."), output=output, task=SUMS, rewards=[ANY])
    read = [one.messages for one in read_conversations([str(output)])]
    assert read == [line["messages"] for line in lines_of(output)]
    lesson = SftConfig(data=(str(output),), epochs=1)
    config = sft_settings(read_config(base / "config.json"), lesson=lesson, start_from=base)
    result = sft(config, lesson=lesson, folder=tmp_path / "run")
    assert result.finished
    assert sum(map(len, result.rows.rows)) == len(read)


def test_what_a_template_begins_with_is_part_of_the_answer(taught, tmp_path, monkeypatch):
    """R1's template opens the thought itself; a sample without the tag could not be told from an answer."""

    def opened(tokenizer, **options):
        return render_template(tokenizer.chat_template, **options) + "<think>\n"

    monkeypatch.setattr(teacher, "render_chat", opened)
    output = tmp_path / "set.jsonl"
    distill(settings_for(taught), output=output, task=SUMS, rewards=[ANY])
    assert all(line["messages"][-1]["content"].startswith("<think>") for line in of_teacher(output))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"teacher": ""}, "give the folder of a model"),
        ({"teacher": "http://host/v1"}, "say which with teacher_model"),
        ({"teacher": "runs/a", "teacher_model": "r1"}, "the teacher is the folder runs/a"),
        ({"teacher": "runs/a", "min_answer_tokens": 9, "max_answer_tokens": 8}, "lower min_answer_tokens"),
        ({"teacher": "runs/a", "temperature": 0.0}, "temperature = 0.0"),
    ],
)
def test_settings_that_cannot_be_obeyed_are_refused(changes, told):
    with pytest.raises(ConfigError, match=told):
        DistillConfig(**changes)


def test_a_teacher_that_is_not_there_is_told(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        distill(DistillConfig(teacher=str(tmp_path / "none")), output=tmp_path / "set.jsonl", task=SUMS)


# ---- a teacher behind an address ----


def reply(text, *, tokens=3, reason="stop", **more):
    choice = {"index": 0, "message": {"role": "assistant", "content": text, **more}, "finish_reason": reason}
    return 200, json.dumps({"choices": [choice], "usage": {"completion_tokens": tokens}})


@contextmanager
def serving(answer):
    """Serve `answer(body, number of the request) -> status, text, headers` at the address that is yielded."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            asked.append((self.path, body, self.headers.get("authorization")))
            status, text, *headers = answer(body, len(asked))
            try:
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("content-length", str(len(text.encode())))
                self.end_headers()
                self.wfile.write(text.encode())
            except OSError:
                pass  # The client did not wait.

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(autouse=True)
def direct_and_impatient(monkeypatch):
    """No proxy of the environment, and short pauses."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(asking, "FIRST_PAUSE_SECONDS", 0.001)
    monkeypatch.setattr(endpoint, "LOOK_SECONDS", 0.01)


def sum_of(body):
    a, _, b = body["messages"][-1]["content"].split()
    return str(int(a) + int(b))


def ask(url, *, output, **changes):
    options = {"teacher_model": "r1", "candidates": 2, "concurrency": 3, "retries": 2, "timeout_seconds": 5.0}
    return distill(DistillConfig(teacher=url, **(options | changes)), output=output, task=SUMS)


def test_an_endpoint_is_asked_with_system_prompt_key_and_seed(tmp_path, monkeypatch):
    monkeypatch.setenv("TEACHER_KEY", "secret")

    def answer(body, number):
        return reply(sum_of(body), reasoning_content="I add.")

    output = tmp_path / "set.jsonl"
    with serving(answer) as (url, asked):
        result = ask(url, output=output, key_variable="TEACHER_KEY", temperature=0.8, max_answer_tokens=9)
    assert len(asked) == 24
    path, body, key = asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    assert body["messages"][0] == {"role": "system", "content": REFLECTION}
    assert body | {"model": "r1", "temperature": 0.8, "max_tokens": 9} == body
    assert len({body["seed"] for _, body, _ in asked}) == 24
    assert all(0 <= body["seed"] < 2**31 for _, body, _ in asked)
    lines = of_teacher(output)
    assert [line["provenance"]["problem"] for line in lines] == list(range(12))
    assert lines[5]["messages"][-1]["content"] == "<think>I add.</think>3"
    assert lines[0]["provenance"]["model"] == "r1"
    assert result.card["answers"]["rejected"]["copy"] == 12
    assert "secret" not in output.with_suffix(".json").read_text() + output.read_text()


def test_an_endpoint_that_is_busy_or_speaks_nonsense_is_asked_again(tmp_path):
    trouble = {
        1: (429, "slow down", ("retry-after", "0")),
        2: (503, "starting"),
        3: (200, "<html>"),
        4: (200, '{"choices": []}'),
        5: (
            200,
            '{"choices": [{"message": {"content": 5}, "finish_reason": "stop"}], "usage": {"completion_tokens": 1}}',
        ),
        6: (200, '{"choices": [{"message": {"content": "5"}, "finish_reason": "stop"}]}'),
    }
    with serving(lambda body, number: trouble.get(number) or reply(sum_of(body))) as (url, asked):
        result = ask(url, output=tmp_path / "set.jsonl", retries=6)
    assert len(asked) == 24 + len(trouble)
    assert result.card["answers"]["kept"] == 12


@pytest.mark.parametrize(
    ("trouble", "error", "told"),
    [
        ((500, "out of memory"), EngineError, "failed 3 times on the problem '1.1', at last with 500: out of memory"),
        ((200, "hello"), EngineError, "no answer of that kind .*: hello"),
        ((401, "who are you"), ConfigError, "with 401: who are you; check teacher"),
        ((404, "no model r1"), ConfigError, "with 404: no model r1"),
    ],
)
def test_an_endpoint_that_fails_for_good_is_told_and_the_rest_is_kept(tmp_path, trouble, error, told):
    def answer(body, number):
        return trouble if body["messages"][-1]["content"] == "1 and 1" else reply(sum_of(body))

    output = tmp_path / "set.jsonl"
    with serving(answer) as (url, _):
        with pytest.raises(error, match=told):
            ask(url, output=output)
        kept = lines_of(output.with_suffix(".candidates.jsonl"))[1:]
    assert len(kept) >= 3  # 0 and 0 to 1 and 0
    assert not output.exists()


def test_a_set_from_an_endpoint_goes_on_without_asking_again(tmp_path):
    output, state = tmp_path / "set.jsonl", {"broken": True}

    def answer(body, number):
        asked_for = body["messages"][-1]["content"]
        return (500, "gone") if state["broken"] and asked_for == "2 and 0" else reply(sum_of(body))

    with serving(answer) as (url, asked):
        with pytest.raises(EngineError, match="the same command goes on"):
            ask(url, output=output, retries=0)
        there = {one["problem"] for one in lines_of(output.with_suffix(".candidates.jsonl"))[1:]}
        asked.clear()
        state["broken"] = False
        assert ask(url, output=output).finished
        again = {body["messages"][-1]["content"] for _, body, _ in asked}
    assert there
    assert not again & {PROBLEMS[place].messages[0]["content"] for place in there}
    assert len(asked) == 2 * (12 - len(there))


def test_an_endpoint_that_does_not_answer_in_time_or_at_all_is_given_up(tmp_path):
    waiting = threading.Event()

    def never(body, number):
        waiting.wait(10)
        return reply("late")

    try:
        with serving(never) as (url, _):
            with pytest.raises(EngineError, match=r"failed 2 times .* no answer within 0.05 s"):
                ask(url, output=tmp_path / "set.jsonl", retries=1, timeout_seconds=0.05)
            waiting.set()
    finally:
        waiting.set()
    with pytest.raises(EngineError, match="ConnectError"):
        ask(url, output=tmp_path / "other.jsonl", retries=1)


def test_what_an_endpoint_cuts_off_is_rejected(tmp_path):
    with serving(lambda body, number: reply(sum_of(body), reason="length" if number % 2 else "stop")) as (url, _):
        result = ask(url, output=tmp_path / "set.jsonl", concurrency=1)
    assert result.card["answers"]["rejected"]["cut off"] == 12
    assert result.card["answers"]["kept"] == 12


def test_a_key_that_is_not_there_is_told(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    with pytest.raises(ConfigError, match="NO_SUCH_KEY is to hold the key, and is not set"):
        ask("http://127.0.0.1:9/v1", output=tmp_path / "set.jsonl", key_variable="NO_SUCH_KEY")


def test_an_address_that_is_none_is_told(tmp_path):
    with pytest.raises(ConfigError, match="is no address"):
        ask("http://host:port/v1", output=tmp_path / "set.jsonl")
