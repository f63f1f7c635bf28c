"""Prompts beside those that lm-eval renders, where the report's form is the same."""

import gzip
import json
from itertools import islice

import jinja2

from dsv3.evals.tasks import TASKS
from tests.evals.tasks.conftest import published, published_settings


def records(path, *, count=None):
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        return [json.loads(line) for line, _ in zip(lines, range(count or 1 << 30), strict=False)]


def rendered(settings, doc, *, key="doc_to_text"):
    environment = jinja2.Environment(keep_trailing_newline=True, undefined=jinja2.StrictUndefined)
    return environment.from_string(settings[key]).render(**doc)


def test_mmlu_is_asked_as_published(shared_data):
    settings = published_settings("mmlu/default/_default_template_yaml")
    shots = records(shared_data / "mmlu" / "dev.jsonl.gz")
    questions = TASKS["mmlu"].questions(shared_data)
    for question, doc in zip(questions, records(shared_data / "mmlu" / "test.jsonl.gz", count=500), strict=False):
        subject = published_settings(f"mmlu/default/mmlu_{doc['subject']}.yaml") if question.id.endswith("77") else None
        if subject is not None:
            worked = [
                f"{rendered(settings, one)} {'ABCD'[one['answer']]}"
                for one in shots
                if one["subject"] == doc["subject"]
            ]
            assert question.prompt == subject["description"] + "\n\n".join([*worked, rendered(settings, doc)])
            assert question.choices == tuple(f" {letter}" for letter in settings["doc_to_choice"])


def test_bbh_has_the_same_examples_but_for_line_breaks(shared_data):
    seen = {}
    for question in TASKS["bbh"].questions(shared_data):
        seen.setdefault(question.more["task"], question)
    assert len(seen) == 27
    for name, question in seen.items():
        settings = published_settings(f"bbh/cot_fewshot/{name}.yaml")
        shots = [rendered(settings, one) + one["target"] for one in settings["fewshot_config"]["samples"]]
        theirs = settings["description"] + "\n\n".join(shots)
        assert question.prompt.split("\n\nQ:")[0].split() == theirs.split("\n\nQ:")[0].split()
        assert "".join(theirs.split()) in "".join(question.prompt.split())


def test_mbpp_is_asked_as_published(shared_data):
    settings = published_settings("mbpp/mbpp.yaml")
    docs = {doc["task_id"]: doc for doc in records(shared_data / "mbpp" / "mbpp.jsonl.gz")}
    worked = [
        rendered(settings, docs[one]) + rendered(settings, {**docs[one], "is_fewshot": True}, key="doc_to_target")
        for one in (2, 3, 4)
    ]
    for question in list(TASKS["mbpp"].questions(shared_data))[::50]:
        assert question.prompt == "\n\n".join([*worked, rendered(settings, docs[int(question.id)])])
        assert list(question.stop) == settings["generation_kwargs"]["until"]


def test_humaneval_is_asked_as_published(shared_data):
    settings = published_settings("humaneval/humaneval.yaml")
    docs = records(shared_data / "humaneval" / "HumanEval.jsonl.gz")
    for question, doc in zip(TASKS["humaneval"].questions(shared_data), docs, strict=True):
        assert question.prompt == rendered(settings, doc)
        assert list(question.stop) == settings["generation_kwargs"]["until"]


def test_cruxeval_is_asked_as_published_but_for_quotation_marks(shared_data):
    for name, file in (("cruxeval_o", "output"), ("cruxeval_i", "input")):
        settings = published_settings(f"cruxeval/cruxeval_{file}.yaml")
        shots = getattr(published("cruxeval.utils"), settings["fewshot_config"]["samples"].split(".")[1])()
        worked = [rendered(settings, one) + rendered(settings, one, key="doc_to_target") for one in shots]
        docs = records(shared_data / "cruxeval" / "cruxeval.jsonl.gz")
        for question, doc in list(zip(TASKS[name].questions(shared_data), docs, strict=True))[::80]:
            theirs = settings["description"] + "\n" + "\n\n".join([*worked, rendered(settings, doc) + "\n[ANSWER]\n"])
            assert question.prompt.replace('"', "") == theirs.replace('"', "")
            assert "[/ANSWER]" in settings["generation_kwargs"]["until"]


def test_math_has_minervas_form(shared_data):
    module = published("minerva_math.utils")
    closing = module.list_fewshot_samples()[0]["solution"].rpartition("\n")[2]
    question = next(TASKS["math"].questions(shared_data))
    *shots, _ = question.prompt.split("\n\nProblem:")
    assert len(shots) == 4
    assert all(shot.rpartition("\n")[2].split("$")[::2] == closing.split("$")[::2] for shot in shots)
    for shot in shots:
        doc = {"problem": shot.removeprefix("Problem:").split("\n\nSolution:")[0].strip("\n")}
        assert ("Problem:" + shot.removeprefix("Problem:")).startswith(module.doc_to_text(doc))


def test_choices_are_asked_as_published(shared_data):
    """The texts of PIQA, OpenBookQA and Social IQa; HellaSwag's and WinoGrande's last line."""
    for name, folder, key in (
        ("piqa", "piqa/piqa.yaml", "goal"),
        ("openbookqa", "openbookqa/openbookqa.yaml", "question_stem"),
    ):
        settings = published_settings(folder)
        form = settings["doc_to_text"] if "{" in settings["doc_to_text"] else "{{" + settings["doc_to_text"] + "}}"
        questions = islice(TASKS[name].questions(shared_data), 200)
        file = shared_data / "commonsense-mc" / ("piqa-val.jsonl.gz" if name == "piqa" else "openbookqa-test.jsonl.gz")
        for question, doc in zip(questions, records(file, count=200), strict=False):
            assert question.prompt == rendered({"doc_to_text": form}, {key: doc["question"]})
            assert question.choices == tuple(f" {choice}" for choice in doc["choices"])


def test_winogrande_scores_the_same_words_after_either_name(shared_data):
    module = published("winogrande.preprocess_winogrande")
    docs = records(shared_data / "commonsense-mc" / "winogrande-val.jsonl.gz")[5:]
    for question, doc in zip(TASKS["winogrande"].questions(shared_data), docs, strict=True):
        theirs = {"sentence": doc["question"], "option1": doc["choices"][0], "option2": doc["choices"][1]}
        assert [one.removeprefix(question.prompt) for one in question.contexts] == module.doc_to_choice(theirs)
        assert {one.strip() for one in question.choices} == {module.doc_to_target(theirs)}
        assert len(set(question.choices)) == 1


def test_worked_examples_are_not_asked(shared_data):
    for name in ("hellaswag", "winogrande", "nq_open", "math", "mmlu_pro", "cmrc"):
        questions = list(islice(TASKS[name].questions(shared_data), 50))
        shots = questions[0].prompt
        for question in questions:
            asked = (
                question.prompt.rpartition("\n\n")[2]
                if name != "math"
                else question.prompt.rpartition("\n\nProblem:")[2]
            )
            assert name == "winogrande" or asked not in shots or question is questions[0]
