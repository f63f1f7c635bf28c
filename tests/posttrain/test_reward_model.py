"""Reward models: the loss is the formula's, a stopped run goes on, and what is preferred comes to be worth more."""

import json
from dataclasses import replace

import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.checkpoint.published import load_published
from dsv3.config.files import read_config
from dsv3.config.teaching import GrpoConfig, RewardConfig
from dsv3.data.chat_data import TaughtTokens
from dsv3.data.chat_template import render_chat
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError
from dsv3.model.transformer import Transformer
from dsv3.posttrain.grpo import grpo, grpo_settings
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.reward_model import PairLoss, load_reward_model, pairs_of, reward_settings, teach_reward
from dsv3.posttrain.rewards import rewards_named
from dsv3.posttrain.sft import batch_of
from dsv3.posttrain.tasks import Task
from dsv3.train.loss import WholeBatch

from ..infer.conftest import TINY

PAD = 2
MODEL = replace(TINY, vocab_size=50, initializer_range=0.2)


def test_loss_and_gradients_are_those_of_bradley_and_terry(small_run):
    """In FP64, answers packed and in micro-batches, against each answer read alone and the formula written out."""
    model = Transformer(MODEL)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model = model.double()
    generator = torch.Generator().manual_seed(1)
    texts = [torch.randint(3, 50, (length,), generator=generator).tolist() for length in (5, 9, 2, 14, 7, 1)]
    balance = replace(small_run.balance, sequence_loss_weight=0.0)
    parts = [
        batch_of([TaughtTokens(ids=[*ids, PAD], trained=[*[False] * len(ids), True], name="") for ids in texts[a:b]])
        for a, b in ((0, 4), (4, 6))
    ]
    whole, total = WholeBatch.of(parts), 0.0
    for part in parts:
        loss = PairLoss(pad_id=PAD)(model, output=model(part), batch=part, whole=whole, mtp_weight=0.0, balance=balance)
        loss.total.backward()
        total += loss.next_token.item()
    ours = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}

    model.zero_grad()
    last = torch.stack([model(TokenBatch.from_sequences([ids])).hidden[-1] for ids in texts])
    apart = (last @ model.lm_head.weight[PAD]).reshape(3, 2)
    wanted = torch.log1p(torch.exp(apart[:, 1] - apart[:, 0])).mean()
    wanted.backward()
    assert total == pytest.approx(wanted.item(), rel=1e-12)
    for name, weight in model.named_parameters():
        if weight.grad is not None:
            assert torch.allclose(ours[name], weight.grad, rtol=1e-9, atol=1e-14), name
    # Of the head by hand: (1 - sigmoid(difference)) (h_rejected - h_chosen), and nothing but its one row.
    pull = 1 - torch.sigmoid(apart[:, 0] - apart[:, 1])
    row = (pull[:, None] * (last[1::2] - last[0::2])).mean(0)
    assert torch.allclose(ours["lm_head.weight"][PAD], row, rtol=1e-9)
    assert not ours["lm_head.weight"][torch.arange(50) != PAD].any()


def problem(a: int, b: int) -> Problem:
    return Problem(messages=({"role": "user", "content": f"{a} and {b}"},), name=f"{a}+{b}")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The sum is preferred to one that stammers."""
    file = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    lines = [
        {"prompt": f"{a} and {b}", "chosen": f"{a + b}", "rejected": f"{a + b} {a + b}"}
        for a in range(9)
        for b in range(5)
    ]
    lines[0] = {
        "prompt": [{"role": "user", "content": "0 and 0"}],
        "chosen": [{"role": "assistant", "content": "0"}],
        "rejected": [{"role": "assistant", "content": "0 0"}],
    }
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.fixture(scope="module")
def lesson(pairs):
    return RewardConfig(data=(str(pairs),), epochs=2, rows_per_step=8, held_out_rate=0.2)


@pytest.fixture(scope="module")
def settings(taught, lesson):
    return reward_settings(read_config(taught / "config.json"), lesson=lesson, start_from=taught, peak=1e-2, floor=1e-3)


@pytest.fixture(scope="module")
def rewarded(settings, lesson, tmp_path_factory):
    return teach_reward(settings, lesson=lesson, folder=tmp_path_factory.mktemp("rewarded") / "run").folder


def records_of(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = [record for record in lines if record["kind"] in ("step", "reward")]
    return [{key: one[key] for key in one if key not in ("seconds", "tokens_per_second")} for one in kept]


def test_what_is_preferred_comes_to_be_worth_more(rewarded):
    accuracy = [one["held_out_accuracy"] for one in records_of(rewarded) if one["kind"] == "reward"]
    assert len(accuracy) == 2
    assert accuracy[-1] > 0.9
    model, asked = load_reward_model(rewarded), [(a, b) for a in range(9) for b in range(5)]
    problems, texts = [problem(a, b) for a, b in asked], [str(a + b) for a, b in asked]
    good, bad = model.score(problems, texts), model.score(problems, [f"{text} {text}" for text in texts])
    assert sum(map(float.__gt__, good, bad)) > 0.9 * len(asked)


def test_a_score_is_the_logit_of_the_padding_token_behind_the_answer(rewarded):
    asked = [problem(a, 3) for a in range(5)]
    answers = ["3", "4 4", "one", "", "7"]
    scores = load_reward_model(rewarded / "export").score(asked, answers)
    model = load_published(rewarded / "export", dtype=torch.float32, device="cpu").double()
    tokenizer = Tokenizer.from_file(rewarded / "corpus" / "tokenizer")
    for one, answer, score in zip(asked, answers, scores, strict=True):
        messages = [*one.messages, {"role": "assistant", "content": answer}]
        prompt = render_chat(tokenizer, messages=messages[:1], add_generation_prompt=True)
        said = render_chat(tokenizer, messages=messages, add_generation_prompt=False)[len(prompt) :]
        ids = tokenizer.encode(prompt) + tokenizer.encode(said)
        assert ids[-1] == tokenizer.eos_id
        hidden = model(TokenBatch.from_sequences([ids])).hidden[-1]
        assert score == pytest.approx((hidden @ model.lm_head.weight[tokenizer.pad_id]).item(), abs=1e-4)


def test_a_stopped_run_goes_on_as_one_left_alone(settings, lesson, rewarded, tmp_path):
    stopped = teach_reward(settings, lesson=lesson, folder=tmp_path / "cut", stop_after_steps=7)
    assert (stopped.step, stopped.finished) == (7, False)
    teach_reward(settings, lesson=lesson, folder=tmp_path / "cut")
    assert records_of(tmp_path / "cut") == records_of(rewarded)
    whole, cut = (
        load_published(folder / "export", dtype=torch.float32, device="cpu") for folder in (rewarded, tmp_path / "cut")
    )
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), cut.parameters(), strict=True))


def test_grpo_is_rewarded_by_a_model(rewarded, taught, tmp_path):
    name = f"model:{rewarded}"
    [reward] = rewards_named([f"{name}=0.5"])
    asked = [problem(a, 1) for a in range(3)]
    assert reward.weight == 0.5
    together = reward.scores(asked, ["1", "2", "3 3"])
    apart = [reward.score(one, text) for one, text in zip(asked, ["1", "2", "3 3"], strict=True)]
    assert together == pytest.approx(apart, abs=1e-5)
    lesson = GrpoConfig(
        iterations=1,
        problems_per_iteration=2,
        group_size=4,
        max_answer_tokens=6,
        held_out=1,
        rewards=(f"{name}=0.5", "format"),
    )
    config = grpo_settings(read_config(taught / "config.json"), start_from=taught)
    task = Task(name="sums", training=tuple(asked[:2]), held_out=tuple(asked[2:]))
    result = grpo(config, lesson=lesson, folder=tmp_path / "run", task=task)
    assert result.finished
    assert set(result.scores) == {name, "format"}


def test_what_is_no_pair_and_no_reward_model_is_named(taught, tmp_path):
    tokenizer, file = Tokenizer.from_file(taught / "corpus" / "tokenizer"), tmp_path / "pairs.jsonl"
    asked = {"role": "user", "content": "a"}
    for record, told in (
        ({"prompt": "a", "chosen": "b"}, "needs 'prompt', 'chosen' and 'rejected'"),
        ({"prompt": "a", "chosen": "b", "rejected": [asked]}, r"\(rejected\) has no answer"),
        (
            {"prompt": "a", "chosen": "b", "rejected": [{"role": "assistant", "content": "c"}, asked]},
            "no answer at the end of 'rejected'",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "far " * 50}, "1 are longer than 32 tokens"),
    ):
        file.write_text(json.dumps(record))
        with pytest.raises(DataError, match=told):
            pairs_of(RewardConfig(data=(str(file),)), tokenizer=tokenizer, length=32)
    with pytest.raises(ConfigError, match=r"no reward model: .* has no reward.json"):
        load_reward_model(taught)
