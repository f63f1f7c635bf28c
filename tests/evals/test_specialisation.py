"""Loads of experts by domain, and what tells domains apart."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig
from dsv3.errors import ConfigError, DataError
from dsv3.evals.specialisation import distance, expert_loads, moe_layers
from dsv3.model.transformer import Transformer
from dsv3.report.specialisation import _spread, draw_loads

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=3,
    max_position_embeddings=64,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=8,
    v_head_dim=4,
    intermediate_size=16,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
    initializer_range=0.4,
)
SHARES = st.lists(st.floats(0.01, 1), min_size=4, max_size=4).map(
    lambda values: torch.tensor(values, dtype=torch.float64) / sum(values)
)


def make(**changes):
    model = Transformer(replace(CONFIG, **changes))
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.eval()


def documents(*, low, high, seed=1):
    """Six short documents with tokens from `low` to below `high`."""
    generator = torch.Generator().manual_seed(seed)
    return [[0, *torch.randint(low, high, (length,), generator=generator).tolist()] for length in range(9, 45, 6)]


def choices(model, text, *, window):
    """Count the choices of each expert, token by token, every window read by itself."""
    counts = torch.zeros(2, CONFIG.n_routed_experts)
    for document in text:
        for start in range(0, len(document) - 1, window):
            piece = document[start : start + window + 1][:-1]
            for layer, routing in enumerate(model(TokenBatch.from_sequences([piece])).routings):
                for expert in routing.experts.flatten().tolist():
                    counts[layer, expert] += 1
    return counts


def test_relative_load_is_each_experts_choices_over_an_even_share():
    model = make()
    text = {"low": documents(low=2, high=20), "high": documents(low=30, high=50)}
    for found in expert_loads(model, documents=text, window=16):
        counts = choices(model, text[found.name], window=16)
        expected = counts / (2 * found.tokens / CONFIG.n_routed_experts)
        torch.testing.assert_close(torch.tensor(found.relative), expected)
        assert found.tokens == sum(len(document) - 1 for document in text[found.name])
        assert found.max_violation == pytest.approx((expected.amax(1) - 1).tolist())
    assert moe_layers(model) == (1, 2)


def test_domains_are_apart_by_the_choices_that_they_do_not_share():
    model = make()
    text = {name: documents(low=low, high=low + 15) for name, low in (("a", 2), ("b", 18), ("c", 34))}
    shares = {name: choices(model, some, window=16) for name, some in text.items()}
    shares = {name: counts / counts.sum(1, keepdim=True) for name, counts in shares.items()}
    for found in expert_loads(model, documents=text, window=16):
        others = sum(share for name, share in shares.items() if name != found.name) / 2
        shared = torch.minimum(shares[found.name], others).sum(1)
        assert found.apart == pytest.approx((1 - shared).tolist(), abs=1e-6)


def test_the_halves_of_a_domain_are_its_documents_in_their_order():
    model = make()
    first, second = documents(low=2, high=20), documents(low=30, high=50)
    text = {"both": first + second, "other": first}
    both = expert_loads(model, documents=text, window=100)[0]
    halves = [
        counts / counts.sum(1, keepdim=True)
        for counts in (choices(model, some, window=100) for some in (first, second))
    ]
    assert both.by_chance == pytest.approx((1 - torch.minimum(*halves).sum(1)).tolist(), abs=1e-6)


def test_the_same_text_twice_is_not_apart_and_text_of_other_tokens_is():
    model = make()
    same = expert_loads(model, documents={"a": documents(low=2, high=50), "b": documents(low=2, high=50)}, window=16)
    assert [domain.apart for domain in same] == [(0.0, 0.0), (0.0, 0.0)]
    text = {
        name: [document for seed in range(8) for document in documents(low=low, high=low + 3, seed=seed)]
        for name, low in (("a", 2), ("b", 40))
    }
    for domain in expert_loads(model, documents=text, window=16):
        assert all(apart > 2 * chance for apart, chance in zip(domain.apart, domain.by_chance, strict=True))


@given(SHARES, SHARES, SHARES)
def test_distance_is_a_metric_up_to_one(first, second, third):
    assert distance(first, first) == 0
    assert 0 <= distance(first, second) == distance(second, first) <= 1
    assert distance(first, third) <= distance(first, second) + distance(second, third) + 1e-12
    assert distance(first, second) == pytest.approx(1 - torch.minimum(first, second).sum().item())


def test_what_cannot_be_told_apart_is_refused():
    text = {"a": documents(low=2, high=9), "b": documents(low=20, high=30)}
    with pytest.raises(ConfigError, match="no layer with experts"):
        expert_loads(make(first_k_dense_replace=3), documents=text, window=16)
    with pytest.raises(ConfigError, match="only a was given; give text of two domains"):
        expert_loads(make(), documents={"a": text["a"]}, window=16)
    with pytest.raises(DataError, match="b has 3 tokens, no more than a window of 16"):
        expert_loads(make(), documents={"a": text["a"], "b": [[0, 1, 2]]}, window=16)


def test_loads_are_drawn(tmp_path):
    found = expert_loads(make(), documents={"a": documents(low=2, high=9), "b": documents(low=20, high=30)}, window=16)
    draw_loads(found, layers=(1, 2), most=4.0, file=tmp_path / "loads.png", title="two")
    assert (tmp_path / "loads.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_loads(found, layers=(1, 2), most=4.0, file=tmp_path / "no" / "loads.png", title="two")


@given(st.integers(1, 100))
def test_panels_go_from_the_first_layer_to_the_last(count):
    places = _spread(count, most=8)
    assert (places[0], places[-1], len(places)) == (0, count - 1, min(count, 8))
    assert places == sorted(set(places))
