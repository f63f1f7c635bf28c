"""Fine-tuning: what is packed equals what is alone, nothing goes missing silently, a stopped run goes on."""

import json
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import IGNORE
from dsv3.checkpoint.published import load_published
from dsv3.config.files import read_config
from dsv3.config.teaching import SftConfig
from dsv3.data.chat_data import TaughtTokens
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError, SnapshotError
from dsv3.infer.loaded import load
from dsv3.model.transformer import Transformer
from dsv3.posttrain.sft import TaughtRows, batch_of, held_out_loss, pack, rows_of_step, sft, sft_settings, taught_rows
from dsv3.train.loss import WholeBatch, pretraining_loss

from ..infer.conftest import TINY


def samples_of(lengths, *, vocab=50, seed=0):
    """Samples of so many inputs, the second half of each trained."""
    generator = torch.Generator().manual_seed(seed)
    return [
        TaughtTokens(
            ids=torch.randint(vocab, (length + 1,), generator=generator).tolist(),
            trained=[place > length // 2 for place in range(length + 1)],
            name=f"#{number}",
        )
        for number, length in enumerate(lengths)
    ]


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=60))
def test_packing_keeps_every_sample_once_and_wastes_less_than_half(lengths):
    samples = samples_of(lengths)
    rows = pack(samples, length=30)
    assert sorted(one.name for row in rows for one in row) == sorted(one.name for one in samples)
    sizes = [sum(len(one.inputs) for one in row) for row in rows]
    assert max(sizes) <= 30
    assert sum(sorted(sizes)[:2]) > 30 or len(rows) == 1  # or the two emptiest rows would have been one


MODEL = replace(TINY, vocab_size=50, initializer_range=0.2)


def test_packed_conversations_have_the_loss_and_the_gradients_of_each_alone(small_run):
    model = Transformer(MODEL)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    model = model.double()
    samples = samples_of([5, 17, 2, 30, 9])
    whole = WholeBatch.of([batch_of(samples)])
    assert whole.num_sequences == 5
    balance = replace(small_run.balance, sequence_loss_weight=1e-3)

    def run(groups):
        model.zero_grad()
        total = 0.0
        for group in groups:
            batch = batch_of(group)
            loss = pretraining_loss(
                model, output=model(batch, mtp=True), batch=batch, whole=whole, mtp_weight=0.1, balance=balance
            )
            loss.total.backward()
            total += loss.total.item()
        return total, {name: weight.grad.clone() for name, weight in model.named_parameters()}

    (packed, together), (alone, apart) = run([samples]), run([[one] for one in samples])
    assert packed == pytest.approx(alone, rel=1e-12)
    assert all(torch.allclose(together[name], apart[name], rtol=1e-9, atol=1e-14) for name in together)


def test_a_prompt_is_read_and_not_trained():
    batch = batch_of(samples_of([6, 4]))
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 0, 1, 2, 3]
    assert [target != IGNORE for target in batch.targets.tolist()] == [False] * 3 + [True] * 3 + [False] * 2 + [
        True
    ] * 2


def test_every_epoch_reads_every_row_once_in_an_order_of_its_own():
    rows = tuple((sample,) for sample in samples_of([3] * 10))
    taught = TaughtRows(rows=rows, held_out=(), dropped=(), cut=(), unanswered=())
    lesson = SftConfig(data=("x",), rows_per_step=4)

    def read(steps):
        return [row[0].name for step in steps for row in rows_of_step(taught, lesson=lesson, step=step, seed=1)]

    epochs = [read(range(3)), read(range(3, 6))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == [f"#{number}" for number in range(10)]
    assert epochs[0] != epochs[1]


@pytest.fixture
def tokenizer(base):
    return Tokenizer.from_file(base / "corpus" / "tokenizer")


def test_what_is_too_long_is_dropped_or_cut_and_counted(tokenizer, tmp_path):
    asked = {"role": "user", "content": "a " * 5}
    long = [{"role": "user", "content": "a " * 60}, {"role": "assistant", "content": "b"}]
    file = tmp_path / "long.jsonl"
    lines = [
        {"messages": [asked, {"role": "assistant", "content": "b"}]},
        {"messages": [asked, {"role": "assistant", "content": "b " * 60}]},
        {"messages": long},
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    lesson = SftConfig(data=(str(file),))
    dropped = taught_rows(lesson, tokenizer=tokenizer, length=32)
    assert dropped.dropped == (f"{file}#2", f"{file}#3")
    assert "2 longer than a row and dropped" in dropped.told()
    cut = taught_rows(replace(lesson, too_long="cut"), tokenizer=tokenizer, length=32)
    assert (cut.cut, cut.unanswered) == ((f"{file}#2", f"{file}#3"), (f"{file}#3",))
    assert sum(len(one.inputs) for row in cut.rows for one in row) > 32
    with pytest.raises(DataError, match="none is left to train on: 3 are longer than a row of 4 tokens"):
        taught_rows(lesson, tokenizer=tokenizer, length=4)


@pytest.fixture
def lesson(sums):
    return SftConfig(data=(str(sums),), epochs=3, rows_per_step=2, held_out_rate=0.1)


@pytest.fixture
def settings(base, lesson):
    config = sft_settings(read_config(base / "config.json"), lesson=lesson, start_from=base, peak=1e-2, floor=1e-3)
    return replace(config, snapshot=replace(config.snapshot, every_steps=5))


def losses_of(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if record["kind"] == "step"]


def test_a_run_teaches_stops_and_goes_on_as_one_left_alone(settings, lesson, tmp_path):
    whole = sft(settings, lesson=lesson, folder=tmp_path / "whole")
    assert whole.finished
    assert whole.step == whole.total_steps
    first = sft(settings, lesson=lesson, folder=tmp_path / "cut", stop_after_steps=3)
    assert (first.finished, first.export, first.step) == (False, None, 3)
    again = sft(settings, lesson=lesson, folder=tmp_path / "cut")
    assert losses_of(tmp_path / "cut") == losses_of(tmp_path / "whole")
    assert losses_of(tmp_path / "whole")[-1] < 0.7 * losses_of(tmp_path / "whole")[0]
    models = [load_published(run.export, dtype=torch.float32, device="cpu") for run in (whole, again)]
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    records = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    rates = [record["learning_rate"] for record in records if record["kind"] == "step"]
    assert rates[0] == pytest.approx(1e-2)
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] < 2e-3
    held_out = [record["held_out_loss"] for record in records if record["kind"] == "sft"]
    assert len(held_out) == lesson.epochs
    assert held_out[-1] < held_out[0]
    nats, count = held_out_loss(models[0], samples=whole.rows.held_out)
    assert held_out[-1] == pytest.approx(nats / count, rel=1e-5)


def test_a_taught_run_is_a_model_to_talk_to(settings, lesson, tmp_path):
    run = sft(settings, lesson=lesson, folder=tmp_path / "run")
    model = load(run.folder, device="cpu")
    assert not model.is_base


def test_other_data_or_another_lesson_is_refused(settings, lesson, tmp_path):
    folder = tmp_path / "run"
    sft(settings, lesson=lesson, folder=folder, stop_after_steps=1)
    with pytest.raises(ConfigError, match="epochs was 3 and is now 4"):
        sft(settings, lesson=replace(lesson, epochs=4), folder=folder)
    other = tmp_path / "other.jsonl"
    other.write_text('{"prompt": "a", "completion": "b"}\n')
    own = replace(lesson, data=(str(other),))
    sft(settings, lesson=own, folder=tmp_path / "second", stop_after_steps=1)
    other.write_text('{"prompt": "a", "completion": "c"}\n')
    with pytest.raises(SnapshotError, match="is not what"):
        sft(settings, lesson=own, folder=tmp_path / "second")


def test_a_model_in_the_published_format_can_be_taught(base, settings, lesson, tmp_path):
    ours = sft(settings, lesson=lesson, folder=tmp_path / "of_run", stop_after_steps=2)
    published = replace(settings, start_from=str(base / "export"))
    sft(published, lesson=lesson, folder=tmp_path / "of_export", stop_after_steps=2)
    assert ours.step == 2
    a, b = losses_of(tmp_path / "of_run"), losses_of(tmp_path / "of_export")
    assert a == pytest.approx(b, rel=1e-3)  # an export has what is computed in, a snapshot the FP32 masters
