from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import IGNORE
from dsv3.config import DataConfig
from dsv3.data import loader as loader_module
from dsv3.data.loader import FILLER, RowLoader, count_rows, to_batch
from dsv3.data.shards import Shard, shard_files
from dsv3.errors import ConfigError, DataError


def open_rows(prepared_run, *, sequence_length=32, seed=0):
    prepared, config = prepared_run
    return RowLoader(prepared, config=config, sequence_length=sequence_length, seed=seed)


def all_rows_of(loader, source, *, count):
    """The first `count` rows drawn from one source, in order."""
    rows, index = [], 0
    while len(rows) < count:
        if loader.locate(index)[0].source == source:
            rows.append(loader.rows(index, count=1)[0])
        index += 1
    return torch.stack(rows)


def test_rows_have_one_token_more_than_the_sequence(prepared_run):
    rows = open_rows(prepared_run).rows(0, count=5)
    assert rows.shape == (5, 33)
    assert rows.dtype == torch.int64


@settings(max_examples=20)
@given(st.integers(0, 10**7), st.integers(1, 24), st.integers(1, 6))
def test_the_rows_of_all_ranks_together_are_those_of_one(prepared_run, start, count, world_size):
    loader = open_rows(prepared_run)
    alone = loader.rows(start, count=count)
    for rank in range(world_size):
        share = loader.rows(start, count=count, rank=rank, world_size=world_size)
        assert torch.equal(share, alone[rank::world_size])


@settings(max_examples=20)
@given(st.integers(0, 3000), st.integers(0, 30), st.integers(0, 30))
def test_a_resumed_loader_goes_on_where_the_first_stopped(prepared_run, start, before, after):
    uninterrupted = open_rows(prepared_run).rows(start, count=before + after)
    resumed = torch.cat(
        [
            open_rows(prepared_run).rows(start, count=before),
            open_rows(prepared_run).rows(start + before, count=after),
        ]
    )
    assert torch.equal(resumed, uninterrupted)


def test_rows_come_by_weight_over_every_block(prepared_run):
    loader = open_rows(prepared_run)
    drawn = Counter(loader.locate(row)[0].source for row in range(1024, 2048))
    assert drawn == {"rivers": 768, "hills": 256}  # Weights 3 and 1.


def test_an_epoch_holds_every_token_of_every_document_once(prepared_run):
    prepared, _ = prepared_run
    loader = open_rows(prepared_run)
    rows = all_rows_of(loader, "hills", count=loader.rows_per_epoch["hills"])
    [source] = [source for source in prepared.sources if source.name == "hills"]
    written = [
        np.asarray(Shard(file, vocab_size=prepared.vocab_size).tokens)
        for file in shard_files(prepared.source_folder(source))
    ]
    assert len(written) > 1
    expected = np.bincount(np.concatenate(written), minlength=prepared.vocab_size)
    found = np.bincount(rows[rows != FILLER].numpy(), minlength=prepared.vocab_size)
    assert (found == expected).all()
    assert found.sum() == source.tokens


def test_the_second_epoch_has_the_same_rows_in_another_order(prepared_run):
    loader = open_rows(prepared_run)
    count = loader.rows_per_epoch["hills"]
    rows = all_rows_of(loader, "hills", count=2 * count).tolist()
    assert sorted(rows[:count]) == sorted(rows[count:])
    assert rows[:count] != rows[count:]


def test_seeds_give_other_orders(prepared_run):
    first, second = (open_rows(prepared_run, seed=seed).rows(0, count=50) for seed in (0, 1))
    assert not torch.equal(first, second)


def test_documents_begin_with_bos_and_end_with_eos(prepared_run):
    prepared, _ = prepared_run
    for source in prepared.sources:
        documents = 0
        for file in shard_files(prepared.source_folder(source)):
            shard = Shard(file, vocab_size=prepared.vocab_size)
            documents += len(shard.offsets) - 1
            assert (shard.tokens[shard.offsets[:-1]] == 0).all()
            assert (shard.tokens[shard.offsets[1:] - 1] == 1).all()
        assert documents == source.documents


def test_location_names_what_lies_in_a_row(prepared_run):
    prepared, _ = prepared_run
    loader = open_rows(prepared_run)
    tokenizer = prepared.tokenizer()
    for index in range(0, 200, 7):
        row = loader.rows(index, count=1)[0]
        locations = loader.locate(index)
        assert sum(location.length for location in locations) == (row != FILLER).sum()
        filled = 0
        for location in locations:
            piece = row[filled : filled + location.length].tolist()
            assert (piece[0] == tokenizer.bos_id) == (location.offset == 0)
            filled += location.length
            number = int(location.document.split("#")[1]) - 1
            if location.offset == 0 and piece[1] != tokenizer.fim_begin_id:
                assert tokenizer.decode(piece[1:]).startswith(f"{location.source} {number}: "[: location.length - 2])


def test_places_without_a_token_read_padding_and_train_nothing():
    rows = torch.tensor([[0, 5, 6, 7, 1], [0, 8, 1, FILLER, FILLER]])
    batch = to_batch(rows, pad_id=2)
    assert batch.tokens.tolist() == [0, 5, 6, 7, 0, 8, 1, 2]
    assert batch.targets.tolist() == [5, 6, 7, 1, 8, 1, IGNORE, IGNORE]
    assert batch.positions.tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    assert batch.starts.tolist() == [0, 4, 8]


def test_a_batch_is_the_rows_with_padding(prepared_run):
    loader = open_rows(prepared_run)
    rows = loader.rows(40, count=9, rank=1, world_size=2)
    batch = loader.batch(40, count=9, rank=1, world_size=2)
    assert batch.tokens.tolist() == [2 if token == FILLER else token for token in rows[:, :-1].flatten().tolist()]
    assert batch.row_length == 32


def test_another_sequence_length_packs_anew_and_stays_whole(prepared_run):
    loader = open_rows(prepared_run, sequence_length=64)
    assert loader.rows(0, count=3).shape == (3, 65)
    assert loader.rows_per_epoch["rivers"] < open_rows(prepared_run).rows_per_epoch["rivers"]


def test_a_disk_that_cannot_be_written_is_only_a_missing_cache(prepared_run, monkeypatch):
    expected = open_rows(prepared_run, sequence_length=32).rows(0, count=20)

    def full(array, *, path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loader_module, "save_array", full)
    assert open_rows(prepared_run, sequence_length=48).rows(0, count=20).shape == (20, 49)
    assert torch.equal(open_rows(prepared_run, sequence_length=32).rows(0, count=20), expected)


def test_only_a_few_shards_are_open_at_a_time(prepared_run, monkeypatch):
    monkeypatch.setattr(loader_module, "MAX_OPEN_SHARDS", 1)
    expected = open_rows(prepared_run).rows(0, count=64)
    loader = open_rows(prepared_run)
    assert torch.equal(loader.rows(0, count=64), expected)
    assert all(len(rows._open) == 1 for rows in loader._rows)


def test_without_weights_sources_are_drawn_by_their_tokens(prepared_run):
    prepared, config = prepared_run
    plain = DataConfig(sources=tuple(replace(source, weight=0.0) for source in config.data.sources))
    loader = RowLoader(prepared, config=replace(config, data=plain), sequence_length=32, seed=0)
    drawn = Counter(loader.locate(row)[0].source for row in range(1024))
    tokens = {source.name: source.tokens for source in prepared.sources}
    assert drawn["rivers"] / 1024 == pytest.approx(tokens["rivers"] / sum(tokens.values()), abs=0.002)


def test_weights_for_some_sources_only_are_refused(prepared_run):
    prepared, config = prepared_run
    first, second = config.data.sources
    data = DataConfig(sources=(first, replace(second, weight=0.0)))
    with pytest.raises(ConfigError, match="gives hills no weight"):
        RowLoader(prepared, config=replace(config, data=data), sequence_length=32, seed=0)


def test_other_sources_than_the_corpus_has_are_refused(prepared_run):
    prepared, config = prepared_run
    data = DataConfig(sources=config.data.sources[:1])
    with pytest.raises(ConfigError, match=r"names rivers, but the corpus at .* was made from rivers, hills"):
        RowLoader(prepared, config=replace(config, data=data), sequence_length=32, seed=0)


def test_a_corpus_without_its_shards_is_an_error(prepared_run, tmp_path):
    prepared, config = prepared_run
    with pytest.raises(DataError, match="has no rows of 'rivers'"):
        RowLoader(replace(prepared, folder=tmp_path), config=config, sequence_length=32, seed=0)


def test_rows_of_one_document_come_first_in_every_epoch_where_that_is_asked_for(prepared_run):
    prepared, config = prepared_run
    config = replace(config, batch=replace(config.batch, long_documents_first=True))
    length = 24
    loader = RowLoader(prepared, config=config, sequence_length=length, seed=0)
    counts = count_rows(prepared, sequence_length=length)
    assert {name: found.rows for name, found in counts.items()} == loader.rows_per_epoch
    for name, found in counts.items():
        assert 0 < found.long < found.rows
        places = [row for row in range(8 * found.rows) if loader.locate(row)[0].source == name][: 2 * found.rows]
        filled = [loader.locate(row)[0].length == length + 1 for row in places]
        assert filled == 2 * ([True] * found.long + [False] * (found.rows - found.long))
    rows = all_rows_of(loader, "hills", count=loader.rows_per_epoch["hills"])
    usual = RowLoader(prepared, config=prepared_run[1], sequence_length=length, seed=0)
    assert sorted(rows.tolist()) == sorted(all_rows_of(usual, "hills", count=usual.rows_per_epoch["hills"]).tolist())
