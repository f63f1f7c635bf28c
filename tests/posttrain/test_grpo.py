"""GRPO whole: the engine and the trainer agree, a stopped run goes on, and what is rewarded is learned."""

import json
from dataclasses import replace

import pytest
import torch

from dsv3.checkpoint.published import load_published
from dsv3.config.files import read_config
from dsv3.config.teaching import GrpoConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError, SnapshotError
from dsv3.infer.loaded import load
from dsv3.model.transformer import Transformer
from dsv3.posttrain.grpo import Judged, _seed, grpo, grpo_settings, policy_batch
from dsv3.posttrain.policy import PolicyLoss
from dsv3.posttrain.problem import Problem
from dsv3.posttrain.rewards import Reward
from dsv3.posttrain.rollout import draw_answers, runner_for
from dsv3.posttrain.tasks import Task, read_problems, split, task_named

PROBLEMS = tuple(
    Problem(messages=({"role": "user", "content": f"say {word}"},), answer=word, name=word)
    for word in ("sea", "moon", "river", "stone", "light", "far")
)
TASK = Task(name="words", training=PROBLEMS[:4], held_out=PROBLEMS[4:])


@pytest.fixture
def settings(taught):
    config = grpo_settings(read_config(taught / "config.json"), start_from=taught, peak=1e-2)
    return replace(config, snapshot=replace(config.snapshot, every_steps=1))


LESSON = GrpoConfig(
    iterations=3,
    problems_per_iteration=2,
    group_size=8,
    updates_per_rollout=2,
    max_answer_tokens=6,
    kl_weight=0.01,
    validate_every=2,
    held_out=2,
)
VARIED = Reward(name="varied", score=lambda problem, text: sum(map(ord, text)) % 7 / 7)
LONG = Reward(name="long", score=lambda problem, text: len(text) / 10)


def records_of(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


def without_times(records):
    return [{key: value for key, value in record.items() if key != "seconds"} for record in records]


def answers_of(model, *, tokenizer, **changes):
    options = {"group_size": 3, "temperature": 1.0, "max_tokens": 8, "seed": 5}
    return draw_answers(runner_for(model), tokenizer=tokenizer, problems=PROBLEMS, **(options | changes))


@pytest.fixture
def model(taught):
    return load_published(taught / "export", dtype=torch.float32, device="cpu")


@pytest.fixture
def tokenizer(taught):
    return Tokenizer.from_file(taught / "corpus" / "tokenizer")


def test_the_engine_says_of_every_token_what_the_trainer_says(model, tokenizer):
    """The end token too, and with rows of the head that are no token."""
    answers = answers_of(model, tokenizer=tokenizer, group_size=8)
    assert any(answer.finished for answer in answers)
    assert all(len(answer.logprobs) == len(answer.ids) for answer in answers)
    judged = [Judged(answer=answer, reward=0.0, scores={}, advantage=0.0) for answer in answers]
    batch = policy_batch(judged, lesson=LESSON, num_answers=len(judged), num_tokens=1)
    ours = PolicyLoss(lesson=LESSON, vocab_size=tokenizer.vocab_size).logprobs(model, batch=batch)
    assert torch.allclose(ours[batch.shares > 0], batch.old_logprobs[batch.shares > 0], atol=1e-4)


def test_answers_hang_on_the_seed_and_on_nothing_else(model, tokenizer):
    first, again, other = (answers_of(model, tokenizer=tokenizer, seed=seed) for seed in (5, 5, 6))
    assert [one.ids for one in first] == [one.ids for one in again]
    assert [one.ids for one in first] != [one.ids for one in other]
    assert len({tuple(one.ids) for one in first[:3]}) > 1
    one_by_one = draw_answers(
        runner_for(model),
        tokenizer=tokenizer,
        problems=PROBLEMS[:1],
        group_size=3,
        temperature=1.0,
        max_tokens=8,
        seed=5,
    )
    assert [one.ids for one in one_by_one] == [one.ids for one in first[:3]]


def test_a_run_learns_stops_and_goes_on_as_one_left_alone(settings, tmp_path):
    options = {"lesson": LESSON, "task": TASK, "rewards": [VARIED]}
    whole = grpo(settings, folder=tmp_path / "whole", **options)
    assert whole.finished
    first = grpo(settings, folder=tmp_path / "cut", stop_after_iterations=2, **options)
    assert (first.iteration, first.finished, first.export) == (2, False, None)
    grpo(settings, folder=tmp_path / "cut", **options)
    for kind in ("grpo", "grpo_validation"):
        assert without_times(records_of(tmp_path / "cut", kind)) == without_times(records_of(tmp_path / "whole", kind))
    records = records_of(tmp_path / "whole", "grpo")
    assert [record["iteration"] for record in records] == [1, 2, 3]
    for record in records:
        assert record["first_ratio_off"] < 1e-4  # the first update is on policy
        assert set(record["seconds"]) == {"rollout", "rewards", "learn"}
        assert record["kl"] >= 0
    assert not load(whole.folder, device="cpu").is_base


AHEAD = replace(LESSON, iterations=4, draw_ahead=True)


def test_answers_drawn_ahead_are_those_of_the_weights_before_the_updates(settings, model, tokenizer, tmp_path):
    result = grpo(settings, folder=tmp_path / "run", lesson=AHEAD, task=TASK, rewards=[VARIED])
    records = records_of(result.folder, "grpo")
    assert [record["stale_steps"] for record in records] == [0, 2, 2, 2]
    assert [record["first_ratio_off"] < 1e-4 for record in records] == [True, False, False, False]
    for number in (0, 1):  # both are drawn by the model that the run began with
        expected = draw_answers(
            runner_for(model),
            tokenizer=tokenizer,
            problems=TASK.problems_of(number, count=2, seed=0),
            group_size=8,
            temperature=1.0,
            max_tokens=6,
            seed=_seed(0, number),
        )
        scores = [VARIED.score(one.problem, one.text) for one in expected]
        assert records[number]["reward"] == pytest.approx(sum(scores) / 16)
        assert records[number]["answer_tokens"] == sum(len(one.ids) for one in expected)


@pytest.mark.parametrize("routing", ["own", "replay"])
def test_a_run_that_draws_ahead_stops_and_goes_on_as_one_left_alone(settings, tmp_path, routing):
    lesson = replace(AHEAD, routing=routing)
    options = {"lesson": lesson, "task": TASK, "rewards": [VARIED]}
    grpo(settings, folder=tmp_path / "whole", **options)
    for stop_after in (1, 2, None):
        grpo(settings, folder=tmp_path / "cut", stop_after_iterations=stop_after, **options)
    for kind in ("grpo", "grpo_validation"):
        assert without_times(records_of(tmp_path / "cut", kind)) == without_times(records_of(tmp_path / "whole", kind))
    kept = {path.name for path in (tmp_path / "cut" / "snapshots").glob("step-*")}
    assert {path.stem for path in (tmp_path / "cut" / "drawn_ahead").iterdir()} <= kept


def test_answers_drawn_ahead_that_are_damaged_are_named(settings, tmp_path):
    options = {"lesson": AHEAD, "task": TASK, "rewards": [VARIED]}
    grpo(settings, folder=tmp_path / "run", stop_after_iterations=1, **options)
    (file,) = (tmp_path / "run" / "drawn_ahead").iterdir()
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SnapshotError, match=r"drawn_ahead.*remove it to draw its answers anew"):
        grpo(settings, folder=tmp_path / "run", **options)
    file.unlink()
    assert grpo(settings, folder=tmp_path / "run", **options).finished
    with pytest.raises(ConfigError, match="not those that drew"):
        replace(AHEAD, old_logprobs="trainer")


def test_what_is_rewarded_is_learned(settings, tmp_path):
    """Answers without end are worth most; a model of 24,000 weights finds out within a dozen iterations."""
    lesson = replace(LESSON, iterations=12, kl_weight=0.0, problems_per_iteration=4, updates_per_rollout=1)
    result = grpo(settings, folder=tmp_path / "run", lesson=lesson, task=TASK, rewards=[LONG])
    lengths = [record["length"] for record in records_of(result.folder, "grpo")]
    assert lengths[-1] > 1.5 * lengths[0]
    assert lengths[-1] > 0.9 * lesson.max_answer_tokens


def test_groups_that_are_alike_teach_nothing_and_are_counted(settings, tmp_path):
    same = Reward(name="same", score=lambda problem, text: 1.0)
    result = grpo(settings, folder=tmp_path / "run", lesson=LESSON, task=TASK, rewards=[same])
    assert result.finished
    assert [record["alike_groups"] for record in records_of(result.folder, "grpo")] == [1.0] * 3
    taught, base = (
        load_published(path, dtype=torch.float32, device="cpu")
        for path in (result.export, tmp_path / "run" / "reference")
    )
    assert all(torch.equal(a, b) for a, b in zip(taught.parameters(), base.parameters(), strict=True))


def test_the_reference_is_the_first_model_or_a_later_one(settings, tmp_path):
    options = {"task": TASK, "rewards": [VARIED]}
    grpo(settings, folder=tmp_path / "kept", lesson=replace(LESSON, updates_per_rollout=1), **options)
    grpo(settings, folder=tmp_path / "new", lesson=replace(LESSON, updates_per_rollout=1, reference_every=1), **options)
    kept, new = ([record["kl"] for record in records_of(tmp_path / name, "grpo")] for name in ("kept", "new"))
    assert kept[0] == new[0] == pytest.approx(0, abs=1e-6)
    assert kept[-1] > 1e-4
    assert new[-1] == pytest.approx(0, abs=1e-6)


def test_old_probabilities_may_be_the_trainers_and_then_temperature_may_be_any(settings, tmp_path):
    lesson = replace(LESSON, iterations=1, old_logprobs="trainer", temperature=0.7)
    result = grpo(settings, folder=tmp_path / "run", lesson=lesson, task=TASK, rewards=[VARIED])
    assert records_of(result.folder, "grpo")[0]["first_ratio_off"] < 1e-5


def test_arithmetic_is_disjoint_from_what_is_held_out():
    task = task_named("arithmetic")
    asked = [{json.dumps(problem.messages) for problem in part} for part in (task.training, task.held_out)]
    assert not asked[0] & asked[1]
    assert len(asked[0]) + len(asked[1]) == 2000
    assert 150 < len(asked[1]) < 250
    seen = [problem.name for number in range(4) for problem in task.problems_of(number, count=600, seed=1)]
    assert len(set(seen[: len(task.training)])) == len(task.training)


def test_files_of_problems_are_read_and_faults_named(tmp_path):
    file = tmp_path / "p.jsonl"
    lines = [{"prompt": f"{n}+1", "answer": n + 1, "hint": "x"} for n in range(40)]
    file.write_text("\n".join(map(json.dumps, lines)))
    task = task_named(str(file))
    assert len(task.training) + len(task.held_out) == 40
    assert next(iter(read_problems(file))).more == {"hint": "x"}
    for text, told in (
        ("{", "is no JSON"),
        ('{"answer": 1}', "needs 'prompt'"),
        ('{"prompt": "a"}', "none of answer, tests"),
    ):
        file.write_text(text)
        with pytest.raises(DataError, match=told):
            list(read_problems(file))
    with pytest.raises(DataError, match="too few"):
        split(list(PROBLEMS[:1]), name="one")
    with pytest.raises(ConfigError, match="no task 'sums'"):
        task_named("sums")


def test_a_prompt_that_leaves_no_room_is_refused(settings, tmp_path):
    with pytest.raises(ConfigError, match="use fewer max_answer_tokens"):
        grpo(
            settings, folder=tmp_path / "run", lesson=replace(LESSON, max_answer_tokens=500), task=TASK, rewards=[LONG]
        )


def test_weights_are_taken_over_at_every_update(model, tokenizer):
    before = answers_of(model, tokenizer=tokenizer, temperature=0.0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    assert isinstance(model, Transformer)
    assert [one.ids for one in answers_of(model, tokenizer=tokenizer, temperature=0.0)] != [one.ids for one in before]


def test_engine_and_trainer_send_every_token_to_the_same_experts(settings, tmp_path):
    lesson = replace(LESSON, routing="compare", kl_weight=0.0)
    result = grpo(settings, folder=tmp_path / "run", lesson=lesson, task=TASK, rewards=[VARIED])
    assert [record["first_rerouted"] for record in records_of(result.folder, "grpo")] == [0.0] * 3
    alone = grpo(settings, folder=tmp_path / "own", lesson=replace(lesson, routing="own"), task=TASK, rewards=[VARIED])
    for one, two in zip(records_of(result.folder, "grpo"), records_of(alone.folder, "grpo"), strict=True):
        assert (one["reward"], one["loss"]) == (
            two["reward"],
            two["loss"],
        )  # asked or not, the same is drawn and learned


def test_routing_is_replayed_where_routers_would_choose_otherwise(model, tokenizer):
    """Experts drawn at random stand for an engine whose numerics are others."""
    [answer] = answers_of(model, tokenizer=tokenizer, group_size=1, with_experts=True)[:1]
    config = model.config
    assert answer.experts.shape == (answer.num_tokens - 1, config.num_moe_layers, config.num_experts_per_tok)
    others = torch.stack(
        [torch.randperm(config.n_routed_experts)[: config.num_experts_per_tok] for _ in answer.experts.flatten(0, 1)]
    ).view_as(answer.experts)
    judged = [Judged(answer=replace(answer, experts=others), reward=1.0, scores={}, advantage=1.0)]
    options = {"num_answers": 1, "num_tokens": len(answer.ids)}
    replayed = policy_batch(judged, lesson=replace(LESSON, routing="replay"), **options)
    output = model(replayed)
    assert torch.equal(torch.stack([one.experts for one in output.routings], dim=1), others.long())
    for routing in output.routings:  # their gates are those of the router (eq. 13-14)
        gates = routing.affinity.gather(1, routing.experts)
        gates = gates / gates.sum(1, keepdim=True) * config.routed_scaling_factor
        assert torch.allclose(routing.gates, gates)
    compared = policy_batch(judged, lesson=replace(LESSON, routing="compare"), **options)
    assert torch.equal(model(compared).hidden, model(replace(compared, drawn_experts=None)).hidden)


def test_replaying_what_the_router_chooses_changes_nothing(settings, tmp_path):
    records = []
    for routing in ("own", "replay"):
        lesson = replace(LESSON, routing=routing, updates_per_rollout=1)
        result = grpo(settings, folder=tmp_path / routing, lesson=lesson, task=TASK, rewards=[VARIED])
        records.append(records_of(result.folder, "grpo"))
    for one, two in zip(*records, strict=True):
        assert one["reward"] == two["reward"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4, abs=1e-6)
