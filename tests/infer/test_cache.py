import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError
from dsv3.infer.cache import DenseLatentCache

SMALL = ModelConfig(vocab_size=64, num_hidden_layers=2, kv_lora_rank=4, qk_rope_head_dim=2)


def new_cache(*, num_sequences=1, capacity=8, config=SMALL, **more):
    return DenseLatentCache(
        config, num_sequences=num_sequences, capacity=capacity, dtype=torch.float32, device="cpu", **more
    )


def batch_at(*, firsts, lengths):
    positions = [torch.arange(first, first + length) for first, length in zip(firsts, lengths, strict=True)]
    return TokenBatch(
        tokens=torch.zeros(sum(lengths), dtype=torch.long),
        positions=torch.cat(positions),
        starts=torch.tensor([0, *lengths]).cumsum(0),
    )


def append(cache, batch, *, value, layers=range(2)):
    """Append entries whose every number is `value` + row."""
    entry = value + torch.arange(batch.num_tokens).float()
    for layer in layers:
        latent = (entry + 100 * layer)[:, None].expand(-1, 4)
        cache.append(latent, rope_key=-latent[:, :2], layer=layer, batch=batch)


def test_a_token_of_v3_takes_70272_bytes_in_bf16():
    # Report 3.2 / fact sheet 1.2: (512 + 64) * 61 elements of two bytes.
    cache = DenseLatentCache(ModelConfig(), num_sequences=1, capacity=1, dtype=torch.bfloat16, device="meta")
    assert cache.bytes_per_token == 70_272


def test_the_mtp_layer_adds_576_elements_a_token():
    with_mtp = DenseLatentCache(
        ModelConfig(), num_sequences=1, capacity=1, dtype=torch.bfloat16, device="meta", num_mtp_layers=1
    )
    assert with_mtp.bytes_per_token == 70_272 + 2 * 576


def test_rows_return_what_was_appended_at_each_layer_and_sequence():
    cache = new_cache(num_sequences=2)
    append(cache, batch_at(firsts=[0, 0], lengths=[2, 3]), value=10)
    append(cache, batch_at(firsts=[2, 3], lengths=[1, 1]), value=50)
    for layer in range(2):
        first, key = cache.rows(layer=layer, sequence=0, length=3)
        assert (first[:, 0] - 100 * layer).tolist() == [10, 11, 50]
        assert torch.equal(key, -first[:, :2])
        second, _ = cache.rows(layer=layer, sequence=1, length=4)
        assert (second[:, 3] - 100 * layer).tolist() == [12, 13, 14, 51]


def test_rows_are_views_and_not_copies():
    cache = new_cache()
    append(cache, batch_at(firsts=[0], lengths=[3]), value=1)
    one, _ = cache.rows(layer=0, sequence=0, length=3)
    other, _ = cache.rows(layer=0, sequence=0, length=2)
    assert one.data_ptr() == other.data_ptr()


def test_truncating_forgets_every_layer_of_one_sequence_only():
    cache = new_cache(num_sequences=2)
    append(cache, batch_at(firsts=[0, 0], lengths=[4, 4]), value=0)
    cache.truncate(0, length=1)
    assert (cache.length(0), cache.length(1)) == (1, 4)
    append(cache, batch_at(firsts=[1, 4], lengths=[1, 1]), value=70)
    assert cache.rows(layer=1, sequence=0, length=2)[0][:, 0].tolist() == [100, 170]
    with pytest.raises(AssertionError, match="3 rows asked"):
        cache.rows(layer=1, sequence=0, length=3)
    with pytest.raises(ConfigError, match="holds 2 tokens; it cannot be cut to 3"):
        cache.truncate(0, length=3)


def test_appending_at_a_held_position_replaces_it_and_forgets_the_rest():
    cache = new_cache()
    append(cache, batch_at(firsts=[0], lengths=[5]), value=0)
    append(cache, batch_at(firsts=[2], lengths=[1]), value=40)
    assert cache.length(0) == 3
    assert cache.rows(layer=0, sequence=0, length=3)[0][:, 0].tolist() == [0, 1, 40]


def test_a_sequence_without_tokens_in_a_batch_keeps_what_it_has():
    cache = new_cache(num_sequences=2)
    append(cache, batch_at(firsts=[0, 0], lengths=[2, 2]), value=0)
    append(cache, batch_at(firsts=[0, 2], lengths=[0, 2]), value=30)
    assert (cache.length(0), cache.length(1)) == (2, 4)


def test_a_token_beyond_the_capacity_is_refused_by_name_and_number():
    cache = new_cache(capacity=4)
    append(cache, batch_at(firsts=[0], lengths=[4]), value=0)
    with pytest.raises(ConfigError, match="sequence 0 would reach 5 tokens, and the cache was made for 4"):
        append(cache, batch_at(firsts=[4], lengths=[1]), value=0)


def test_more_sequences_than_the_cache_has_are_refused():
    with pytest.raises(ConfigError, match="2 sequences does not fit a cache of 1"):
        append(new_cache(), batch_at(firsts=[0, 0], lengths=[1, 1]), value=0)


def test_a_hole_between_cached_and_new_tokens_is_our_bug():
    cache = new_cache()
    append(cache, batch_at(firsts=[0], lengths=[2]), value=0)
    with pytest.raises(AssertionError, match="leaves a hole"):
        append(cache, batch_at(firsts=[3], lengths=[1]), value=0)


@pytest.mark.parametrize(("num_sequences", "capacity"), [(0, 1), (1, 0)])
def test_a_cache_of_nothing_is_refused(num_sequences, capacity):
    with pytest.raises(ConfigError, match="holds nothing"):
        new_cache(num_sequences=num_sequences, capacity=capacity)


def test_a_cache_for_more_mtp_layers_than_the_model_has_is_refused():
    with pytest.raises(ConfigError, match="2 MTP layers was asked of a model that has 1"):
        new_cache(num_mtp_layers=2)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=6))
def test_growing_past_the_first_reservation_keeps_every_row(turns):
    cache = new_cache(num_sequences=2, capacity=2000)
    expected = [[], []]
    for turn, lengths in enumerate(turns):
        batch = batch_at(firsts=[len(rows) for rows in expected], lengths=list(lengths))
        append(cache, batch, value=1000 * turn, layers=[0])
        expected[0] += [1000.0 * turn + row for row in range(lengths[0])]
        expected[1] += [1000.0 * turn + lengths[0] + row for row in range(lengths[1])]
    for sequence, rows in enumerate(expected):
        assert cache.rows(layer=0, sequence=sequence, length=len(rows))[0][:, 0].tolist() == rows


def test_a_cache_filled_in_inference_mode_can_be_used_outside_it():
    cache = new_cache(capacity=600)
    with torch.inference_mode():
        append(cache, batch_at(firsts=[0], lengths=[300]), value=0)
    append(cache, batch_at(firsts=[300], lengths=[1]), value=5)
    assert cache.rows(layer=0, sequence=0, length=301)[0][-1, 0] == 5
