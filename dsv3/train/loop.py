"""Pre-training from text to a finished model, in one function that may be stopped and called again.

corpus -> newest snapshot -> steps, validations, snapshots -> export
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from dsv3.batch import TokenBatch
from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.snapshot import Saving
from dsv3.checkpoint.snapshot_folder import latest_snapshot
from dsv3.config import PretrainConfig
from dsv3.data.loader import RowLoader
from dsv3.data.prepare import prepare_corpus
from dsv3.data.prepared import PreparedCorpus, load_prepared
from dsv3.errors import ConfigError, NonFiniteError, TrainingError
from dsv3.model.transformer import Transformer
from dsv3.native import choose_cpu_kernels
from dsv3.parallel.launch import open_ranks
from dsv3.parallel.ranks import Alone
from dsv3.parallel.trace import write_trace
from dsv3.runtime.device import set_threads
from dsv3.runtime.log import get_logger, say_once
from dsv3.train.event import EventCallback, TrainEvent
from dsv3.train.health import HangWatch, SpikeFinder, StragglerFinder
from dsv3.train.metrics import MetricsLog, UnwrittenLog
from dsv3.train.resume import (
    fingerprint,
    new_state,
    newest_snapshot,
    restore_state,
    take_weights,
    whole_model,
    write_state,
)
from dsv3.train.run_folder import open_run_folder
from dsv3.train.schedule import batch_sequences, mtp_loss_weight, total_steps
from dsv3.train.step import StepMetrics, TrainState, train_step
from dsv3.train.stop import stop_on_signals
from dsv3.train.validation import HeldOut, ValidationResult, read_held_out, validate

NAMED_DOCUMENTS = 8
"""Documents that an error names, of all that lie in its rows."""

Sampler = Callable[[Transformer, str], str]
"""Continues a prompt with the model as it is: given by the caller, since training knows nothing of generation."""


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """Where a call of `pretrain` has left the run."""

    folder: Path
    step: int
    tokens: int
    finished: bool
    """Whether `total_tokens` have been reached."""
    interrupted: bool
    """Whether a signal ended the call; the same call goes on from where it stopped."""
    validation: ValidationResult | None
    """The last validation of this call."""
    snapshot: Path | None
    """The newest snapshot."""
    export: Path | None
    """The finished model in the published format, None before the end."""


def pretrain(
    config: PretrainConfig,
    *,
    folder: Path,
    on_event: EventCallback | None = None,
    stop_after_steps: int | None = None,
    sampler: Sampler | None = None,
) -> PretrainResult:
    """Train in the run folder `folder`, from its newest snapshot if it has one, until `config.total_tokens`.

    Called again with the same settings it goes on, bit for bit as if it had never stopped. `stop_after_steps` ends
    this call, not the run, after so many steps and a snapshot. Ctrl-C or SIGTERM does the same after the step at
    hand; a second one raises KeyboardInterrupt at once. `sampler` continues `evaluation.sample_prompts` at every
    validation; without one there are no samples.

    Raises:
        ConfigError: the run was started with other settings, or these settings cannot be obeyed here.
        DataError: the corpus cannot be prepared or read.
        SnapshotError: no snapshot can be written or, where there are some, none can be read.
        NonFiniteError: a loss or gradient was NaN or infinite; nothing after the last good step was kept.
        TrainingError: the run folder cannot be written, or another process trains in it.
    """
    opened = open_ranks(
        config.parallel,
        model=config.model,
        sequence_length=config.batch.sequence_length,
        device=config.runtime.device,
    )
    with opened as ranks:
        _require_shares(config, ranks=ranks)
        notify = (on_event if ranks.rank == 0 else None) or _ignore
        with ExitStack() as held:
            if ranks.rank == 0:
                held.enter_context(open_run_folder(folder, config=config))
                prepare_corpus(config, folder=folder / "corpus", progress=_corpus_progress(notify))
            ranks.gather(None)  # The corpus is there from here on.
            return _train(config, folder=folder, ranks=ranks, notify=notify, limit=stop_after_steps, sampler=sampler)


def _train(
    config: PretrainConfig,
    *,
    folder: Path,
    ranks: Alone,
    notify: EventCallback,
    limit: int | None,
    sampler: Sampler | None,
) -> PretrainResult:
    """Do what every rank does once the folder is held and the corpus is there."""
    set_threads(config.runtime.threads)
    choose_cpu_kernels(config.runtime.cpu_kernels)
    corpus = load_prepared(folder / "corpus")
    with _readable_errors(folder), _Run.open(config, folder=folder, corpus=corpus, ranks=ranks, notify=notify) as run:
        run.sampler = sampler
        with stop_on_signals() as stop:
            taken, stopping = 0, False
            while not run.finished and not stopping and taken != limit:
                run.step()
                taken += 1
                if run.is_time_to(config.evaluation.every_steps):
                    run.validate()
                if run.is_time_to(config.snapshot.every_steps):
                    run.save()
                run.watch.wind_up()
                # Signals do not reach all ranks in the same step, nor are their files written in the same one.
                wants_stop, unwritten = ranks.total([stop.requested, not run.is_written])
                stopping = wants_stop > 0
                if not unwritten:
                    run.finish_saving()
            if not run.is_saved:
                run.save()
            run.finish_saving()
        export = run.export() if run.finished else None
        return PretrainResult(
            folder=folder,
            step=run.state.step,
            tokens=run.state.tokens,
            finished=run.finished,
            interrupted=stopping and not run.finished,
            validation=run.validation,
            snapshot=run.snapshot,
            export=export,
        )


@dataclass(kw_only=True)
class _Run:
    """What the loop works with."""

    config: PretrainConfig
    folder: Path
    corpus: PreparedCorpus
    state: TrainState
    loader: RowLoader
    held_out: HeldOut | None
    log: MetricsLog
    notify: EventCallback
    total_steps: int
    watch: HangWatch
    spikes: SpikeFinder
    stragglers: StragglerFinder
    sampler: Sampler | None = None
    snapshot: Path | None = None
    saved_step: int = 0
    steps_taken: int = 0
    """By this call."""
    saving: Saving | None = None
    """The snapshot that is being written."""
    validation: ValidationResult | None = None

    @classmethod
    @contextmanager
    def open(
        cls, config: PretrainConfig, *, folder: Path, corpus: PreparedCorpus, ranks: Alone, notify: EventCallback
    ) -> Iterator["_Run"]:
        """Begin, or take up the newest snapshot."""
        newest = newest_snapshot(folder, ranks=ranks)
        state = new_state(config, ranks=ranks)
        if newest is not None:
            restore_state(state, path=newest, data=fingerprint(corpus))
        elif config.start_from:
            take_weights(state, folder=Path(config.start_from))
            get_logger(__name__).info("beginning with the weights of %s", config.start_from)
        length = config.batch.sequence_length
        loader = RowLoader(corpus, config=config, sequence_length=length, seed=config.runtime.seed)
        state.describe_rows = lambda rows: describe_rows(rows, loader=loader)
        held_out = read_held_out(corpus, max_tokens=config.evaluation.max_tokens, window=length)
        if held_out is None:
            get_logger(__name__).warning(
                "no document was held out, so there is no validation; raise data.held_out_rate in a new run to have one"
            )
        log = MetricsLog(folder, resumed_step=state.step) if ranks.rank == 0 else UnwrittenLog()
        watch = HangWatch(config.health, folder=folder, ranks=ranks)
        run = cls(
            config=config,
            folder=folder,
            corpus=corpus,
            state=state,
            loader=loader,
            held_out=held_out,
            log=log,
            notify=notify,
            total_steps=total_steps(config),
            snapshot=newest,
            saved_step=state.step,
            watch=watch,
            spikes=SpikeFinder(config.health),
            stragglers=StragglerFinder(config.health),
        )
        if newest is not None:
            get_logger(__name__).info("going on after step %d, from %s", state.step, newest)
            run.tell("resume", metrics={"path": str(newest)})
        watch.wind_up()
        try:
            yield run
        finally:
            watch.close()
            log.close()

    @property
    def finished(self) -> bool:
        return self.state.tokens >= self.config.total_tokens

    @property
    def is_saved(self) -> bool:
        """Whether the newest snapshot is of this very step; a run without any step has nothing to save."""
        return self.saved_step == self.state.step

    def is_time_to(self, every_steps: int) -> bool:
        """Whether something done every so many steps is due; everything is after the last step."""
        return self.state.step % every_steps == 0 or self.finished

    @property
    def is_written(self) -> bool:
        """Whether no file of a snapshot is still being written by this rank."""
        return self.saving is None or self.saving.is_written

    def step(self) -> None:
        """Read a batch and take one step on it."""
        ranks, first_row = self.state.ranks, self.state.tokens // self.config.batch.sequence_length
        waited, started = ranks.link.waited_seconds, time.perf_counter()
        ranks.trace.is_on = 1 <= self.steps_taken <= self.config.parallel.trace_steps
        batches = self.next_batches()
        try:
            metrics = train_step(self.state, batches=batches)
        except NonFiniteError as error:
            if self.config.health.on_non_finite == "stop":
                raise
            self._pass_over(batches, told=str(error))
            return
        seconds = time.perf_counter() - started
        own = seconds - (ranks.link.waited_seconds - waited)
        computed = [spent for (spent,) in ranks.gather_numbers([own])]
        self.steps_taken += 1
        self.tell("step", metrics=self.log.step(metrics, seconds=seconds, rank_seconds=computed))
        self._look_after(metrics, computed=computed, first_row=first_row)
        if ranks.trace.is_on and self.steps_taken > self.config.parallel.trace_steps:
            self._write_traces()

    def _pass_over(self, batches: list[TokenBatch], *, told: str) -> None:
        """Go on behind a step that cannot be taken."""
        state = self.state
        [tokens] = state.ranks.total_over_data([sum(batch.num_tokens for batch in batches)])
        state.step, state.tokens = state.step + 1, state.tokens + int(tokens)
        self._note("skipped", told=f"{told}; its rows are passed over (health.on_non_finite=skip)")

    def _look_after(self, metrics: StepMetrics, *, computed: list[float], first_row: int) -> None:
        """Write down what is not as it should be."""
        rows = range(first_row, first_row + metrics.batch_sequences)
        if (expected := self.spikes.add(metrics.loss)) is not None:
            told = (
                f"the loss is {metrics.loss:.4g} where {expected:.4g} was expected, in {self.state.describe_rows(rows)}"
            )
            self._note("spike", told=told)
        for rank in self.stragglers.add(computed):
            told = f"rank {rank} computes {computed[rank]:.3g} s a step, the median rank {median(computed):.3g} s"
            self._note("straggler", told=told)

    def _note(self, kind: str, *, told: str) -> None:
        self.log.incident(kind, step=self.state.step, told=told)
        if self.state.ranks.rank == 0:
            get_logger(__name__).warning("step %d: %s", self.state.step, told)

    def _write_traces(self) -> None:
        """Write when each rank did what in the traced steps."""
        ranks = self.state.ranks
        events = dict(enumerate(ranks.gather(ranks.trace.events)))
        if ranks.rank == 0:
            path = self.folder / "traces" / f"step-{self.state.step:06d}.json"
            path.parent.mkdir(exist_ok=True)
            write_trace(events, path=path)
            get_logger(__name__).info("when each rank did what is in %s: open it with ui.perfetto.dev", path)
        ranks.trace.events.clear()

    def next_batches(self) -> list[TokenBatch]:
        """Return this rank's micro-batches of the next step.

        Rows are read in order, so the tokens seen say which are next.
        """
        batch, state, ranks = self.config.batch, self.state, self.state.ranks
        at_once = batch.micro_batch_sequences * ranks.row_size
        start = state.tokens // batch.sequence_length
        end = start + batch_sequences(batch, tokens=state.tokens)
        rows = (
            self.loader.batch(first, count=min(at_once, end - first), rank=ranks.row_rank, world_size=ranks.row_size)
            for first in range(start, end, at_once)
        )
        return [ranks.share_rows(batch).to(state.model.device) for batch in rows]

    def validate(self) -> None:
        """Score the held-out text with the weights and with their average, and let the sampler speak."""
        state = self.state
        if self.held_out is not None:
            mtp = mtp_loss_weight(self.config.mtp, tokens=state.tokens) > 0
            self.validation = validate(state.model, held_out=self.held_out, mtp=mtp, ranks=state.ranks)
            averaged = None
            if state.average is not None:
                average = state.ranks.whole_rows(state.average.average, like=state.optimizer.parameters)
                with state.average.in_place_of(state.optimizer.parameters, average=average):
                    averaged = validate(state.model, held_out=self.held_out, mtp=False, ranks=state.ranks)
            record = self.log.validation(self.validation, step=state.step, tokens=state.tokens, average=averaged)
            self.tell("validation", metrics=record)
        if self.sampler is not None and state.ranks.size > 1:
            say_once("samples are made by runs of one rank only; dsv3 generate continues texts with a snapshot")
        elif self.sampler is not None:
            state.model.eval()
            for prompt in self.config.evaluation.sample_prompts:
                text = self.sampler(state.model, prompt)
                self.tell("sample", metrics=self.log.sample(step=state.step, prompt=prompt, text=text))

    def save(self) -> None:
        """Begin a snapshot, after the metrics that it is to find on the disk; wait for it unless training may go on."""
        self.finish_saving()
        self.log.force_to_disk()
        self.saving = write_state(self.state, folder=self.folder / "snapshots", data=fingerprint(self.corpus))
        self.saved_step = self.state.step
        if not self.config.snapshot.in_background:
            self.finish_saving()

    def finish_saving(self) -> None:
        """Wait for the snapshot that is being written, if there is one."""
        if self.saving is not None:
            saving, self.saving = self.saving, None
            self.snapshot = saving.finish()
            self.tell("snapshot", metrics={"path": str(self.snapshot)})

    def export(self) -> Path:
        """Write the finished model in the published format, unless an earlier call has."""
        folder = self.folder / "export"
        if self.state.ranks.rank == 0 and not (folder / "config.json").exists():
            assert self.snapshot is not None
            save_published(
                whole_model(self.state, path=self.snapshot),
                folder=folder,
                tokenizer_folder=self.corpus.tokenizer_folder,
                dtype=self.state.model.dtype,
            )
        self.state.ranks.gather(None)  # It is there for all of them.
        self.tell("export", metrics={"path": str(folder)})
        return folder

    def tell(self, kind: str, *, metrics: dict[str, object]) -> None:
        """Let the watcher know."""
        stage = "export" if kind == "export" else "train"
        self.notify(
            TrainEvent(stage=stage, kind=kind, step=self.state.step, total_steps=self.total_steps, metrics=metrics)
        )


def _require_shares(config: PretrainConfig, *, ranks: Alone) -> None:
    """Refuse batches whose rows do not divide over the ranks: all of them must do the same steps together."""
    batch, shares = config.batch, ranks.row_size
    grows = batch.start_sequences != batch.final_sequences
    wrong = [
        f"batch.{name} = {number}"
        for name in ("start_sequences", "final_sequences", *(["multiple_of"] if grows else []))
        if (number := getattr(batch, name)) % shares
    ]
    if wrong:
        nearest = -(-batch.multiple_of // shares) * shares
        raise ConfigError(
            f"the rows of a step do not divide over {shares} ranks that read different ones: {', '.join(wrong)}; use "
            f"multiples of {shares}, as in batch.multiple_of={nearest}, or another number of ranks"
        )
    at_once = batch.micro_batch_sequences * shares
    for rows in sorted(
        {*range(batch.start_sequences, batch.final_sequences, batch.multiple_of), batch.final_sequences}
    ):
        try:
            ranks.require_micro_batches(-(-rows // at_once))
        except ConfigError as error:
            raise ConfigError(
                f"a step of {rows} rows, {batch.micro_batch_sequences} to a micro-batch (batch.micro_batch_sequences), "
                f"on each of {shares} pipelines: {error}; change one of them, or parallel.schedule"
            ) from error


def describe_rows(rows: range, *, loader: RowLoader) -> str:
    """Name the documents that lie in rows of the training data, the first few of them."""
    pieces = [piece for row in rows for piece in loader.locate(row)]
    named = [f"{piece.document} of '{piece.source}' from token {piece.offset}" for piece in pieces[:NAMED_DOCUMENTS]]
    more = f" and {len(pieces) - NAMED_DOCUMENTS} more" if len(pieces) > NAMED_DOCUMENTS else ""
    return "; ".join(named) + more


@contextmanager
def _readable_errors(folder: Path) -> Iterator[None]:
    """Add to errors of training what the person needs: which snapshot is good, and what to do."""
    try:
        yield
    except NonFiniteError as error:
        good = latest_snapshot(folder / "snapshots")
        kept = f"the last good snapshot is {good}" if good else "there is no snapshot yet"
        raise NonFiniteError(
            f"{error}. No weight was changed by it; {kept}. Look at the text, or train again in a new run folder "
            "with a lower optim.learning_rate.peak"
        ) from error
    except OSError as error:
        where = f" ({error.filename})" if error.filename else ""
        raise TrainingError(
            f"the run in {folder} was stopped by its file system: {error.strerror or error}{where}; the snapshots that "
            "were complete are untouched. Make room or make the folder writable, then run the same command again"
        ) from error


def _corpus_progress(notify: EventCallback) -> Callable[[str, int, int], None]:
    def report(part: str, done: int, total: int) -> None:
        notify(TrainEvent(stage="corpus", kind="corpus", metrics={"part": part, "done": done, "total": total}))

    return report


def _ignore(event: TrainEvent) -> None:
    pass
