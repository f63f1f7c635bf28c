"""From sources to a corpus the loader can read (report 4.1): read, tokenizer, encode, pack.

Each step leaves files that appear whole, so that an interrupted preparation goes on after the last source it
finished, and the marker that makes the folder a corpus is written last.
"""

import copy
import errno
import json
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from dsv3.config import PretrainConfig, RulesConfig, SourceConfig
from dsv3.data.corpus import named_sources
from dsv3.data.curation.plain import PlainRules, source_account
from dsv3.data.curation.plain_card import write_plain_card
from dsv3.data.document import Document
from dsv3.data.encoder import DocumentEncoder
from dsv3.data.hub import HUB
from dsv3.data.loader import check_weights, packed_rows
from dsv3.data.prepared import (
    FORMAT,
    HELD_OUT,
    MARKER,
    AbsentSource,
    PreparedCorpus,
    PreparedSource,
    load_prepared,
    save_prepared,
)
from dsv3.data.sample import SAMPLE_CHARACTERS, sample_texts
from dsv3.data.shards import Shard, ShardWriter, shard_files
from dsv3.data.sources import AbsentSourceError
from dsv3.data.spool import Spool, spool_source, spooled_source, training_documents
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import ConfigError, DataError, TokenizerError
from dsv3.runtime.atomic import write_json

__all__ = ["PreparedCorpus", "PreparedSource", "ProgressCallback", "load_prepared", "prepare_corpus"]

ProgressCallback = Callable[[str, int, int], None]
"""Called with the name of a step, how much of it is done, and how much there is (0 where nobody knows yet)."""

WORK = "work"
"""Folder below the corpus folder for what is only needed while preparing."""
MIN_ROWS = 4
"""A corpus with fewer rows cannot fill a batch worth training on."""


@dataclass(frozen=True, kw_only=True)
class _Part:
    """One source on its way through the steps."""

    source: SourceConfig
    folder: Path
    work: Path
    spool: Spool

    def documents(self) -> Iterator[Document]:
        return training_documents(self.work, spool=self.spool)


def prepare_corpus(config: PretrainConfig, *, folder: Path, progress: ProgressCallback | None = None) -> PreparedCorpus:
    """Return the corpus of a run, prepared in `folder`, or loaded from there when that has been done.

    A preparation that was interrupted goes on. A finished corpus is never rebuilt: weights trained on one
    vocabulary mean nothing with another.

    Raises:
        ConfigError: the folder holds a corpus made with other settings.
        DataError: a source cannot be read, there is too little text, or the folder cannot be written.
        TokenizerError: the configured tokenizer is missing or does not fit the model.
    """
    report = progress or _no_progress
    check_weights(config)
    settings = corpus_settings(config)
    curated = curated_source(config)
    if curated is not None and not (folder / MARKER).is_file():
        with _errors_of_the_disk(folder):
            return adopt(curated, config=config, folder=folder, settings=settings)
    if (folder / MARKER).is_file():
        corpus = load_prepared(folder)
        _check_same_settings(corpus, settings=settings, is_shared=bool(config.start_from))
        shutil.rmtree(folder / WORK, ignore_errors=True)  # Left by a kill in the last moment.
        return corpus
    with _errors_of_the_disk(folder):
        _start_or_continue(folder, settings=settings)
        rules = PlainRules(config.data.rules, folder=folder / WORK)
        parts, absent = _read_sources(config, folder=folder, rules=rules, report=report)
        tokenizer = _make_tokenizer(config, parts=parts, folder=folder, report=report)
        sources = _encode_sources(parts, config=config, tokenizer=tokenizer, report=report)
        corpus = PreparedCorpus(
            folder=folder, vocab_size=tokenizer.vocab_size, sources=sources, absent=absent, settings=settings
        )
        _pack_sources(corpus, config=config, report=report)
        accounts = [source_account(part.work) for part in parts]
        write_plain_card(corpus, accounts=accounts, not_applied=rules.not_applied)
        save_prepared(corpus)
        shutil.rmtree(folder / WORK)
    return corpus


def curated_source(config: PretrainConfig) -> Path | None:
    """Return the folder of `dsv3 data prepare` that is the run's corpus; None where its sources are text.

    Raises:
        ConfigError: such a folder stands among other sources.
    """
    folders = [Path(source.path).expanduser() for source in config.data.sources if "://" not in source.path]
    curated = [folder for folder in folders if (folder / MARKER).is_file()]
    if not curated:
        return None
    if len(config.data.sources) > 1:
        raise ConfigError(
            f"{curated[0]} is a corpus, and can only be the one source of a run; give its inputs and the others to "
            "dsv3 data prepare together"
        )
    return curated[0]


def adopt(curated: Path, *, config: PretrainConfig, folder: Path, settings: dict[str, Any]) -> PreparedCorpus:
    """Make a corpus of `dsv3 data prepare` the one of a run: its shards stay where they are.

    Raises:
        ConfigError: it was made with other settings than the run's.
        DataError: it cannot be read.
        TokenizerError: its tokenizer does not fit the model.
    """
    found = load_prepared(curated)
    made = found.settings.get("curation")
    if made is None:
        raise ConfigError(f"{curated} is a corpus of another run; start from that run's --config, or give its text")
    for name in ("fim_rate", "boundary_split_rate"):
        wanted, there = getattr(config.data, name), made["tokens"][name]
        if wanted != there:
            raise ConfigError(
                f"data.{name} = {wanted}, and the corpus at {curated} was made with {there}; set data.{name}={there}, "
                f"or prepare it again with tokens.{name}={wanted}"
            )
    if config.data.tokenizer:
        raise ConfigError(f"data.tokenizer is set, and the corpus at {curated} has its own; leave it empty")
    tokenizer = found.tokenizer()
    check_tokenizer(tokenizer, config=config)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(folder / "tokenizer")
    corpus = replace(
        found,
        folder=folder,
        sources=tuple(replace(source, folder=str(found.source_folder(source).resolve())) for source in found.sources),
        settings=settings,
    )
    _pack_sources(corpus, config=config, report=_no_progress)
    save_prepared(corpus)
    return corpus


def corpus_settings(config: PretrainConfig) -> dict[str, Any]:
    """Return the settings that decide what is in a corpus; a corpus made with others is another corpus."""
    settings = {
        "format": FORMAT,
        "data": asdict(config.data),
        "model.vocab_size": config.model.vocab_size,
        "runtime.seed": config.runtime.seed,
    }
    if any(source.path.startswith(HUB) for source in config.data.sources):
        settings["total_tokens"] = config.total_tokens  # Decides how much of a stream is read.
    return json.loads(json.dumps(settings))


def _check_same_settings(corpus: PreparedCorpus, *, settings: dict[str, Any], is_shared: bool) -> None:
    found, settings = copy.deepcopy(corpus.settings), copy.deepcopy(settings)
    found["data"].setdefault("rules", asdict(RulesConfig()) | {"evaluations": []})  # Of before there were any.
    for one in (found, settings):
        one["data"].pop("mixture", None)  # It says how rows are drawn, which another run may do otherwise.
        for source in one["data"]["sources"]:
            source.pop("weight", None)  # So does this.
        if is_shared:  # with a longer run, which has read as much of a stream as that one needed
            one.pop("total_tokens", None)
    if found == settings:
        return
    differences = "; ".join(_differences(found, settings, prefix=""))
    raise ConfigError(
        f"the corpus at {corpus.folder} was made with other settings ({differences}); use those, or another run "
        "folder, or remove the corpus folder to prepare it anew"
    )


def _differences(found: dict[str, Any], asked: dict[str, Any], *, prefix: str) -> Iterator[str]:
    for key in sorted({*found, *asked}):
        before, after = found.get(key), asked.get(key)
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, prefix=f"{prefix}{key}.")
        elif before != after:
            yield f"{prefix}{key}: {before} there, {after} asked"


def _start_or_continue(folder: Path, *, settings: dict[str, Any]) -> None:
    """Leave in the folder what an interrupted preparation with the same settings finished, and nothing else."""
    started = folder / WORK / "settings.json"
    try:
        same = json.loads(started.read_text(encoding="utf-8")) == settings
    except (OSError, ValueError):
        same = False
    if not same:
        for part in ("sources", "tokenizer", WORK):
            shutil.rmtree(folder / part, ignore_errors=True)
        (folder / WORK).mkdir(parents=True)
        write_json(settings, path=started)


def _read_sources(
    config: PretrainConfig, *, folder: Path, rules: PlainRules, report: ProgressCallback
) -> tuple[list[_Part], tuple[AbsentSource, ...]]:
    """Read every source to disk; earlier ones win when two hold the same text."""
    parts: list[_Part] = []
    absent: list[AbsentSource] = []
    seen: set[int] = set()
    bytes_before = 0
    for number, source in enumerate(named_sources(config.data)):
        label = f"{number:02d}-{re.sub(r'[^A-Za-z0-9._-]+', '-', source.name)[:60]}"
        place, work = folder / "sources" / label, folder / WORK / label
        place.mkdir(parents=True, exist_ok=True)
        spool = spooled_source(work, held_out_file=place / HELD_OUT, seen=seen, rules=rules)
        if spool is None:
            try:
                spool = spool_source(
                    source,
                    config=config,
                    folder=work,
                    held_out_file=place / HELD_OUT,
                    seen=seen,
                    rules=rules,
                    on_bytes=partial(_report_after, report, "read", bytes_before, 0),
                )
            except AbsentSourceError as reason:
                _leave_out(source, reason=str(reason), config=config, absent=absent)
                shutil.rmtree(place)
                continue
        bytes_before += spool.bytes
        parts.append(_Part(source=source, folder=place, work=work, spool=spool))
    if not parts:
        reasons = "; ".join(f"{source.name}: {source.reason}" for source in absent)
        raise DataError(f"no source of the built-in corpus is there ({reasons}); give your own text with --data PATH")
    report("read", bytes_before, bytes_before)
    return parts, tuple(absent)


def _leave_out(source: SourceConfig, *, reason: str, config: PretrainConfig, absent: list[AbsentSource]) -> None:
    """Note a built-in source that is not there; one that was asked for by name is missed, not left out."""
    if config.data.sources:
        raise DataError(f"cannot read {source.path}: {reason}")
    absent.append(AbsentSource(name=source.name, reason=reason))


def _make_tokenizer(config: PretrainConfig, *, parts: list[_Part], folder: Path, report: ProgressCallback) -> Tokenizer:
    """Load the configured tokenizer, or train one on a sample of the training documents, and save it."""
    place = folder / "tokenizer"
    report("tokenizer", 0, 1)
    if (place / "tokenizer_config.json").is_file():  # The second of the two files: both are whole.
        tokenizer = Tokenizer.from_file(place)
    elif config.data.tokenizer:
        tokenizer = Tokenizer.from_file(Path(config.data.tokenizer).expanduser())
    else:
        weights = [part.source.weight or part.spool.bytes for part in parts]
        texts = [
            text
            for part, weight in zip(parts, weights, strict=True)
            for text in sample_texts(
                part.documents(),
                characters=int(SAMPLE_CHARACTERS * weight / sum(weights)),
                seed=config.runtime.seed,
            )
        ]
        tokenizer = Tokenizer.train(texts, vocab_size=config.model.vocab_size)
    check_tokenizer(tokenizer, config=config)
    tokenizer.save(place)
    report("tokenizer", 1, 1)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, *, config: PretrainConfig) -> None:
    """Raise TokenizerError unless every id has a row in the model, both agree on BOS and EOS, and none is missing."""
    where = f"the tokenizer at {config.data.tokenizer}" if config.data.tokenizer else "the tokenizer"
    if tokenizer.vocab_size > config.model.vocab_size:
        raise TokenizerError(
            f"{where} uses {tokenizer.vocab_size:,} ids, more than model.vocab_size = {config.model.vocab_size:,}; "
            "raise model.vocab_size, or leave data.tokenizer empty to train one that fits"
        )
    if config.data.fim_rate:
        _ = tokenizer.fim_begin_id, tokenizer.fim_hole_id, tokenizer.fim_end_id
    _ = tokenizer.pad_id
    for name, found, expected in (
        ("bos_token_id", tokenizer.bos_id, config.model.bos_token_id),
        ("eos_token_id", tokenizer.eos_id, config.model.eos_token_id),
    ):
        if found != expected:
            raise TokenizerError(
                f"{where} has {name} {found}, and model.{name} is {expected}; set model.{name}={found}"
            )


def _encode_sources(
    parts: list[_Part], *, config: PretrainConfig, tokenizer: Tokenizer, report: ProgressCallback
) -> tuple[PreparedSource, ...]:
    """Write the token shards of every source."""
    total = sum(part.spool.documents for part in parts)
    encoder = DocumentEncoder(tokenizer, config=config.data, seed=config.runtime.seed)
    sources: list[PreparedSource] = []
    for part in parts:
        done = sum(source.documents for source in sources)
        _write_shards(
            part,
            encoder=encoder,
            shard_tokens=config.data.shard_tokens,
            on_document=partial(_report_after, report, "encode", done, total),
        )
        shards = [Shard(file, vocab_size=tokenizer.vocab_size) for file in shard_files(part.folder)]
        sources.append(
            PreparedSource(
                name=part.source.name,
                path=part.source.path,
                folder=f"sources/{part.folder.name}",
                documents=part.spool.documents,
                bytes=part.spool.bytes,
                held_out_documents=part.spool.held_out_documents,
                held_out_bytes=part.spool.held_out_bytes,
                duplicates=part.spool.duplicates,
                skipped=part.spool.skipped,
                changed=part.spool.changed,
                tokens=sum(int(shard.offsets[-1]) for shard in shards),
                fim_documents=sum(
                    _fim_documents(shard, tokenizer=tokenizer, rate=config.data.fim_rate) for shard in shards
                ),
            )
        )
    report("encode", total, total)
    return tuple(sources)


def _write_shards(
    part: _Part, *, encoder: DocumentEncoder, shard_tokens: int, on_document: Callable[[int], None]
) -> None:
    """Encode one source; what an interrupted preparation finished of it, shard by shard, is not done again."""
    writer = ShardWriter(part.folder, vocab_size=encoder.tokenizer.vocab_size, shard_tokens=shard_tokens)
    remaining = islice(part.documents(), writer.num_documents, None)
    for document in encoder.encode(remaining, source=part.source.name):
        writer.add(document.ids, name=document.name)
        on_document(writer.num_documents)
    writer.flush()


def _fim_documents(shard: Shard, *, tokenizer: Tokenizer, rate: float) -> int:
    """Count the documents that begin with the FIM mark after their BOS."""
    if not rate:  # A tokenizer without the mark will do then.
        return 0
    return int((shard.tokens[shard.offsets[:-1] + 1] == tokenizer.fim_begin_id).sum())


def _pack_sources(corpus: PreparedCorpus, *, config: PretrainConfig, report: ProgressCallback) -> None:
    """Pack every shard for the run's sequence length, and make sure that there is something to train on."""
    files = [file for source in corpus.sources for file in shard_files(corpus.source_folder(source))]
    rows = 0
    for done, file in enumerate(files):
        report("pack", done, len(files))
        rows += packed_rows(Shard(file, vocab_size=corpus.vocab_size), config.batch.sequence_length).num_rows
    report("pack", len(files), len(files))
    if rows < MIN_ROWS:
        shutil.rmtree(
            corpus.folder / WORK, ignore_errors=True
        )  # More text may come under the same paths: read them again then.
        tokens = sum(source.tokens for source in corpus.sources)
        raise DataError(
            f"the corpus has {tokens:,} tokens, which fill {rows} rows of batch.sequence_length = "
            f"{config.batch.sequence_length}; at least {MIN_ROWS} are needed: give more text, or shorten the sequences"
        )


@contextmanager
def _errors_of_the_disk(folder: Path) -> Iterator[None]:
    """Say what to do about a disk that is full or may not be written to."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            advice = "the disk is full: free some space and run the same command again, it goes on where it stopped"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            advice = "it may not be written to: choose another run folder, or change its permissions"
        else:
            advice = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot prepare the corpus in {folder}; {advice}") from error


def _report_after(report: ProgressCallback, step: str, before: int, total: int, done: int) -> None:
    report(step, before + done, total)


def _no_progress(step: str, done: int, total: int) -> None:
    """Show nothing."""
