import math
from dataclasses import replace

import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.config import ModelConfig
from dsv3.evals.balance import ExpertLoad
from dsv3.evals.perplexity import TOKENS_AT_ONCE, document_bits
from dsv3.infer.packed_model import pack_from_state
from dsv3.infer.packed_runner import PackedRunner
from dsv3.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    q_lora_rank=None,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=8,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    first_k_dense_replace=0,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    max_position_embeddings=256,
    initializer_range=0.2,
    num_nextn_predict_layers=0,
)


@pytest.fixture
def model():
    model = Transformer(SMALL)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.eval()


def random_documents(*lengths):
    generator = torch.Generator().manual_seed(1)
    return [[0, *torch.randint(2, 50, (length,), generator=generator).tolist()] for length in lengths]


def test_bits_of_a_document_are_its_log2_probability_token_by_token(model):
    documents = random_documents(5, 17, 1)
    for document, bits in zip(documents, document_bits(model, documents=documents, window=64), strict=True):
        expected = 0.0
        for end in range(1, len(document)):
            hidden = model(TokenBatch.from_sequences([document[:end]])).hidden
            expected -= math.log2(model.logits(hidden)[-1].double().softmax(-1)[document[end]].item())
        assert bits == pytest.approx(expected, rel=1e-4)


def test_a_long_document_is_scored_in_stretches_that_predict_each_token_once(model):
    (document,) = random_documents(25)
    stretches = [document[0:11], document[10:21], document[20:26]]
    bits = document_bits(model, documents=[document], window=10)
    assert bits[0] == pytest.approx(sum(document_bits(model, documents=stretches, window=10)), rel=1e-5)


def test_documents_scored_together_need_what_they_need_alone(model):
    documents = random_documents(*range(40, 240, 4))
    assert sum(len(document) for document in documents) > TOKENS_AT_ONCE
    together = document_bits(model, documents=documents, window=128)
    alone = [document_bits(model, documents=[document], window=128)[0] for document in documents]
    assert together == pytest.approx(alone, rel=1e-4)


def test_expert_load_counts_every_choice_and_max_violation_is_its_excess_over_the_mean(model):
    load = ExpertLoad()
    documents = random_documents(30, 9)
    document_bits(model, documents=documents, window=8, load=load)
    assert [int(layer.sum()) for layer in load.layers] == [39 * 2, 39 * 2]
    for layer, violation in zip(load.layers, load.max_violations(), strict=True):
        assert violation == pytest.approx((max(layer.tolist()) - 39 * 2 / 4) / (39 * 2 / 4))


def test_a_model_without_experts_has_no_expert_load():
    dense = Transformer(replace(SMALL, first_k_dense_replace=2))
    dense.init_weights(generator=torch.Generator().manual_seed(0))
    load = ExpertLoad()
    document_bits(dense, documents=random_documents(4), window=8, load=load)
    assert load.max_violations() == []


def test_an_engines_runner_scores_as_the_model_does(model, our_kernels):
    documents = [
        torch.randint(0, 50, (length,), generator=torch.Generator().manual_seed(length)).tolist()
        for length in (3, 90, 2, 65)
    ]
    packed = pack_from_state(model.state_dict(), config=SMALL, layout=published_layout(SMALL), name="fp32")
    expected = document_bits(model, documents=documents, window=30)
    assert document_bits(PackedRunner(packed), documents=documents, window=30) == pytest.approx(expected, rel=1e-5)
