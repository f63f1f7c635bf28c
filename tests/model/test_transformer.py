"""The whole model: published sizes, packed rows, batching, MTP, and the steps of a block."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from dsv3.batch import TokenBatch
from dsv3.config import ModelConfig, YarnConfig
from dsv3.model.block import MoeBlock
from dsv3.model.moe import LocalDispatch
from dsv3.model.transformer import Transformer

SMALL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    q_lora_rank=16,
    kv_lora_rank=12,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=8,
    intermediate_size=48,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    num_nextn_predict_layers=2,
    initializer_range=0.1,
    max_position_embeddings=256,
)


def small_model(**changes):
    model = Transformer(replace(SMALL, **changes)).double()
    model.init_weights(generator=torch.Generator().manual_seed(0))
    for router in model.routers():
        router.e_score_correction_bias.normal_(generator=torch.Generator().manual_seed(1))
    return model


@pytest.mark.parametrize(
    ("config", "main", "mtp"),
    [
        (ModelConfig(), 671_026_419_200, 11_610_068_224),
        (
            ModelConfig(
                vocab_size=102_400,
                hidden_size=5120,
                intermediate_size=12_288,
                moe_intermediate_size=1536,
                num_hidden_layers=60,
                first_k_dense_replace=1,
                n_routed_experts=160,
                n_shared_experts=2,
                num_experts_per_tok=6,
                topk_group=3,
                scoring_func="softmax",
                topk_method="group_limited_greedy",
                norm_topk_prob=False,
                num_nextn_predict_layers=0,
            ),
            235_741_434_880,
            0,
        ),
    ],
)
def test_published_sizes_on_the_meta_device(config, main, mtp):
    with torch.device("meta"):
        model = Transformer(config)

    def count(*, of_mtp):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        return sum(t.numel() for name, t in tensors if name.startswith("mtp.") == of_mtp)

    assert count(of_mtp=False) == main
    assert count(of_mtp=True) == mtp


@pytest.mark.parametrize("rope_scaling", [None, YarnConfig(factor=4.0, original_max_position_embeddings=8)])
def test_packed_sequences_equal_each_alone(rope_scaling):
    model = small_model(rope_scaling=rope_scaling)
    sequences = [[1, 5, 9, 2, 33, 60], [7], [3, 3, 8, 1]]
    together = model(TokenBatch.from_sequences(sequences), mtp=True)
    alone = [model(TokenBatch.from_sequences([sequence]), mtp=True) for sequence in sequences]
    torch.testing.assert_close(together.hidden, torch.cat([output.hidden for output in alone]))
    for depth in range(2):
        torch.testing.assert_close(
            together.mtp[depth].hidden, torch.cat([output.mtp[depth].hidden for output in alone])
        )


def test_equal_rows_take_the_same_values_as_one_by_one():
    model = small_model()
    rows = torch.randint(0, 64, (4, 11))
    together = model(TokenBatch.from_rows(rows))
    alone = [model(TokenBatch.from_rows(row[None])) for row in rows]
    torch.testing.assert_close(together.hidden, torch.cat([output.hidden for output in alone]))


def test_no_token_sees_a_later_one():
    model = small_model()
    first = torch.randint(0, 64, (1, 9), generator=torch.Generator().manual_seed(0))
    second = torch.cat([first[:, :5], (first[:, 5:] + 1) % 64], dim=1)
    hidden = [model(TokenBatch.from_rows(rows), mtp=True) for rows in (first, second)]
    torch.testing.assert_close(hidden[0].hidden[:5], hidden[1].hidden[:5])
    torch.testing.assert_close(hidden[0].mtp[0].hidden[:4], hidden[1].mtp[0].hidden[:4])  # reads one token further
    torch.testing.assert_close(hidden[0].mtp[1].hidden[:3], hidden[1].mtp[1].hidden[:3])
    assert not torch.allclose(hidden[0].mtp[0].hidden[4], hidden[1].mtp[0].hidden[4])


def test_mtp_equals_eq_21_to_23_written_out():
    """h'_i = M [norm(Emb(t_{i+1})); norm(h_i)] through a block, for i = 1..T-1, with the main embedding."""
    model = small_model(num_nextn_predict_layers=1)
    batch = TokenBatch.from_rows(torch.randint(0, 64, (1, 8)))
    output = model(batch, mtp=True)
    module, tokens = model.mtp[0], batch.tokens

    def norm(x, weight):
        return weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()

    joined = torch.cat(
        (
            norm(model.embed_tokens.weight[tokens[1:]], module.enorm.weight),
            norm(output.hidden[:-1], module.hnorm.weight),
        ),
        dim=-1,
    )
    projected = joined @ module.eh_proj.weight.T
    inner = TokenBatch.from_sequences([tokens[:-1].tolist()])  # positions 0..T-2; the block reads no token ids
    expected, _ = module.block(
        projected, batch=inner, rotation=model._rotation(inner), cache=None, dispatch=LocalDispatch()
    )
    torch.testing.assert_close(output.mtp[0].hidden, norm(expected, module.norm.weight))
    assert output.mtp[0].batch.targets.tolist() == batch.targets[1:].tolist()


def test_mtp_order_and_source_are_obeyed():
    batch = TokenBatch.from_rows(torch.randint(0, 64, (2, 8)))
    outputs = {}
    for order in ("embedding_first", "hidden_first"):
        for source in ("post_norm", "pre_norm"):
            model = small_model(mtp_concat_order=order, mtp_hidden_source=source)
            model.norm.weight.data.uniform_(0.5, 2)
            outputs[order, source] = model(batch, mtp=True).mtp[1].hidden
    values = list(outputs.values())
    for i, one in enumerate(values):
        for other in values[i + 1 :]:
            assert not torch.allclose(one, other)


def test_a_block_driven_step_by_step_equals_its_forward():
    model = small_model()
    block = model.layers[1]
    assert isinstance(block, MoeBlock)
    batch = TokenBatch.from_rows(torch.randint(0, 64, (2, 8)))
    hidden, rotation, through = torch.randn(14, 32).double(), model._rotation(batch), LocalDispatch()
    whole, routing = block(hidden, batch=batch, rotation=rotation, cache=None, dispatch=through)

    attended = block.attention(hidden, batch=batch, rotation=rotation, cache=None)
    sent = block.route(attended, through=through)
    outputs = block.experts(through.receive(sent.travelling), sent=sent)
    dispatched = through.receive(sent.travelling)
    stepped = block.combine(through.send_back(outputs, dispatched=dispatched), sent=sent, through=through)
    torch.testing.assert_close(stepped, whole)
    assert torch.equal(sent.routing.experts, routing.experts)


def test_experts_equal_eq_12_one_token_at_a_time():
    model = small_model()
    moe = model.layers[1].mlp
    normed = torch.randn(10, 32).double()
    routing = moe.gate(normed)
    through = LocalDispatch()
    sent = through.receive(through.announce(normed, routing=routing))
    output = through.receive_back(through.send_back(moe.experts(sent), dispatched=sent))
    for token in range(10):
        expected = torch.zeros(32).double()
        for expert, gate in zip(routing.experts[token].tolist(), routing.gates[token], strict=True):
            gate_weight, up_weight = moe.experts.gate_up_proj[expert].chunk(2)
            inner = F.silu(gate_weight @ normed[token]) * (up_weight @ normed[token])
            expected = expected + gate * (moe.experts.down_proj[expert] @ inner)
        torch.testing.assert_close(output[token], expected)


def test_routings_come_in_the_order_of_the_routers_with_their_batches():
    model = small_model()
    batch = TokenBatch.from_rows(torch.randint(0, 64, (2, 8)))
    output = model(batch, mtp=True)
    assert len(output.routings) == len(model.routers()) == 2 + 2
    assert [b.num_tokens for b in output.routed_batches] == [14, 14, 12, 10]
    assert [int(r.load.sum()) for r in output.routings] == [3 * 14, 3 * 14, 3 * 12, 3 * 10]


def test_without_shared_experts_the_model_has_none():
    model = small_model(n_shared_experts=0)
    assert not any("shared" in name for name in model.state_dict())
    model(TokenBatch.from_rows(torch.randint(0, 64, (1, 8))))


def test_initial_weights_have_the_published_spread_and_follow_the_seed():
    def weights(seed):
        model = Transformer(replace(SMALL, hidden_size=128, initializer_range=0.006))
        model.init_weights(generator=torch.Generator().manual_seed(seed))
        return model

    first, again, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)
    for name, parameter in first.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
        else:
            assert parameter.std().item() == pytest.approx(0.006, rel=0.15), name
