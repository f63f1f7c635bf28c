"""Drafts are counted by domain, as the model that trains would make and judge them."""

import json
import math
from dataclasses import replace

import pytest
import torch

from dsv3 import load
from dsv3.batch import TokenBatch
from dsv3.cli.main import main
from dsv3.errors import ConfigError, DataError
from dsv3.evals import acceptance
from dsv3.evals.acceptance import PROMPT_TOKENS, Acceptance, draft_acceptance
from dsv3.train.loop import pretrain

from ..conftest import small_config

ANSWER_TOKENS = 12


@pytest.fixture(autouse=True)
def short_answers(monkeypatch):
    monkeypatch.setattr(acceptance, "ANSWER_TOKENS", ANSWER_TOKENS)


@pytest.fixture(scope="module")
def run(texts, tmp_path_factory):
    """Twelve steps, with room for a prompt and its answer."""
    folder = tmp_path_factory.mktemp("domains") / "run"
    config = small_config(texts)
    pretrain(replace(config, model=replace(config.model, max_position_embeddings=128)), folder=folder)
    return folder


@pytest.fixture(scope="module")
def model(run):
    return load(run, plain=True, device="cpu")


def call(run, *options):
    """Return the exit status of the verb."""
    with pytest.raises(SystemExit) as ended:
        main(["eval", "domains", str(run), "--device", "cpu", *options])
    return ended.value.code


def prompts(model, *, count, seed):
    generator = torch.Generator().manual_seed(seed)
    most = model.tokenizer.vocab_size
    return [
        [model.tokenizer.bos_id, *torch.randint(3, most, (40,), generator=generator).tolist()] for _ in range(count)
    ]


@torch.inference_mode()
def by_hand(model, prompt):
    """Go on with a prompt by whole passes of the model that trains, and count drafts and those that were right."""
    transformer, most = model.model, model.tokenizer.vocab_size
    said, drafted, accepted = [], 0, 0

    def likeliest(ids):
        """The next token, and the one that the module expects after `ids` with it."""
        output = transformer(TokenBatch.from_sequences([ids]))
        following = int(transformer.logits(output.hidden)[-1, :most].argmax())
        ahead = transformer(TokenBatch.from_sequences([[*ids, following]]), mtp=True).mtp[0].hidden
        return following, int(transformer.logits(ahead)[len(ids) - 1, :most].argmax())

    following, draft = likeliest(prompt)
    said.append(following)
    while len(said) < ANSWER_TOKENS and said[-1] != model.config.eos_token_id:
        is_drafted = len(said) < ANSWER_TOKENS - 1  # the last token is drawn anyway
        following, next_draft = likeliest([*prompt, *said])
        drafted += is_drafted
        said.append(following)
        if is_drafted and following == draft and following != model.config.eos_token_id:
            accepted += 1
            following, next_draft = likeliest([*prompt, *said])
            said.append(following)
        draft = next_draft
    return drafted, accepted


def test_drafts_are_those_of_whole_passes_of_the_model_that_trains(model):
    documents = {name: prompts(model, count=3, seed=seed) for seed, name in enumerate(("a", "b"))}
    for found in draft_acceptance(model, documents=documents, answers=2, temperature=0.0):
        expected = [by_hand(model, text[:PROMPT_TOKENS]) for text in documents[found.name][:2]]
        assert list(zip(found.drafted, found.accepted, strict=True)) == expected


def test_a_domain_is_counted_by_itself_whatever_stands_beside_it(model):
    a, b = prompts(model, count=3, seed=0), prompts(model, count=2, seed=1)
    together = draft_acceptance(model, documents={"x": a, "a x": b}, answers=3)
    assert together[0] == draft_acceptance(model, documents={"x": a}, answers=3)[0]
    assert [len(domain.drafted) for domain in together] == [3, 2]


def test_the_error_of_single_drafts_is_the_binomial_one():
    right = (1,) * 30 + (0,) * 70
    found = Acceptance(name="", drafted=(1,) * 100, accepted=right)
    assert found.rate == pytest.approx(0.3)
    assert found.error == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    # Drafts of one answer that all are right or all are wrong are no more than one.
    assert Acceptance(name="", drafted=(7,) * 100, accepted=tuple(7 * a for a in right)).error == pytest.approx(
        found.error
    )


def test_nothing_drafted_is_no_number():
    found = Acceptance(name="a", drafted=(0, 0), accepted=(0, 0))
    assert math.isnan(found.rate)
    assert found.as_dict()["rate"] is found.as_dict()["error"] is None


def test_what_cannot_be_drafted_is_refused(model):
    with pytest.raises(DataError, match="b has no text of 32 tokens"):
        draft_acceptance(model, documents={"a": prompts(model, count=1, seed=0), "b": [[0, 1]]}, answers=2)


def test_the_command_shows_domains_and_obeys_its_options(run, tmp_path, capsys):
    assert call(run, "--picture", str(tmp_path / "loads.png"), "--answers", "2") == 0
    table = capsys.readouterr().out
    assert "drafts right" in table
    assert [line.split()[0] for line in table.splitlines()[1:3]] == ["prose", "notes"]
    assert (tmp_path / "loads.png").exists()
    assert call(run, "--max-tokens", "600", "--window", "20", "--answers", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["window"], found["layers"], found["drafts"]) == (20, [1], [])
    assert sum(domain["tokens"] for domain in found["domains"]) <= 600


def test_text_of_one_domain_is_refused(run, texts, capsys):
    assert call(run, "--data", str(texts[0])) == 2
    assert "of another domain too" in capsys.readouterr().err


def test_a_short_context_is_refused(model, monkeypatch):
    monkeypatch.setattr(acceptance, "ANSWER_TOKENS", 97)
    with pytest.raises(ConfigError, match="129 tokens are read and said, and the context is 128"):
        draft_acceptance(model, documents={"a": prompts(model, count=1, seed=0)}, answers=1)
