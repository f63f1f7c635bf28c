"""Beside lm-eval's own model `hf`, which runs transformers on the folder that ours reads."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from dsv3.errors import ConfigError

pytest.importorskip("lm_eval")
pytest.importorskip("transformers")

from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.tasks import TaskManager

from dsv3.evals.lm_eval_adapter import Dsv3LM, generation_settings

HEADER = "In the beginning there was a word. "
PAIRS = [
    (HEADER + "The word was", " with us"),
    (HEADER + "The word was", " a word, and"),
    (HEADER + "The word was ", "with us and so was the world"),
    (HEADER, "?"),
    (HEADER, "A"),
    (HEADER, "B"),
    ("", "the word"),
    ("  ", "the word"),
    ("", "<｜begin▁of▁sentence｜>the word"),
    ("<｜begin▁of▁sentence｜>There", " was"),
    ("你好", "，世界！"),
    (HEADER * 5, " beginning"),
    ("a\n\n", "\nword"),
]


@pytest.fixture(scope="module")
def ours(scored_folder):
    return Dsv3LM(str(scored_folder), device="cpu")


@pytest.fixture(scope="module")
def theirs(scored_folder):
    """Returns their model; its texts begin with the begin token, or do not."""

    def build(**options):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return get_model("hf")(
                pretrained=str(scored_folder), device="cpu", dtype="float32", batch_size=3, **options
            )

    return build


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=one, idx=place) for place, one in enumerate(arguments)]


@pytest.mark.filterwarnings("ignore")
def test_continuations_are_scored_as_by_transformers(ours, theirs):
    asked = requests("loglikelihood", PAIRS)
    found, expected = ours.loglikelihood(asked), theirs().loglikelihood(asked)
    assert [logprob for logprob, _ in found] == pytest.approx([logprob for logprob, _ in expected], abs=1e-3)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


@pytest.mark.filterwarnings("ignore")
def test_greedy_continuations_are_those_of_transformers(ours, theirs):
    model, pairs = ours.model, []
    for end in range(5, 70):
        context = (HEADER * 2)[:end].rstrip()
        ids = model.prompt_ids(context)
        token = int(model.logits(ids)[-1].argmax())
        text = model.tokenizer.decode([token])
        if model.prompt_ids(context + text) == [*ids, token]:
            pairs += [(context, text), (context, text + "e")]
    asked = requests("loglikelihood", pairs)
    found = [greedy for _, greedy in ours.loglikelihood(asked)]
    assert found == [greedy for _, greedy in theirs().loglikelihood(asked)]
    assert set(found) == {True, False}


@pytest.mark.filterwarnings("ignore")
def test_texts_are_scored_as_by_transformers_without_the_begin_token(ours, theirs):
    asked = requests("loglikelihood_rolling", [("",), (HEADER,), (HEADER * 9,), ("你好",)])
    expected = theirs(add_bos_token=False).loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


@pytest.mark.filterwarnings("ignore")
def test_answers_are_those_of_transformers(ours, theirs):
    settings = {"until": ["\n\n", "zzz"], "max_gen_toks": 8, "do_sample": False}
    asked = requests("generate_until", [(prompt, settings) for prompt in (HEADER, "The word was", HEADER * 5)])
    special = ours.model.tokenizer.added_tokens.values()
    answers = ours.generate_until(asked)
    for text in special:  # transformers leaves them out
        answers = [answer.replace(text, "") for answer in answers]
    assert answers == theirs().generate_until(asked)


def test_conversations_have_the_format_of_the_tokenizer(ours):
    text = ours.apply_chat_template([{"role": "user", "content": "hello"}])
    assert text == "<｜begin▁of▁sentence｜><｜User｜>hello<｜Assistant｜>"
    assert "Assistant" in ours.chat_template(True)
    assert ours.chat_template(False) is None
    assert "/" not in ours.tokenizer_name
    with pytest.raises(ConfigError, match="one template"):
        ours.chat_template("tools")


def test_settings_of_a_task_are_obeyed_or_refused():
    assert generation_settings({"until": "\n", "do_sample": False, "temperature": 0.0}) == (["\n"], 256)
    assert generation_settings({"until": ["a", ""], "max_new_tokens": 7}) == (["a"], 7)
    with pytest.raises(ConfigError, match="greedy"):
        generation_settings({"do_sample": True, "temperature": 0.7})
    with pytest.raises(ConfigError, match="num_beams"):
        generation_settings({"num_beams": 4})


TASK = """
task: words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""


@pytest.fixture
def words(tmp_path):
    """A folder with one task of the harness."""
    items = [{"question": HEADER, "choices": ["one", "two"], "answer": place % 2} for place in range(6)]
    data = tmp_path / "words.jsonl"
    data.write_text("\n".join(map(json.dumps, items)))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "words.yaml").write_text(TASK.format(data=data))
    return tmp_path / "tasks"


@pytest.mark.filterwarnings("ignore")
def test_the_harness_knows_our_model_by_name(scored_folder, words, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    results = simple_evaluate(
        model="dsv3",
        model_args=f"pretrained={scored_folder},max_length=64",
        tasks=["words"],
        device="cpu",
        task_manager=TaskManager(include_path=str(words), include_defaults=False),
    )
    assert results["results"]["words"]["acc,none"] == 0.5


@pytest.mark.slow
def test_the_harness_own_command_line_runs_our_model(scored_folder, words, tmp_path):
    command = [
        *(sys.executable, "-m", "dsv3.evals.lm_eval_adapter", "--model", "dsv3"),
        *("--model_args", f"pretrained={scored_folder}", "--tasks", "words", "--device", "cpu"),
        *("--include_path", str(words), "--output_path", str(tmp_path / "out")),
    ]
    offline = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    run = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | offline)
    assert run.returncode == 0, run.stderr[-2000:]
    [file] = (tmp_path / "out").rglob("results*.json")
    assert json.loads(file.read_text())["results"]["words"]["acc,none"] == 0.5
