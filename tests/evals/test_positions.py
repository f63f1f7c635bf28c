"""Loss by position, and ways to scale positions."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, YarnConfig
from dsv3.errors import ConfigError, DataError
from dsv3.evals.perplexity import document_bits
from dsv3.evals.positions import edges_of, loss_by_position, whole_rows
from dsv3.evals.scaling import SCALINGS, scale_positions
from dsv3.model.mla import LatentAttention
from dsv3.model.transformer import Transformer
from dsv3.report.positions import draw_positions

CONFIG = ModelConfig(
    vocab_size=50,
    hidden_size=16,
    num_hidden_layers=2,
    max_position_embeddings=256,
    num_attention_heads=2,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_nope_head_dim=4,
    qk_rope_head_dim=8,
    v_head_dim=4,
    intermediate_size=16,
    moe_intermediate_size=8,
    first_k_dense_replace=1,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=0,
    initializer_range=0.4,
)


def make(config=CONFIG):
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    return model.eval()


@given(st.integers(1, 200_000))
def test_buckets_hold_every_position_and_grow_twofold(length):
    edges = edges_of(length)
    assert (edges[0], edges[-1]) == (0, length)
    assert list(edges) == sorted(set(edges))
    assert all(end <= 2 * begin for begin, end in pairwise(edges[1:]))


def test_rows_are_of_long_documents_before_short_ones_and_of_one_source_each():
    documents = {
        "long": [list(range(30)), list(range(100, 105)), list(range(200, 212))],
        "short": [[7] * 4, [8] * 6, [9] * 3],
        "too short": [[1, 2, 3]],
    }
    rows = whole_rows(documents, length=9, most=10)
    assert rows[0] == list(range(10))  # a row of each source in turn
    assert rows[1] == [7] * 4 + [8] * 6
    assert rows[2:4] == [list(range(10, 20)), list(range(20, 30))]
    assert rows[4] == list(range(200, 210))
    assert len(rows) == 5  # the 5 + 3 + 4 tokens left over fill none
    assert whole_rows(documents, length=9, most=2) == rows[:2]
    with pytest.raises(DataError, match=r"a row of 900 tokens \(the longest has 47\)"):
        whole_rows(documents, length=900, most=2)


def test_all_buckets_together_are_the_loss_of_the_rows():
    model = make()
    rows = torch.randint(50, (3, 91), generator=torch.Generator().manual_seed(1)).tolist()
    found = loss_by_position(model, rows=rows, name="it")
    total = sum((end - begin) * nats for (begin, end), nats in zip(pairwise(found.edges), found.nats, strict=True))
    bits = document_bits(model, documents=rows, window=90)
    assert total * 3 == pytest.approx(sum(bits) * math.log(2), rel=1e-5)
    assert found.perplexity[0] == pytest.approx(math.exp(found.nats[0]))


def test_the_error_is_that_of_the_mean_over_rows():
    rows = torch.randint(50, (4, 31), generator=torch.Generator().manual_seed(1)).tolist()
    model = make()
    each = torch.tensor([loss_by_position(model, rows=[row], name="").nats for row in rows])
    found = loss_by_position(model, rows=rows, name="")
    torch.testing.assert_close(torch.tensor(found.nats), each.mean(0))
    torch.testing.assert_close(torch.tensor(found.errors), each.std(0) / 2)


def test_scaled_frequencies_are_those_of_transformers():
    """Its 'dynamic' scaling is NTK's, by the length at hand: of factor 1 at s times the trained length, by s."""
    from transformers import DeepseekV3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    def theirs(kind, **more):
        rope = {"rope_type": kind, "rope_theta": 10_000.0, **more}
        config = DeepseekV3Config(
            max_position_embeddings=more.get("original_max_position_embeddings", 128), rope_parameters=rope
        )
        config.head_dim = config.qk_rope_head_dim
        return config

    model = make(replace(CONFIG, qk_rope_head_dim=64))
    for scaling, kind, factor, seq_len in (("linear", "linear", 8.0, None), ("ntk", "dynamic", 1.0, 1024)):
        expected, _ = ROPE_INIT_FUNCTIONS[kind](theirs(kind, factor=factor), device="cpu", seq_len=seq_len)
        scale_positions(model, scaling=scaling, factor=8.0, trained=128)
        torch.testing.assert_close(model.frequencies, expected, rtol=1e-5, atol=0)


def test_the_weights_under_yarn_are_a_model_with_yarn_and_under_none_without():
    yarn = replace(CONFIG, rope_scaling=YarnConfig(factor=8.0, original_max_position_embeddings=32))
    batch = TokenBatch.from_sequences([list(range(40))])
    with torch.no_grad():
        expected = {"yarn": make(yarn)(batch).hidden, "none": make()(batch).hidden}
        for before in (CONFIG, replace(yarn, rope_scaling=YarnConfig(factor=3.0, mscale=0.5))):
            model = make(before)
            for scaling, hidden in expected.items():
                scale_positions(model, scaling=scaling, factor=8.0, trained=32)
                torch.testing.assert_close(model(batch).hidden, hidden)


@pytest.mark.parametrize("scaling", SCALINGS)
def test_nothing_changes_where_nothing_is_lengthened(scaling):
    model, plain = make(), make()
    scale_positions(model, scaling=scaling, factor=1.0, trained=256)
    torch.testing.assert_close(model.frequencies, plain.frequencies)
    scales = [[part.scale for part in one.modules() if isinstance(part, LatentAttention)] for one in (model, plain)]
    assert scales[0] == scales[1]


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ConfigError, match="'cubic'; choose of none, linear, ntk, yarn"):
        scale_positions(make(), scaling="cubic", factor=2.0, trained=32)


def test_curves_are_drawn(tmp_path):
    rows = [list(range(40)) + list(range(40))]
    found = [loss_by_position(make(), rows=rows, name=name) for name in ("one", "another")]
    draw_positions(found, file=tmp_path / "curves.png", title="two", trained=32)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ConfigError, match="cannot be written"):
        draw_positions(found, file=tmp_path / "no" / "curves.png", title="two")
