import io
import math

import pytest
from rich.console import Console

from dsv3.cli.progress import Progress, StageState, clock_time, picture, shown, sparkline
from dsv3.train.event import TrainEvent


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def progress(clock):
    stages = [StageState(name=name, title=name.title()) for name in ("corpus", "pretrain")]
    return Progress(title="a run", stages=stages, total_tokens=1000, clock=clock)


def step(number, *, tokens, loss=3.0):
    metrics = {"step": number, "tokens": tokens, "loss": loss, "tokens_per_second": 50.0, "max_violation": [0.2, 0.4]}
    return TrainEvent(stage="train", kind="step", metrics=metrics)


def drawn(progress):
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(picture(progress))
    return console.file.getvalue()


def test_time_left_is_what_remains_at_the_recent_pace(progress, clock):
    progress.start("pretrain")
    for number in range(1, 6):
        clock.now += 2.0
        progress.train(step(number, tokens=100 * number))
    assert progress.seconds_left == pytest.approx(500 / 50)


def test_time_left_is_unknown_at_first_and_without_a_total(progress, clock):
    progress.start("corpus")
    progress.count("read", 10, 0)
    assert progress.seconds_left is None
    progress.count("encode", 0, 100)
    progress.count("encode", 1, 100)
    assert progress.seconds_left is None


def test_the_picture_shows_done_running_and_waiting_stages(progress, clock):
    assert "· Corpus" in drawn(progress)
    progress.start("corpus")
    progress.count("read", 2_500_000, 0)
    assert "2.5 MB" in drawn(progress)
    progress.count("tokenizer", 0, 1)
    assert "✓ reading text" in drawn(progress)
    assert "▸ training the tokenizer" in drawn(progress)
    clock.now = 75.0
    progress.finish("corpus", note="3 MB")
    progress.start("pretrain")
    progress.train(step(7, tokens=250, loss=4.5))
    progress.train(step(8, tokens=260, loss=4.25))
    progress.train(TrainEvent(stage="train", kind="validation", metrics={"step": 8, "bits_per_byte": 2.345}))
    text = drawn(progress)
    assert "✓ Corpus  1:15  3 MB" in text
    assert "▸ Pretrain" in text
    for words in ("26 %", "4.250", "2.345 bits/byte at step 8", "busiest expert 30 % above its share"):
        assert words in text


def test_numbers_of_one_stage_do_not_linger_in_the_next(progress):
    progress.start("corpus")
    progress.train(step(1, tokens=10))
    progress.finish("corpus")
    progress.start("pretrain")
    assert "tokens/s" not in drawn(progress)


def test_corpus_events_of_training_are_counts(progress):
    progress.start("pretrain")
    progress.train(TrainEvent(stage="train", kind="corpus", metrics={"part": "encode", "done": 3, "total": 4}))
    assert "turning text into tokens" in drawn(progress)
    assert "75 %" in drawn(progress)


def test_without_a_terminal_there_is_a_line_every_few_seconds_and_at_each_change(progress, clock):
    out = io.StringIO()
    with shown(progress, console=Console(file=out)):
        progress.skip("corpus", note="3 MB")
        progress.start("pretrain")
        for number in range(1, 13):
            clock.now += 1.0
            progress.train(step(number, tokens=10 * number))
        progress.finish("pretrain", note="good")
    assert out.getvalue().splitlines() == [
        "[corpus] was done before: 3 MB",
        "[pretrain] Pretrain",
        "  step 5, loss 3.000, MaxVio 0.30, 50 tokens/s, 5 %, 1:35 left",
        "  step 10, loss 3.000, MaxVio 0.30, 50 tokens/s, 10 %, 1:30 left",
        "[pretrain] done in 12 s: good",
    ]


def test_in_a_terminal_the_picture_is_drawn_in_place_and_the_cursor_comes_back(progress):
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    progress.start("corpus")
    with pytest.raises(KeyboardInterrupt), shown(progress, console=console):
        raise KeyboardInterrupt
    assert "Corpus" in out.getvalue()
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")


def test_a_sparkline_spans_what_has_been_seen_and_ignores_what_is_not_a_number():
    assert sparkline([1.0]) == ""
    assert sparkline([2.0, 2.0, math.nan]) == "▁▁"
    falling = sparkline([8 - place / 10 for place in range(80)], width=10)
    assert len(falling) == 10
    assert falling[0] == "█"
    assert falling[-1] == "▁"
    assert list(falling) == sorted(falling, reverse=True)


@pytest.mark.parametrize(("seconds", "text"), [(7.6, "8 s"), (200, "3:20"), (3725, "1:02:05"), (-3, "0 s")])
def test_times_are_written_as_on_a_clock(seconds, text):
    assert clock_time(float(seconds)) == text
