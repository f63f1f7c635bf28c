"""Cached decoding equals the full forward, in every way of cutting the work up (design.md section 8)."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.config import EngineConfig, ModelConfig, YarnConfig
from dsv3.infer.engine import Engine
from dsv3.infer.paged_cache import PagedLatentCache
from dsv3.infer.params import SamplingParams
from dsv3.infer.runner import TorchRunner
from dsv3.infer.stream import TokenStreams
from dsv3.model.transformer import Transformer
from dsv3.ops.rope import rotate

VOCAB = 96
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5}


def small_config(**changes):
    values = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "initializer_range": 0.2,  # large, so that attention and routing are far from uniform
        "max_position_embeddings": 256,
        "num_attention_heads": 3,
        "q_lora_rank": 12,
        "kv_lora_rank": 16,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "rope_scaling": YarnConfig(factor=8.0, original_max_position_embeddings=32),
        "intermediate_size": 48,
        "moe_intermediate_size": 16,
        "first_k_dense_replace": 1,
        "n_routed_experts": 8,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "num_nextn_predict_layers": 1,
    }
    return ModelConfig(**(values | changes))


CONFIGS = {
    "v3 with yarn": small_config(),
    "v3 without yarn": small_config(rope_scaling=None),
    "v2, direct query": small_config(
        q_lora_rank=None, scoring_func="softmax", topk_method="group_limited_greedy", norm_topk_prob=False
    ),
}


def new_model(config, *, dtype):
    model = Transformer(config).to(dtype)
    model.init_weights(generator=torch.Generator().manual_seed(7))
    bias = torch.Generator().manual_seed(8)
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(0.0, 0.1, generator=bias)
    return model.requires_grad_(False)


PAGE_TOKENS = 8
PAGES = 32
"""Of each sequence: 256 tokens, in pages that lie apart."""


class Cache:
    """A paged cache in which sequence i of every batch has pages i, i + n, i + 2n, ..."""

    def __init__(self, model, *, num_sequences=1, num_mtp_layers=0):
        self.num_sequences = num_sequences
        self.paged = PagedLatentCache(
            model.config,
            num_pages=PAGES * num_sequences,
            page_tokens=PAGE_TOKENS,
            num_mtp_modules=num_mtp_layers,
            dtype=model.embed_tokens.weight.dtype,
            device="cpu",
        )

    def of(self, batch):
        pages = [range(place, PAGES * self.num_sequences, self.num_sequences) for place in range(len(batch.lengths))]
        return self.paged.bound_to([list(table) for table in pages], batch=batch)


def run(model, batch, cache, **options):
    return model(batch, cache=cache.of(batch), **options)


def random_ids(count, *, seed=0):
    return torch.randint(0, VOCAB, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def batch_of(sequences, *, firsts):
    positions = [torch.arange(first, first + len(ids)) for ids, first in zip(sequences, firsts, strict=True)]
    return TokenBatch(
        tokens=torch.tensor([token for ids in sequences for token in ids], dtype=torch.long),
        positions=torch.cat(positions),
        starts=torch.tensor([0] + [len(ids) for ids in sequences]).cumsum(0),
    )


def full_logits(model, ids):
    return model.logits(model(TokenBatch.from_sequences([ids])).hidden)


def cached_logits(model, ids, *, chunks):
    """Logits of every token when `ids` is fed in `chunks`, each over what the cache holds."""
    cache, done, logits = Cache(model), 0, []
    for size in chunks:
        part = ids[done : done + size]
        if part:
            output = run(model, batch_of([part], firsts=[done]), cache)
            logits.append(model.logits(output.hidden))
        done += len(part)
    return torch.cat(logits)


def assert_close(actual, expected):
    tolerance = TOLERANCE[torch.float64 if expected.dtype == torch.float64 else torch.float32]
    scale = expected.abs().max().item()
    assert (actual - expected).abs().max().item() <= tolerance * max(scale, 1.0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_decoding_one_token_at_a_time_equals_the_full_forward(name, dtype):
    model, ids = new_model(CONFIGS[name], dtype=dtype), random_ids(40)
    assert_close(cached_logits(model, ids, chunks=[9] + [1] * 31), full_logits(model, ids))


@pytest.mark.parametrize("name", CONFIGS)
def test_absorbed_attention_over_the_cache_equals_expanded_attention(name):
    model, ids = new_model(CONFIGS[name], dtype=torch.float64), random_ids(30)
    attention = model.layers[1].self_attn
    batch, cache = TokenBatch.from_sequences([ids]), Cache(model)
    hidden = torch.randn(len(ids), 32, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    rotation = model._rotation(batch)
    before_query, before_latent, rope_key = attention.compress(hidden)
    query = attention.queries(before_query)
    latent = attention.kv_a_layernorm(before_latent)
    cache = cache.of(batch)
    cache.append(latent, rope_key=rotate(rope_key[:, None], rotation=rotation)[:, 0], layer=1, batch=batch)
    expanded = attention.attend_expanded(
        query, key_value=attention.keys_and_values(latent), rope_key=rope_key, batch=batch, rotation=rotation
    )
    absorbed = attention.attend_cached(query, batch=batch, rotation=rotation, cache=cache)
    assert_close(absorbed, expanded)


@settings(max_examples=12, deadline=None)
@given(chunks=st.lists(st.integers(1, 15), min_size=1, max_size=6))
def test_a_prompt_read_in_chunks_equals_one_read_whole(chunks):
    model, ids = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64), random_ids(sum(chunks), seed=len(chunks))
    assert_close(cached_logits(model, ids, chunks=chunks), full_logits(model, ids))


def test_sequences_of_different_lengths_in_one_batch_equal_each_alone():
    model = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64)
    texts = [random_ids(count, seed=count) for count in (17, 5, 11)]
    prompts = [9, 1, 4]
    cache = Cache(model, num_sequences=3)
    batch = batch_of([ids[:n] for ids, n in zip(texts, prompts, strict=True)], firsts=[0, 0, 0])
    pieces = [list(model.logits(run(model, batch, cache).hidden).split(prompts))]
    for step in range(8):  # The shorter texts end first, and then have no token in the batch.
        places = [n + step for n in prompts]
        parts = [ids[place : place + 1] for ids, place in zip(texts, places, strict=True)]
        output = run(model, batch_of(parts, firsts=places), cache)
        pieces.append(list(model.logits(output.hidden).split([len(part) for part in parts])))
    for sequence, ids in enumerate(texts):
        together = torch.cat([piece[sequence] for piece in pieces])
        assert_close(together, full_logits(model, ids))


def test_a_new_prompt_may_join_a_batch_that_is_decoding():
    model = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64)
    old, new = random_ids(12, seed=1), random_ids(7, seed=2)
    cache = Cache(model, num_sequences=2)
    run(model, batch_of([old[:11], []], firsts=[0, 0]), cache)
    logits = model.logits(run(model, batch_of([old[11:], new], firsts=[11, 0]), cache).hidden)
    assert_close(logits[:1], full_logits(model, old)[-1:])
    assert_close(logits[1:], full_logits(model, new))


def test_rejected_drafts_leave_no_trace():
    model, ids = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64), random_ids(24)
    cache = Cache(model)
    run(model, batch_of([ids[:20]], firsts=[0]), cache)
    run(model, batch_of([random_ids(3, seed=9)], firsts=[20]), cache)
    output = run(model, batch_of([ids[20:]], firsts=[20]), cache)
    assert_close(model.logits(output.hidden), full_logits(model, ids)[20:])


def test_the_mtp_layer_decodes_over_its_own_cache_as_it_reads_whole_rows():
    model, ids = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64), random_ids(20)
    whole = model(TokenBatch.from_sequences([ids]), mtp=True)
    cache = Cache(model, num_mtp_layers=1)
    output = run(model, batch_of([ids[:12]], firsts=[0]), cache, mtp=True)
    states, predicted = [output.hidden[-1:]], [output.mtp[0].hidden]
    for place in range(12, 20):
        # The module reads the state of place - 1 and the token after it, at the position of that state.
        ahead = batch_of([[ids[place]]], firsts=[place - 1])
        result, _ = model.predict_ahead(states[-1], depth=0, batch=ahead, cache=cache.of(ahead))
        predicted.append(result.hidden)
        states.append(run(model, batch_of([[ids[place]]], firsts=[place]), cache).hidden)
    assert_close(torch.cat(predicted), whole.mtp[0].hidden)


def generated(model, prompt, *, streams=None, **params):
    return list((streams or new_streams(model)).start(prompt, params=SamplingParams(**params)))


def new_streams(model):
    config = EngineConfig(page_tokens=4, num_pages=64)
    return TokenStreams(Engine(TorchRunner(model), config=config, vocab_size=VOCAB, eos_id=VOCAB))  # never drawn


def test_greedy_generation_picks_the_likeliest_token_of_the_full_forward():
    model, prompt = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64), random_ids(10)
    answer = generated(model, prompt, temperature=0.0, max_tokens=30)
    likeliest = full_logits(model, prompt + answer)[9:-1].argmax(-1)
    assert answer == likeliest.tolist()


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others():
    model, prompt = new_model(CONFIGS["v3 with yarn"], dtype=torch.float32), random_ids(10)
    first, again, other = (generated(model, prompt, seed=seed, temperature=1.0, max_tokens=24) for seed in (4, 4, 5))
    assert first == again
    assert first != other


def test_a_second_turn_over_the_kept_cache_equals_a_fresh_start():
    model, prompt = new_model(CONFIGS["v3 with yarn"], dtype=torch.float64), random_ids(10)
    streams = new_streams(model)
    first = generated(model, prompt, streams=streams, temperature=0.0, max_tokens=6)
    longer = prompt + first + random_ids(5, seed=3)
    other = prompt[:4] + random_ids(5, seed=4)
    for ids in (longer, other, longer):  # goes on, goes back, goes on again
        kept = generated(model, ids, streams=streams, temperature=0.0, max_tokens=6)
        assert kept == generated(model, ids, temperature=0.0, max_tokens=6)
    assert streams.engine.stats().num_cached_tokens == 12 + 4 + 20
