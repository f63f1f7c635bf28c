from itertools import pairwise

import numpy as np
import pytest

from dsv3.data.shards import Shard, ShardWriter, shard_files, token_dtype
from dsv3.errors import DataError


def write(folder, documents, *, vocab_size=600, shard_tokens=1000):
    writer = ShardWriter(folder, vocab_size=vocab_size, shard_tokens=shard_tokens)
    for number, document in enumerate(documents):
        writer.add(document, name=f"document {number}\n#")
    writer.flush()
    return [Shard(file, vocab_size=vocab_size) for file in shard_files(folder)]


def read(shard):
    bounds = shard.offsets.tolist()
    return [shard.tokens[start:end].tolist() for start, end in pairwise(bounds)]


@pytest.mark.parametrize(("vocab_size", "dtype", "size"), [(65_536, "uint16", 2), (65_537, "uint32", 4)])
def test_ids_take_the_narrowest_type_that_holds_them(tmp_path, vocab_size, dtype, size):
    assert token_dtype(vocab_size) == dtype
    [shard] = write(tmp_path, [[0, vocab_size - 1]], vocab_size=vocab_size)
    assert shard.file.stat().st_size == 2 * size
    assert shard.tokens.tolist() == [0, vocab_size - 1]


def test_documents_come_back_from_several_shards(tmp_path):
    documents = [list(range(number % 7, 60 + number)) for number in range(40)]
    shards = write(tmp_path, documents, shard_tokens=500)
    assert len(shards) > 3
    assert [document for shard in shards for document in read(shard)] == documents
    assert shards[1].document_name(0).startswith("document ")


def test_names_come_back_with_their_line_breaks(tmp_path):
    [shard] = write(tmp_path, [[1], [2], [3]])
    assert [shard.document_name(number) for number in range(3)] == [f"document {number}\n#" for number in range(3)]


def test_a_name_that_is_not_there_is_an_error(tmp_path):
    [shard] = write(tmp_path, [[1], [2]])
    with pytest.raises(DataError, match=r"name of document 2 in .*names\.jsonl"):
        shard.document_name(2)
    shard.file.with_suffix(".names.jsonl").unlink()
    with pytest.raises(DataError, match="FileNotFoundError"):
        shard.document_name(0)


def test_writing_goes_on_after_whole_shards(tmp_path):
    documents = [[number] * 60 for number in range(40)]
    first = ShardWriter(tmp_path / "a", vocab_size=600, shard_tokens=500)
    (tmp_path / "a").mkdir()
    for document in documents[:21]:
        first.add(document, name="")
    second = ShardWriter(tmp_path / "a", vocab_size=600, shard_tokens=500)
    assert second.num_documents == 18  # Two shards of nine; the three documents not yet flushed are gone.
    for document in documents[second.num_documents :]:
        second.add(document, name="")
    second.flush()
    (tmp_path / "b").mkdir()
    expected = write(tmp_path / "b", documents, shard_tokens=500)
    shards = [Shard(file, vocab_size=600) for file in shard_files(tmp_path / "a")]
    assert [read(shard) for shard in shards] == [read(shard) for shard in expected]


def test_shards_are_mapped_not_read(tmp_path):
    [shard] = write(tmp_path, [[1, 2, 3]])
    assert isinstance(shard.tokens, np.memmap)
    assert isinstance(shard.offsets, np.memmap)


def test_nothing_written_leaves_no_shard(tmp_path):
    assert write(tmp_path, []) == []


def test_a_shard_cut_short_is_named(tmp_path):
    [shard] = write(tmp_path, [[1, 2, 3]])
    shard.file.write_bytes(shard.file.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-00000\.bin has 5 bytes, where 6 bytes are expected"):
        _ = shard.tokens


def test_a_missing_shard_is_named(tmp_path):
    [shard] = write(tmp_path, [[1, 2, 3]])
    shard.file.unlink()
    with pytest.raises(DataError, match=r"shard-00000\.bin is missing"):
        _ = shard.tokens


@pytest.mark.parametrize("content", [b"", b"garbage", np.array([1, 2]).tobytes()])
def test_a_damaged_index_is_named(tmp_path, content):
    [shard] = write(tmp_path, [[1, 2, 3]])
    shard.file.with_suffix(".offsets.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"cannot read .*offsets\.npy"):
        _ = shard.offsets


def test_a_pickle_is_not_loaded(tmp_path):
    [shard] = write(tmp_path, [[1, 2, 3]])
    np.save(shard.file.with_suffix(".offsets.npy"), np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"offsets\.npy"):
        _ = shard.offsets
