"""What a long command shows while it works: a live picture in a terminal, plain lines anywhere else.

`Progress` holds what is known, `shown` shows it. The parts that do the work know nothing of
either: they call back with counts or events, and `Progress` takes them.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dsv3.runtime.log import log_through
from dsv3.train.event import TrainEvent

SPARK_HEIGHTS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
BAR_WIDTH = 40
REFRESHES_PER_SECOND = 4.0
PLAIN_SECONDS = 5.0
"""Seconds between two lines where there is no terminal."""
PARTS = {
    "read": "reading text",
    "tokenizer": "training the tokenizer",
    "encode": "turning text into tokens",
    "pack": "packing tokens into rows",
}
"""Words for the parts of preparing a corpus; other parts are shown by their names."""


@dataclass
class StageState:
    """One line of the stage list."""

    name: str
    title: str
    state: str = "waiting"
    """'waiting', 'running', 'done', 'skipped' (it was done before) or 'stopped'."""
    note: str = ""
    started: float = 0.0
    seconds: float = 0.0


@dataclass
class Progress:
    """Everything the views show."""

    title: str
    stages: list[StageState]
    total_tokens: int = 0
    """Tokens that training is to reach."""
    clock: Callable[[], float] = time.monotonic
    part: str = ""
    """What the running stage is doing, where it has parts."""
    done: int = 0
    total: int = 0
    parts_done: list[str] = field(default_factory=list)
    step: dict[str, Any] = field(default_factory=dict)
    """The newest training step."""
    validation: dict[str, Any] = field(default_factory=dict)
    """The newest validation."""
    losses: list[float] = field(default_factory=list)
    on_change: Callable[[], None] = lambda: None
    """Called after every change; a view puts itself here."""
    _pace: deque[tuple[float, float]] = field(default_factory=lambda: deque(maxlen=60))
    """Times and amounts done, of which the time left is reckoned."""

    def start(self, name: str) -> None:
        """Mark a stage as running."""
        stage = self._find(name)
        stage.state, stage.started = "running", self.clock()
        self.part, self.done, self.total, self.parts_done = "", 0, 0, []
        self.step, self.validation, self.losses = {}, {}, []
        self._pace.clear()
        self.on_change()

    def finish(self, name: str, *, note: str = "") -> None:
        """Mark a stage as done, with a word on what came of it."""
        self._close(name, state="done", note=note)

    def skip(self, name: str, *, note: str = "") -> None:
        """Mark a stage as done in an earlier sitting."""
        self._close(name, state="skipped", note=note)

    def stop(self, name: str) -> None:
        """Mark a stage as stopped before its end."""
        self._close(name, state="stopped", note="")

    def count(self, part: str, done: int, total: int) -> None:
        """Take a count of the running stage: what it is doing, how far it is, and of how much (0: not known)."""
        part = PARTS.get(part, part)
        if part != self.part:
            if self.part:
                self.parts_done.append(self.part)
            self.part = part
            self._pace.clear()
        self.done, self.total = done, total
        self._pace.append((self.clock(), done))
        self.on_change()

    def train(self, event: TrainEvent) -> None:
        """Take an event of training."""
        if event.kind == "corpus":
            self.count(event.metrics["part"], event.metrics["done"], event.metrics["total"])
        if event.kind == "validation":
            self.validation = event.metrics
            self.on_change()
        if event.kind == "step":
            self.part = ""
            self.step = event.metrics
            self.losses.append(float(event.metrics["loss"]))
            self.done, self.total = int(event.metrics["tokens"]), self.total_tokens
            self._pace.append((self.clock(), self.done))
            self.on_change()

    @property
    def running(self) -> StageState | None:
        """The stage at work."""
        return next((stage for stage in self.stages if stage.state == "running"), None)

    @property
    def seconds_left(self) -> float | None:
        """Time the running stage will take at its recent pace; None while that is not known."""
        if not self.total or len(self._pace) < 3:
            return None
        (first_time, first), (last_time, last) = self._pace[0], self._pace[-1]
        if last <= first or last_time <= first_time:
            return None
        return (self.total - last) * (last_time - first_time) / (last - first)

    def _find(self, name: str) -> StageState:
        return next(stage for stage in self.stages if stage.name == name)

    def _close(self, name: str, *, state: str, note: str) -> None:
        stage = self._find(name)
        if stage.state == "running":
            stage.seconds = self.clock() - stage.started
        stage.state, stage.note = state, note
        self.on_change()


class PlainView:
    """Lines: one when a stage begins or ends, and one every few seconds in between."""

    def __init__(
        self, progress: Progress, *, write: Callable[[str], None], every_seconds: float = PLAIN_SECONDS
    ) -> None:
        self._progress = progress
        self._write = write
        self._every_seconds = every_seconds
        self._last = progress.clock()
        self._states = {stage.name: stage.state for stage in progress.stages}
        progress.on_change = self.update

    def update(self) -> None:
        """Write what is due."""
        for stage in self._progress.stages:
            if self._states[stage.name] != stage.state:
                self._states[stage.name] = stage.state
                self._write(stage_line(stage))
                self._last = self._progress.clock()
        if self._progress.running and self._progress.clock() - self._last >= self._every_seconds:
            self._last = self._progress.clock()
            self._write(f"  {plain_line(self._progress)}")


@contextmanager
def shown(progress: Progress, *, console: Console) -> Iterator[None]:
    """Show progress while the block runs: as a live picture in a terminal, as lines in a file or a pipe."""
    if not console.is_terminal or console.is_dumb_terminal:
        PlainView(progress, write=lambda text: print(text, file=console.file, flush=True))
        yield
        return
    live = Live(get_renderable=lambda: picture(progress), console=console, refresh_per_second=REFRESHES_PER_SECOND)
    with log_through(console), live:
        yield


MARKS = {
    "waiting": ("·", "dim"),
    "running": ("▸", "bold cyan"),
    "done": ("✓", "green"),
    "skipped": ("✓", "dim green"),
    "stopped": ("■", "yellow"),
}


def picture(progress: Progress) -> RenderableType:
    """Return the stages with their marks, and below the running one what it is doing."""
    parts: list[RenderableType] = [Text(progress.title, style="bold"), Text()]
    for stage in progress.stages:
        mark, style = MARKS[stage.state]
        line = Text.assemble((f" {mark} ", style), (stage.title, "bold" if stage.state == "running" else style))
        if stage.seconds:
            line.append(f"  {clock_time(stage.seconds)}", style="dim")
        if stage.note:
            line.append(f"  {stage.note}", style="dim")
        parts.append(line)
        if stage.state == "running":
            parts.append(Padding(detail(progress), (0, 0, 0, 3)))
    return Group(*parts)


def detail(progress: Progress) -> RenderableType:
    """Return what the running stage is doing: its parts, a bar, and for training the numbers that matter."""
    parts: list[RenderableType] = [Text.assemble(("✓ ", "green"), (part, "dim")) for part in progress.parts_done]
    if progress.part:
        parts.append(Text.assemble(("▸ ", "cyan"), progress.part))
    if progress.total:
        parts.append(bar_line(progress))
    elif progress.done:
        parts.append(Text(amount(progress), style="cyan"))
    if progress.step:
        parts.append(training_table(progress))
    return Group(*parts)


def amount(progress: Progress) -> str:
    """Return how much is done where nobody knows of how much: megabytes of text read, a number of anything else."""
    return f"{progress.done / 1e6:.1f} MB" if progress.part == PARTS["read"] else f"{progress.done:,}"


def bar_line(progress: Progress) -> Text:
    """Return the bar of the running stage with the time left."""
    share = min(progress.done / progress.total, 1.0)
    filled = round(share * BAR_WIDTH)
    line = Text.assemble(("━" * filled, "cyan"), ("━" * (BAR_WIDTH - filled), "bright_black"), f" {100 * share:3.0f} %")
    if progress.seconds_left is not None:
        line.append(f"  {clock_time(progress.seconds_left)} left", style="bold")
    return line


def training_table(progress: Progress) -> Table:
    """Return step, speed, loss with its curve, bits per byte and balance."""
    step, validation = progress.step, progress.validation
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column()
    speed = step.get("tokens_per_second")
    table.add_row("step", f"{step.get('step', 0):,}   {step.get('tokens', 0):,} tokens")
    if speed is not None:
        table.add_row("speed", f"{speed:,.0f} tokens/s")
    loss = Text.assemble((f"{step.get('loss', float('nan')):.3f}", "bold"), "  ", (sparkline(progress.losses), "cyan"))
    table.add_row("loss", loss)
    if validation:
        words = f"{validation.get('bits_per_byte', float('nan')):.3f} bits/byte at step {validation.get('step', 0):,}"
        table.add_row("held out", words)
    violations = step.get("max_violation") or []
    if violations:
        table.add_row("balance", balance_bar(sum(violations) / len(violations)))
    return table


def balance_bar(violation: float) -> Text:
    """Return a bar of MaxVio, full at 2: a busiest expert with three times its share."""
    width = 20
    filled = round(min(violation / 2.0, 1.0) * width)
    colour = "green" if violation < 0.5 else "yellow" if violation < 1.0 else "red"
    words = f" busiest expert {100 * violation:.0f} % above its share"
    return Text.assemble(("━" * filled, colour), ("━" * (width - filled), "bright_black"), words)


def sparkline(values: Sequence[float], *, width: int = SPARK_WIDTH) -> str:
    """Return a line of blocks for the whole history, each an average; the heights span what has been seen."""
    finite = [value for value in values if value == value and abs(value) != float("inf")]
    if len(finite) < 2:
        return ""
    columns = min(width, len(finite))
    edges = [round(place * len(finite) / columns) for place in range(columns + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(edges)]
    # The first fall of a loss would flatten all that follows: the highest eighth of the columns is cut off.
    low, high = min(means), sorted(means)[-1 - len(means) // 8]
    if high == low:
        return SPARK_HEIGHTS[0] * columns
    scale = (len(SPARK_HEIGHTS) - 1) / (high - low)
    return "".join(SPARK_HEIGHTS[round((min(mean, high) - low) * scale)] for mean in means)


def stage_line(stage: StageState) -> str:
    """Return the line that tells of a stage's new state."""
    if stage.state == "running":
        return f"[{stage.name}] {stage.title}"
    words = {"done": "done", "skipped": "was done before", "stopped": "stopped"}[stage.state]
    spent = f" in {clock_time(stage.seconds)}" if stage.seconds else ""
    return f"[{stage.name}] {words}{spent}" + (f": {stage.note}" if stage.note else "")


def plain_line(progress: Progress) -> str:
    """Return where the running stage is, on one line."""
    step = progress.step
    words = []
    running = progress.running
    if running is not None and step and not progress.part:
        words += [f"step {step.get('step', 0)}", f"loss {step.get('loss', float('nan')):.3f}"]
        if progress.validation:
            words.append(f"held out {progress.validation.get('bits_per_byte', float('nan')):.3f} bits/byte")
        if step.get("max_violation"):
            words.append(f"MaxVio {sum(step['max_violation']) / len(step['max_violation']):.2f}")
        if step.get("tokens_per_second") is not None:
            words.append(f"{step['tokens_per_second']:,.0f} tokens/s")
    elif progress.part:
        words.append(progress.part)
    if progress.total:
        words.append(f"{100 * min(progress.done / progress.total, 1.0):.0f} %")
    elif progress.done:
        words.append(amount(progress))
    if progress.seconds_left is not None:
        words.append(f"{clock_time(progress.seconds_left)} left")
    return ", ".join(words) or "working"


def clock_time(seconds: float) -> str:
    """Write a time: 8 s, 3:20, 1:02:05."""
    whole = max(round(seconds), 0)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
