"""An experiment from the asking to the record; training is a few steps on text of the test's own."""

import json

import pytest

from dsv3.errors import ConfigError
from dsv3.reproduce import arms, balancing, fp8, specialisation, training
from dsv3.reproduce.catalogue import EXPERIMENTS, find
from dsv3.reproduce.experiment import Ask, Outcome
from dsv3.reproduce.finding import Number
from dsv3.reproduce.record import CLOCK, earlier_seconds, read_record
from dsv3.reproduce.running import reproduce, verdict_text

STEPS = 2
TOKENS = STEPS * 8 * 256


@pytest.fixture
def own_text(tmp_path, monkeypatch):
    """Let trainings read two small sources, with a small vocabulary."""
    for name, word in (("one", "stone"), ("two", "river")):
        folder = tmp_path / name
        folder.mkdir()
        for number in range(40):
            (folder / f"{number}.txt").write_text(f"The {word} {number} lies by the {word} of {number * 7}. " * 60)
    sources = [{"path": str(tmp_path / name), "name": name} for name in ("one", "two")]
    small = (*arms.SMALL, "model.vocab_size=320", f"data.sources={json.dumps(sources)}", "data.held_out_rate=0.2")
    monkeypatch.setattr(arms, "SMALL", small)


@pytest.mark.usefixtures("own_text")
def test_balancing_trains_judges_and_goes_on_where_it_was(tmp_path, monkeypatch):
    root, told = tmp_path / "runs", []
    trained = []
    real = training.pretrain

    def pretrain(config, *, folder):
        trained.append(folder.name)
        if len(trained) == 3:
            raise KeyboardInterrupt
        return real(config, folder=folder)

    monkeypatch.setattr(training, "pretrain", pretrain)
    with pytest.raises(KeyboardInterrupt):
        reproduce(find("balancing"), root=root, seeds=1, tokens=TOKENS, tell=told.append)
    assert json.loads((root / "balancing" / CLOCK).read_text())["seconds"] > 0
    record = reproduce(find("balancing"), root=root, seeds=1, tokens=TOKENS, tell=told.append)

    assert not (root / "balancing" / CLOCK).exists()
    assert record == read_record(root / "balancing")
    assert record["command"] == f"dsv3 reproduce balancing --seeds 1 --tokens {TOKENS}"
    assert {len(values) for values in record["data"]["max_violation"].values()} == {1}
    assert [finding["claim"] for finding in record["findings"][:2]] == [
        "MaxVio: bias below sequence loss x2",
        "MaxVio: sequence loss x2 below none",
    ]
    for picture in record["pictures"]:
        assert (root / "balancing" / picture["file"]).stat().st_size < 100_000
    assert told[-1] == f"5 of 5: none, seed 0: held-out loss {record['data']['loss']['none'][0]:.4f}"
    # All arms have read the same rows: the first step's loss is the same but for what routing does to it.
    runs = [arms.read_run(path) for path in sorted((root / "balancing" / "runs").iterdir())]
    assert len({round(run.losses[0], 3) for run in runs}) == 1

    # Finished: nothing is trained any more.
    monkeypatch.setattr(training, "pretrain", None)
    assert reproduce(find("balancing"), root=root, seeds=1, tokens=TOKENS, tell=told.append) == record
    assert "remove" in told[-1]


@pytest.mark.slow
@pytest.mark.usefixtures("own_text")
def test_specialisation_reads_the_runs_that_balancing_has_trained(tmp_path, monkeypatch):
    ask = Ask(folder=tmp_path / "runs" / "specialisation", seeds=(0,), tokens=TOKENS, tell=lambda line: None)
    ask.folder.mkdir(parents=True)
    outcome = specialisation.run(ask)
    assert outcome.findings[0].higher == outcome.data["apart_beyond_chance"]["bias"]
    trained = {path.name for path in (tmp_path / "runs" / "balancing" / "runs").iterdir()}
    assert trained == {f"bias-{TOKENS}-seed-0", f"sequence_loss-{TOKENS}-seed-0"}


def test_the_bias_is_measured_without_any_auxiliary_loss():
    """As the report's ablation (4.5.2), unlike its training, which has the complementary loss."""
    settings = {arm.name: arms.small_run(TOKENS, seed=1, settings=arm.settings) for arm in balancing.ARMS}
    assert settings["bias"].balance.sequence_loss_weight == 0
    assert settings["sequence_loss"].balance.auxiliary_loss_weight == 0.001
    assert {config.balance.method for config in settings.values()} == {"bias", "sequence_loss", "batch_loss", "none"}
    assert {config.runtime.seed for config in settings.values()} == {1}


def test_the_difference_of_losses_is_relative_and_in_percent():
    assert fp8.difference([2.02, 2.02, 2.02], [2.0, 2.0, 2.0]) == pytest.approx([1.0, 1.0, 1.0])


def test_seconds_of_a_sitting_that_was_stopped_are_counted(tmp_path, monkeypatch):
    class Stopped:
        @staticmethod
        def run(ask):
            raise KeyboardInterrupt

    class Done:
        @staticmethod
        def run(ask):
            return Outcome(findings=(Number(claim="n", report="1", expected=1, value=2),), pictures=())

    times = iter([0.0, 100.0, 200.0, 207.0])
    monkeypatch.setattr("dsv3.reproduce.running.time.monotonic", lambda: next(times))
    monkeypatch.setattr("dsv3.reproduce.running.import_module", lambda name: Stopped)
    with pytest.raises(KeyboardInterrupt):
        reproduce(find("cost"), root=tmp_path)
    monkeypatch.setattr("dsv3.reproduce.running.import_module", lambda name: Done)
    record = reproduce(find("cost"), root=tmp_path)
    assert record["seconds"] == 107.0
    assert earlier_seconds(tmp_path / "cost", tokens=0) == 107.0  # of a run with more seeds, which uses what is there
    assert "differs            n" in verdict_text(record)


def test_options_that_nothing_would_obey_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="nothing is drawn in 'cost'"):
        reproduce(find("cost"), root=tmp_path, seeds=2)
    with pytest.raises(ConfigError, match="'cost' has no training runs"):
        reproduce(find("cost"), root=tmp_path, tokens=100)


def test_every_experiment_has_a_file_of_its_name():
    from importlib.util import find_spec

    assert all(find_spec(f"dsv3.reproduce.{name}") is not None for name in EXPERIMENTS)
