"""The pass in C++ against the model that trains, and the promise that company does not matter, bit for bit."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import assemble
from dsv3.checkpoint.writer import FP8
from dsv3.config import ModelConfig, YarnConfig
from dsv3.errors import ConfigError
from dsv3.fp8.formats import is_fp8
from dsv3.fp8.quantise import BLOCKS, quantise
from dsv3.infer.packed_model import pack_from_state, pack_model
from dsv3.infer.packed_runner import PackedRunner
from dsv3.infer.packed_weights import FORMATS, PackedMatrix, Storage
from dsv3.infer.runner import Runner
from dsv3.model.transformer import Transformer
from dsv3.native import engine
from dsv3.runtime.compiler import FLAGS


@pytest.fixture(autouse=True)
def compiled(our_kernels):
    """All of this needs a compiler."""


V3 = ModelConfig(
    vocab_size=120,
    hidden_size=72,
    num_hidden_layers=3,
    max_position_embeddings=512,
    num_attention_heads=6,
    q_lora_rank=40,
    kv_lora_rank=24,
    qk_nope_head_dim=20,
    qk_rope_head_dim=12,
    v_head_dim=28,
    intermediate_size=100,
    moe_intermediate_size=36,
    first_k_dense_replace=1,
    n_routed_experts=16,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    initializer_range=0.1,
)
VARIANTS = {
    "v3": V3,
    "two_mtp_modules": replace(V3, num_nextn_predict_layers=2),
    "no_query_compression": replace(V3, q_lora_rank=None),
    "v2_lite": replace(
        V3,
        q_lora_rank=None,
        topk_method="greedy",
        scoring_func="softmax",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
    "v2": replace(V3, topk_method="group_limited_greedy", scoring_func="softmax", norm_topk_prob=False),
    "yarn": replace(
        V3, rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=64, mscale=1.0, mscale_all_dim=1.0)
    ),
    "no_shared_expert": replace(V3, n_shared_experts=0),
    "two_shared_experts": replace(V3, n_shared_experts=2),
    "dense_only": replace(V3, first_k_dense_replace=3, num_nextn_predict_layers=0),
    "one_group": replace(V3, n_group=1, topk_group=1),
    "one_head": replace(V3, num_attention_heads=1),
    "whole_vectors": replace(
        V3, hidden_size=128, q_lora_rank=64, kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=32
    ),
    "hidden_first": replace(V3, mtp_concat_order="hidden_first"),
    "pre_norm": replace(V3, mtp_hidden_source="pre_norm"),
}


def model_of(config):
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    for router in model.routers():
        if router.e_score_correction_bias is not None:
            router.e_score_correction_bias.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(1))
    return model.requires_grad_(False)


def runner_of(model, weights="fp32", *, num_pages=40, page_tokens=8):
    packed = pack_from_state(
        model.state_dict(), config=model.config, layout=published_layout(model.config), name=weights
    )
    runner = PackedRunner(packed)
    runner.make_pages(num_pages=num_pages, page_tokens=page_tokens)
    return runner


def tokens_of(count, *, config=V3, seed=1):
    return torch.randint(0, config.vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def piece(ids, *, first, end):
    """Tokens `first` to `end` of one sequence, of which the ones before are in the cache."""
    return TokenBatch(
        tokens=torch.tensor(ids[first:end]), positions=torch.arange(first, end), starts=torch.tensor([0, end - first])
    )


def joined(*batches):
    return TokenBatch(
        tokens=torch.cat([batch.tokens for batch in batches]),
        positions=torch.cat([batch.positions for batch in batches]),
        starts=torch.tensor([0, *(batch.num_tokens for batch in batches)]).cumsum(0),
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_states_and_logits_are_those_of_the_model_that_trains(name):
    config = VARIANTS[name]
    model, ids = model_of(config), tokens_of(50, config=config)
    expected = model(TokenBatch.from_sequences([ids]), mtp=True)
    runner, pages = runner_of(model), [[7, 2, 9, 4, 30, 11, 1]]
    assert isinstance(runner, Runner)
    batch = TokenBatch.from_sequences([ids])
    states = runner.forward(batch, pages=pages)
    torch.testing.assert_close(states.hidden, expected.hidden, atol=2e-5, rtol=2e-5)
    torch.testing.assert_close(runner.logits(states.hidden), model.logits(expected.hidden), atol=1e-4, rtol=2e-5)
    for depth, of_module in enumerate(expected.mtp):
        handed_on = states.handed_on.index_select(0, batch.not_last)
        batch = batch.ahead()
        states = runner.predict_ahead(handed_on, depth=depth, batch=batch, pages=pages)
        torch.testing.assert_close(states.hidden, of_module.hidden, atol=2e-5, rtol=2e-5)


def test_log_probabilities_are_the_trainers_to_1e_4():
    model, ids = model_of(V3), tokens_of(200)
    runner = runner_of(model)
    states = runner.forward(TokenBatch.from_sequences([ids]), pages=[list(range(25))])
    ours = runner.logits(states.hidden).log_softmax(-1)
    theirs = model.logits(model(TokenBatch.from_sequences([ids])).hidden).log_softmax(-1)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("page_tokens", [1, 2, 3, 5, 16, 64])
def test_the_size_of_pages_is_nobodys_business(page_tokens):
    model, ids = model_of(V3), tokens_of(40)
    runner = runner_of(model, num_pages=40, page_tokens=page_tokens)
    pages = [torch.randperm(40, generator=torch.Generator().manual_seed(3)).tolist()]
    states = runner.forward(TokenBatch.from_sequences([ids]), pages=pages)
    torch.testing.assert_close(states.hidden, model(TokenBatch.from_sequences([ids])).hidden, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("weights", FORMATS)
@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 59), max_size=5), page_tokens=st.sampled_from([3, 8, 64]))
def test_a_prompt_read_in_chunks_is_the_prompt_read_whole_to_the_last_bit(weights, cuts, page_tokens):
    runner, ids = cached_runner(weights, page_tokens), tokens_of(60)
    pages = [list(range(20))]
    whole = runner.forward(piece(ids, first=0, end=60), pages=pages).hidden
    runner.make_pages(num_pages=40, page_tokens=page_tokens)
    parts = [
        runner.forward(piece(ids, first=a, end=b), pages=pages).hidden for a, b in pairwise([0, *sorted(cuts), 60])
    ]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(runner.logits(whole)[-1:], runner.logits(whole[-1:]))


_RUNNERS = {}


def cached_runner(weights, page_tokens):
    if weights not in _RUNNERS:
        _RUNNERS[weights] = runner_of(model_of(V3), weights)
    runner = _RUNNERS[weights]
    runner.make_pages(num_pages=40, page_tokens=page_tokens)
    return runner


@pytest.mark.parametrize("weights", FORMATS)
@settings(max_examples=8)
@given(neighbours=st.lists(st.tuples(st.integers(0, 12), st.integers(1, 14)), max_size=5), place=st.integers(0, 5))
def test_a_token_beside_others_is_the_token_alone_to_the_last_bit(weights, neighbours, place):
    """Neighbours are pieces of any length after any past, as decoding requests and chunks of prompts are."""
    runner, ids = cached_runner(weights, 8), tokens_of(30)
    mine = [0, 1, 2, 3]
    runner.forward(piece(ids, first=0, end=29), pages=[mine])
    alone = runner.forward(piece(ids, first=29, end=30), pages=[mine]).hidden

    others = [tokens_of(past + count, seed=10 + index) for index, (past, count) in enumerate(neighbours)]
    pages = [[4 + 4 * index + page for page in range(4)] for index in range(len(others))]
    for other, (past, _), table in zip(others, neighbours, pages, strict=True):
        if past:
            runner.forward(piece(other, first=0, end=past), pages=[table])
    batches = [piece(other, first=past, end=past + n) for other, (past, n) in zip(others, neighbours, strict=True)]
    place = min(place, len(batches))
    batches.insert(place, piece(ids, first=29, end=30))
    pages.insert(place, mine)
    together = runner.forward(joined(*batches), pages=pages).hidden
    row = sum(batch.num_tokens for batch in batches[:place])
    assert torch.equal(together[row : row + 1], alone)


def test_a_shared_page_serves_another_continuation_to_the_last_bit():
    runner, ids = cached_runner("fp32", 8), tokens_of(30)
    other = ids[:16] + tokens_of(14, seed=5)
    fresh = runner.forward(piece(other, first=0, end=30), pages=[[10, 11, 12, 13]]).hidden
    runner.forward(piece(ids, first=0, end=30), pages=[[0, 1, 2, 3]])
    shared = runner.forward(piece(other, first=16, end=30), pages=[[0, 1, 20, 21]]).hidden
    assert torch.equal(shared, fresh[16:])


@pytest.mark.parametrize("threads", [2, 3])
def test_threads_do_not_change_a_bit(threads):
    ids, before = tokens_of(60), torch.get_num_threads()
    runner = cached_runner("fp32", 8)
    alone = runner.forward(piece(ids, first=0, end=60), pages=[list(range(8))]).hidden
    try:
        torch.set_num_threads(threads)
        again = runner.forward(piece(ids, first=0, end=60), pages=[list(range(8))]).hidden
    finally:
        torch.set_num_threads(before)
    assert torch.equal(alone, again)


def test_published_fp8_weights_compute_what_the_training_side_computes_from_them():
    """The same bytes and scales on both sides, so that the order of sums is all that differs."""
    state = model_of(V3).state_dict()
    layout = [tensor for tensor in published_layout(V3) if not tensor.is_copy]

    def published(tensor):
        value = tensor.part_of(state[tensor.source])
        return quantise(value, form=BLOCKS) if tensor.in_fp8 else value

    theirs = assemble(V3, layout=layout, read=published, dtype=FP8, device="cpu")
    assert is_fp8(theirs.layers[1].self_attn.o_proj.weight)
    runner = PackedRunner(pack_model(V3, layout=layout, read=published, name="fp8"))
    runner.make_pages(num_pages=5, page_tokens=8)
    batch = TokenBatch.from_sequences([tokens_of(40)])
    ours = runner.forward(batch, pages=[list(range(5))])
    torch.testing.assert_close(ours.hidden, theirs(batch).hidden, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(("weights", "largest"), [("bf16", 0.02), ("int8", 0.03), ("int4", 0.4)])
def test_a_format_of_fewer_bits_stays_near(weights, largest):
    """With all experts chosen, so that no near tie of the router sends a token elsewhere."""
    config = replace(V3, n_routed_experts=4, num_experts_per_tok=4, n_group=1, topk_group=1)
    model, batch = model_of(config), TokenBatch.from_sequences([tokens_of(40)])
    expected = model(batch).hidden
    ours = runner_of(model, weights).forward(batch, pages=[list(range(5))]).hidden
    assert ((ours - expected).norm() / expected.norm()).item() < largest


def test_a_model_in_fp8_is_to_be_packed_from_its_folder():
    model = Transformer(V3)
    model.make_room_in_fp8()
    with pytest.raises(ConfigError, match="pack it from its folder"):
        pack_from_state(model.state_dict(), config=V3, layout=published_layout(V3), name="fp8")


@pytest.mark.parametrize(
    "flags",
    [("-mno-avxvnni", "-DVECTOR_FLOATS=8"), pytest.param(("-DVECTOR_FLOATS=4",), marks=pytest.mark.slow)],
    ids=["avx2", "neon"],
)
def test_vectors_of_another_width_compute_the_same_model(monkeypatch, flags):
    other = engine.open_library(flags=(*FLAGS, *flags, "-Wno-psabi"))
    model, ids = model_of(V3), tokens_of(40)
    expected = model(TokenBatch.from_sequences([ids])).hidden
    native = engine.library
    monkeypatch.setattr(engine, "library", lambda: other)
    ours = runner_of(model).forward(piece(ids, first=0, end=40), pages=[[*range(5)]]).hidden
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=2e-5)
    x, weight = torch.randn(5, 300), torch.randn(70, 300)
    for storage in (Storage.INT8, Storage.INT4):
        theirs = PackedMatrix(storage, part_columns=(70,), depth=300)
        theirs.fill(weight, name="w")
        with monkeypatch.context() as here:
            here.setattr(engine, "library", native)
            mine = PackedMatrix(storage, part_columns=(70,), depth=300)
            mine.fill(weight, name="w")
            expected = mine(x)
        # Integers are summed exactly, and tiles in the same order, however wide the vectors are.
        assert torch.equal(theirs(x), expected)
