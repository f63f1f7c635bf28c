"""Pre-training from text to a finished model, in one function that may be stopped and called again.

corpus -> newest snapshot -> steps, validations, snapshots -> export
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from dsv3.batch import TokenBatch
from dsv3.checkpoint.published import save_published
from dsv3.checkpoint.snapshot import latest_snapshot
from dsv3.config import PretrainConfig
from dsv3.data.loader import RowLoader
from dsv3.data.prepare import prepare_corpus
from dsv3.data.prepared import PreparedCorpus, load_prepared
from dsv3.errors import ConfigError, NonFiniteError, TrainingError
from dsv3.model.transformer import Transformer
from dsv3.native import choose_cpu_kernels
from dsv3.parallel.launch import open_ranks
from dsv3.parallel.ranks import Alone
from dsv3.runtime.device import choose_device, set_threads
from dsv3.runtime.log import get_logger, say_once
from dsv3.train.event import EventCallback, TrainEvent
from dsv3.train.metrics import MetricsLog, UnwrittenLog
from dsv3.train.resume import new_state, restore_state, whole_model, write_state
from dsv3.train.run_folder import open_run_folder
from dsv3.train.schedule import batch_sequences, mtp_loss_weight, total_steps
from dsv3.train.step import TrainState, train_step
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
    with open_ranks(config.parallel, num_experts=config.model.n_routed_experts) as ranks:
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
                stopping = sum(ranks.total([stop.requested])) > 0  # Signals do not reach all ranks in the same step.
            if not run.is_saved:
                run.save()
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
    sampler: Sampler | None = None
    snapshot: Path | None = None
    saved_step: int = 0
    validation: ValidationResult | None = None

    @classmethod
    @contextmanager
    def open(
        cls, config: PretrainConfig, *, folder: Path, corpus: PreparedCorpus, ranks: Alone, notify: EventCallback
    ) -> Iterator["_Run"]:
        """Begin, or take up the newest snapshot."""
        newest = ranks.gather(latest_snapshot(folder / "snapshots") if ranks.rank == 0 else None)[0]
        state = new_state(config, ranks=ranks)
        if newest is not None:
            restore_state(state, path=newest, corpus=corpus)
        length = config.batch.sequence_length
        loader = RowLoader(corpus, config=config, sequence_length=length, seed=config.runtime.seed)
        state.describe_rows = lambda rows: describe_rows(rows, loader=loader)
        held_out = read_held_out(corpus, max_tokens=config.evaluation.max_tokens, window=length)
        if held_out is None:
            get_logger(__name__).warning(
                "no document was held out, so there is no validation; raise data.held_out_rate in a new run to have one"
            )
        log = MetricsLog(folder, resumed_step=state.step) if ranks.rank == 0 else UnwrittenLog()
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
        )
        if newest is not None:
            get_logger(__name__).info("going on after step %d, from %s", state.step, newest)
            run.tell("resume", metrics={"path": str(newest)})
        try:
            yield run
        finally:
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

    def step(self) -> None:
        """Read a batch and take one step on it."""
        started = time.perf_counter()
        metrics = train_step(self.state, batches=self.next_batches())
        self.tell("step", metrics=self.log.step(metrics, seconds=time.perf_counter() - started))

    def next_batches(self) -> list[TokenBatch]:
        """Return this rank's micro-batches of the next step.

        Rows are read in order, so the tokens seen say which are next.
        """
        batch, state, ranks = self.config.batch, self.state, self.state.ranks
        at_once = batch.micro_batch_sequences * ranks.size
        start = state.tokens // batch.sequence_length
        end = start + batch_sequences(batch, tokens=state.tokens)
        device = state.model.lm_head.weight.device
        return [
            self.loader.batch(first, count=min(at_once, end - first), rank=ranks.rank, world_size=ranks.size).to(device)
            for first in range(start, end, at_once)
        ]

    def validate(self) -> None:
        """Score the held-out text with the weights and with their average, and let the sampler speak."""
        state = self.state
        if self.held_out is not None:
            mtp = mtp_loss_weight(self.config.mtp, tokens=state.tokens) > 0
            through = state.ranks.dispatch
            self.validation = validate(state.model, held_out=self.held_out, mtp=mtp, dispatch=through)
            averaged = None
            if state.average is not None:
                with state.average.in_place_of(state.optimizer.parameters):
                    averaged = validate(state.model, held_out=self.held_out, mtp=False, dispatch=through)
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
        """Write a snapshot, after the metrics that it is to find on the disk."""
        self.log.force_to_disk()
        self.snapshot = write_state(self.state, folder=self.folder / "snapshots", corpus=self.corpus)
        self.saved_step = self.state.step
        self.tell("snapshot", metrics={"path": str(self.snapshot)})

    def export(self) -> Path:
        """Write the finished model in the published format, unless an earlier call has."""
        folder = self.folder / "export"
        model = whole_model(self.state)
        if model is not None and not (folder / "config.json").exists():
            save_published(
                model,
                folder=folder,
                tokenizer_folder=self.corpus.tokenizer_folder,
                dtype=model.lm_head.weight.dtype,
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
    """Refuse batches whose rows do not divide over the ranks: all of them must do the same steps together.

    And GPUs, which ranks do not know how to divide among themselves, nor how to talk between.
    """
    if ranks.size > 1 and choose_device(config.runtime.device).type != "cpu":
        raise ConfigError(f"{ranks.size} ranks train on CPUs only so far; set runtime.device=cpu, or use one rank")
    grows = config.batch.start_sequences != config.batch.final_sequences
    wrong = [
        f"batch.{name} = {number}"
        for name in ("start_sequences", "final_sequences", *(["multiple_of"] if grows else []))
        if (number := getattr(config.batch, name)) % ranks.size
    ]
    if wrong:
        nearest = -(-config.batch.multiple_of // ranks.size) * ranks.size
        raise ConfigError(
            f"the rows of a step do not divide over {ranks.size} ranks: {', '.join(wrong)}; use multiples of "
            f"{ranks.size}, as in batch.multiple_of={nearest}, or another number of ranks"
        )


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
