"""Facts are hidden where they should be, and only the very words count."""

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv3 import load
from dsv3.errors import ConfigError
from dsv3.evals import needle as needle_file
from dsv3.evals.needle import KINDS, Cell, find_needles, grid_of
from dsv3.report.needle import draw_needles
from dsv3.train.loop import pretrain

MADE = {}


@pytest.fixture
def model(small_run, tmp_path_factory):
    """One step old, with 1,200 positions; made once."""
    if not MADE:
        folder = tmp_path_factory.mktemp("run")
        config = replace(small_run, model=replace(small_run.model, max_position_embeddings=1200))
        pretrain(config, folder=folder, stop_after_steps=1)
        MADE["model"] = load(folder, device="cpu")
    return MADE["model"]


def haystack_of(model):
    return model.tokenizer.encode("The sea was calm and the boats lay still. " * 100)


@given(st.sampled_from(sorted(KINDS)), st.integers(0, 10_000))
def test_a_needle_is_a_sentence_that_the_question_begins(kind, seed):
    needle = KINDS[kind](Random(seed))
    assert needle.facts[0] == f"{needle.question} {needle.answer}."
    others = needle.facts[1:]
    assert len(others) == (3 if kind == "keys" else 0)
    assert not any(fact.startswith(needle.question) or needle.answer in fact for fact in others)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_prompt_and_answer_have_the_length_and_the_fact_lies_at_its_depth(model, kind, depth):
    tokenizer, haystack = model.tokenizer, haystack_of(model)
    asked = needle_file._ask(tokenizer, haystack=haystack, kind=kind, length=400, depth=depth, seed=0)
    assert len(asked.prompt) + asked.answer_tokens == 400
    assert asked.prompt[0] == tokenizer.bos_id
    text = tokenizer.decode(asked.prompt[1:])
    assert text.endswith(f"\n{asked.needle.question}")
    assert all(text.count(fact) == 1 for fact in asked.needle.facts)
    before = len(tokenizer.encode(text[: text.index(asked.needle.facts[0])]))
    facts = sum(len(tokenizer.encode(f"\n{fact}\n")) for fact in asked.needle.facts)
    room = 400 - 1 - facts - len(tokenizer.encode(f"\n{asked.needle.question}")) - asked.answer_tokens
    # Other facts may lie before it.
    assert depth * room - 2 <= before <= depth * room + facts


def test_whoever_reads_finds_all_and_whoever_guesses_none(model, monkeypatch):
    def read(_, *, asked, longest, progress):
        del longest, progress
        return [model.tokenizer.encode(f" {one.needle.answer}. And") for one in asked]

    monkeypatch.setattr(needle_file, "_answers", read)
    found = find_needles(model, haystack=haystack_of(model), longest=1200, size=3)
    assert found.score == 1
    assert found.by_length() == {400: 1.0, 800: 1.0, 1200: 1.0}
    assert len(found.cells) == 9
    for wrong in ("{}1.", "1{}.", "", "{0} {0}."):
        monkeypatch.setattr(
            needle_file,
            "_answers",
            lambda _, *, asked, wrong=wrong, **__: [
                model.tokenizer.encode(" " + wrong.format(one.needle.answer)) for one in asked
            ],
        )
        assert find_needles(model, haystack=haystack_of(model), longest=1200, size=2).score == 0


def test_a_model_is_asked_and_the_grid_is_drawn(model, tmp_path):
    told = []
    asked = find_needles(
        model,
        haystack=haystack_of(model),
        longest=512,
        size=2,
        kinds=("number",),
        progress=lambda done, total: told.append((done, total)),
    )
    assert asked.score == 0  # after one step
    assert told == [(done, 4) for done in range(1, 5)]
    result = needle_file.NeedleResult(
        lengths=(100, 200),
        depths=(0.0, 1.0),
        cells=tuple(
            Cell(length=length, depth=depth, found={"number": depth > 0, "keys": True})
            for length in (100, 200)
            for depth in (0.0, 1.0)
        ),
        haystack_tokens=50,
    )
    assert result.score == 0.75
    assert result.as_dict()["cells"][0] == {"length": 100, "depth": 0.0, "found": {"number": False, "keys": True}}
    draw_needles(result, file=tmp_path / "grid.png", title="a model")
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="the picture cannot be written"):
        draw_needles(result, file=tmp_path / "absent" / "grid.png", title="a model")


def test_what_cannot_be_asked_is_refused(model):
    haystack = haystack_of(model)
    with pytest.raises(ConfigError, match=r"the shortest of 15 lengths .* as in --grid 4"):
        grid_of(400)
    with pytest.raises(ConfigError, match=r"needles of kind keys need \d+ tokens .* a prompt has 100"):
        find_needles(model, haystack=haystack, longest=100, kinds=("keys",), size=1)
    with pytest.raises(ConfigError, match="needles of kind gold; choose of number, phrase, keys"):
        find_needles(model, haystack=haystack, longest=100, kinds=("gold",), size=1)
    with pytest.raises(ConfigError, match="positions"):
        find_needles(model, haystack=haystack, longest=10**9, size=1)
    with pytest.raises(ConfigError, match="the haystack has 3 tokens"):
        find_needles(model, haystack=haystack[:3], longest=100, size=1)
