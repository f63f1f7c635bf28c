"""The latent cache in pages against a plain list of entries for each sequence."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.infer.paged_cache import PagedLatentCache

CONFIG = ModelConfig(
    vocab_size=20,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    kv_lora_rank=5,
    qk_rope_head_dim=2,
    first_k_dense_replace=2,
    num_nextn_predict_layers=1,
)
LAYERS = 3  # the MTP module's is the last


def cache_of(*, num_pages, page_tokens, dtype=torch.float32):
    cache = PagedLatentCache(
        CONFIG, num_pages=num_pages, page_tokens=page_tokens, num_mtp_modules=1, dtype=dtype, device="cpu"
    )
    cache.storage.fill_(torch.nan)  # what has not been written must never be read
    return cache


def batch_of(bounds):
    """Pieces of sequences, each from one position to another."""
    return TokenBatch(
        tokens=torch.zeros(sum(end - first for first, end in bounds), dtype=torch.long),
        positions=torch.cat([torch.arange(first, end) for first, end in bounds]),
        starts=torch.tensor([0, *(end - first for first, end in bounds)]).cumsum(0),
        first_positions=tuple(first for first, _ in bounds),
    )


@given(
    page_tokens=st.integers(1, 7),
    steps=st.lists(st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any), min_size=1, max_size=5),
    chance=st.randoms(use_true_random=False),
)
def test_what_was_appended_is_read_back_in_order_of_position(page_tokens, steps, chance):
    """Three sequences grow by pieces of any length, over pages that lie anywhere."""
    pages_each = -(-25 // page_tokens)
    order = chance.sample(range(3 * pages_each), 3 * pages_each)
    tables = [order[index * pages_each : (index + 1) * pages_each] for index in range(3)]
    cache = cache_of(num_pages=3 * pages_each, page_tokens=page_tokens)
    written = [[torch.empty(0, 7) for _ in range(3)] for _ in range(LAYERS)]
    ends = [0, 0, 0]
    for step in steps:
        batch = batch_of([(end, end + count) for end, count in zip(ends, step, strict=True)])
        ends = [end + count for end, count in zip(ends, step, strict=True)]
        bound = cache.bound_to(tables, batch=batch)
        for layer in range(LAYERS):
            entries = torch.randn(batch.num_tokens, 7)
            bound.append(entries[:, :5], rope_key=entries[:, 5:], layer=layer, batch=batch)
            for sequence, part in enumerate(entries.split(step)):
                written[layer][sequence] = torch.cat([written[layer][sequence], part])
        for layer in range(LAYERS):
            for sequence in range(3):
                latent, rope = bound.rows(layer=layer, sequence=sequence, length=ends[sequence])
                assert torch.equal(torch.cat([latent, rope], dim=1), written[layer][sequence])


def test_an_entry_that_is_there_is_replaced_and_its_neighbours_stay():
    cache, table = cache_of(num_pages=3, page_tokens=2), [[2, 0, 1]]
    first = torch.randn(6, 7)
    whole = batch_of([(0, 6)])
    cache.bound_to(table, batch=whole).append(first[:, :5], rope_key=first[:, 5:], layer=1, batch=whole)
    again, part = torch.randn(2, 7), batch_of([(3, 5)])
    bound = cache.bound_to(table, batch=part)
    bound.append(again[:, :5], rope_key=again[:, 5:], layer=1, batch=part)
    latent, rope = bound.rows(layer=1, sequence=0, length=5)
    assert torch.equal(torch.cat([latent, rope], dim=1), torch.cat([first[:3], again]))
    assert cache.storage[0].isnan().all()  # other layers are untouched


def test_a_shared_page_is_read_by_both():
    cache, whole = cache_of(num_pages=3, page_tokens=2), batch_of([(0, 4)])
    entries = torch.randn(4, 7)
    cache.bound_to([[0, 1]], batch=whole).append(entries[:, :5], rope_key=entries[:, 5:], layer=0, batch=whole)
    other = batch_of([(2, 3)])
    bound = cache.bound_to([[0, 2]], batch=other)
    bound.append(torch.ones(1, 5), rope_key=torch.ones(1, 2), layer=0, batch=other)
    latent, _ = bound.rows(layer=0, sequence=0, length=3)
    assert torch.equal(latent, torch.cat([entries[:2, :5], torch.ones(1, 5)]))
    assert torch.equal(cache.storage[0, 2:4], entries[2:])


def test_a_module_lays_its_entries_at_the_positions_of_the_batch_that_looks_ahead():
    cache, batch = cache_of(num_pages=5, page_tokens=2), batch_of([(0, 4), (3, 5)])
    bound, entries = cache.bound_to([[4, 1], [0, 3, 2]], batch=batch), torch.randn(6, 7)
    bound.append(entries[:, :5], rope_key=entries[:, 5:], layer=1, batch=batch)
    bound.append(entries[:4, :5], rope_key=entries[:4, 5:], layer=2, batch=batch.ahead())
    latent, _ = bound.rows(layer=2, sequence=0, length=4)
    assert torch.equal(latent[:3], entries[:3, :5])
    assert latent[3].isnan().all()
    latent, _ = bound.rows(layer=2, sequence=1, length=5)
    assert torch.equal(latent[3], entries[3, :5])
    assert latent[4].isnan().all()


def test_entries_are_kept_in_the_type_of_the_cache():
    cache, batch = cache_of(num_pages=1, page_tokens=4, dtype=torch.bfloat16), batch_of([(0, 3)])
    bound, entries = cache.bound_to([[0]], batch=batch), torch.randn(3, 7)
    bound.append(entries[:, :5], rope_key=entries[:, 5:], layer=0, batch=batch)
    latent, _ = bound.rows(layer=0, sequence=0, length=3)
    assert torch.equal(latent, entries[:, :5].bfloat16())


def test_pages_that_do_not_reach_the_last_position_are_our_own_bug():
    with pytest.raises(AssertionError, match="2 pages of 4 tokens do not reach position 8"):
        cache_of(num_pages=4, page_tokens=4).bound_to([[0, 1]], batch=batch_of([(7, 9)]))


def test_v3_keeps_576_numbers_for_a_token_and_layer():
    config = ModelConfig(num_hidden_layers=4)
    cache = PagedLatentCache(config, num_pages=2, page_tokens=3, num_mtp_modules=1, dtype=torch.bfloat16, device="meta")
    assert cache.storage.shape == (5, 6, 576)
