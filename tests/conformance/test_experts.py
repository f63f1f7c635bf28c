"""Report 2.1.2, eq. 12-16 and 'Node-Limited Routing': who works on which token, and how much it counts."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.model.block import MoeBlock


@dataclass
class SeenExperts:
    """What one MoE layer was given and made, as float64 arrays."""

    block: MoeBlock
    entered: np.ndarray
    """The residual stream before the layer."""
    attention: np.ndarray
    normed: np.ndarray
    """What the router read: u of eq. 12-16 behind the norm."""
    experts: np.ndarray
    gates: np.ndarray
    affinity: np.ndarray
    load: list[int]
    left: np.ndarray
    """The residual stream after the layer."""

    def weight(self, name: str) -> np.ndarray:
        return self.block.state_dict()[name].double().numpy()


def watch_experts(model, batch) -> list[SeenExperts]:
    """Run the model's own forward pass and return what every MoE layer saw and made, MTP's last."""
    blocks = [block for block in model.layers if isinstance(block, MoeBlock)] + [mtp.block for mtp in model.mtp]
    seen: list[dict] = [{"block": block} for block in blocks]
    handles = []
    for notes, block in zip(seen, blocks, strict=True):

        def of_block(module, inputs, output, notes=notes):
            notes["entered"], notes["left"] = inputs[0].detach().numpy(), output[0].detach().numpy()

        def of_attention(module, inputs, output, notes=notes):
            notes["attention"] = output.detach().numpy()

        def of_gate(module, inputs, output, notes=notes):
            notes["normed"] = inputs[0].detach().numpy()
            notes["experts"], notes["load"] = output.experts.numpy(), output.load.tolist()
            notes["gates"], notes["affinity"] = output.gates.detach().numpy(), output.affinity.detach().numpy()

        handles += [
            block.register_forward_hook(of_block),
            block.self_attn.register_forward_hook(of_attention),
            block.mlp.gate.register_forward_hook(of_gate),
        ]
    model(batch, mtp=True)
    for handle in handles:
        handle.remove()
    return [SeenExperts(**notes) for notes in seen]


@pytest.fixture(scope="module")
def expert_layers(model, batch) -> list[SeenExperts]:
    return watch_experts(model, batch)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def chosen_by_the_report(
    affinity: np.ndarray, bias: np.ndarray, *, n_group: int, topk_group: int, top_k: int
) -> set[int]:
    """Node-limited top-K, written out: groups by the sum of their K/M best biased scores, then the best of them."""
    biased = [float(s + b) for s, b in zip(affinity, bias, strict=True)]
    size = len(biased) // n_group
    groups = [range(group * size, (group + 1) * size) for group in range(n_group)]
    best = top_k // topk_group
    scores = [sum(sorted((biased[expert] for expert in group), reverse=True)[:best]) for group in groups]
    kept = sorted(range(n_group), key=lambda group: -scores[group])[:topk_group]
    candidates = [expert for group in kept for expert in groups[group]]
    return set(sorted(candidates, key=lambda expert: -biased[expert])[:top_k])


def test_eq_12_the_layer_adds_all_shared_and_the_chosen_routed_experts_to_its_input(expert_layers):
    """Catches: a missing residual; shared experts weighted by a gate; a factor of 2.5 that is lost or applied twice."""
    for layer in expert_layers:
        gate_up, down = layer.weight("mlp.experts.gate_up_proj"), layer.weight("mlp.experts.down_proj")
        shared = [layer.weight(f"mlp.shared_experts.{name}_proj.weight") for name in ("gate", "up", "down")]
        width = down.shape[2]
        gain = layer.weight("post_attention_layernorm.weight")
        for token in range(len(layer.entered)):
            u = layer.entered[token] + layer.attention[token]
            normed = gain * u / math.sqrt(float(np.mean(u**2)) + 1e-6)
            np.testing.assert_allclose(layer.normed[token], normed, rtol=1e-9)
            expected = u + shared[2] @ (silu(shared[0] @ normed) * (shared[1] @ normed))
            for expert, gate in zip(layer.experts[token], layer.gates[token], strict=True):
                inner = silu(gate_up[expert, :width] @ normed) * (gate_up[expert, width:] @ normed)
                expected = expected + gate * (down[expert] @ inner)
            np.testing.assert_allclose(layer.left[token], expected, rtol=1e-7, atol=1e-9)


def test_eq_13_gates_are_shares_of_the_chosen_affinities_times_two_and_a_half(expert_layers, published):
    """Catches: biased gates; normalising over all experts; the scaling factor missing or squared (vllm #11971)."""
    assert published.model.routed_scaling_factor == 2.5  # config.json; the report's equation has no factor
    assert published.model.norm_topk_prob
    for layer in expert_layers:
        bias = layer.weight("mlp.gate.e_score_correction_bias")
        assert bias.min() < -0.1
        assert bias.max() > 0.1
        for token, experts in enumerate(layer.experts):
            chosen = [layer.affinity[token, expert] for expert in experts]
            np.testing.assert_allclose(layer.gates[token], [2.5 * s / sum(chosen) for s in chosen], rtol=1e-9)
            assert layer.gates[token].sum() == pytest.approx(2.5)


def test_eq_14_exactly_eight_experts_have_a_gate(expert_layers, published):
    """Catches: dropped tokens, capacity limits, an expert chosen twice. The report drops no token (2.1.2)."""
    assert published.model.num_experts_per_tok == 8
    for layer in expert_layers:
        assert all(len(set(experts)) == 8 for experts in layer.experts.tolist())
        assert (layer.gates > 0).all()
        assert sum(layer.load) == 8 * len(layer.entered)
        assert layer.load == [int((layer.experts == expert).sum()) for expert in range(len(layer.load))]


def test_eq_15_affinity_is_a_sigmoid_of_the_dot_product_with_the_centroid(expert_layers, published):
    """Catches: llama.cpp, which falls back to V2's softmax when a config drops `scoring_func`."""
    assert published.model.scoring_func == "sigmoid"
    for layer in expert_layers:
        centroids = layer.weight("mlp.gate.weight")
        for token, normed in enumerate(layer.normed):
            expected = [sigmoid(float(normed @ centroid)) for centroid in centroids]
            np.testing.assert_allclose(layer.affinity[token], expected, rtol=1e-9)


def test_eq_16_the_bias_steers_the_choice(expert_layers, published):
    """Catches: a bias that is ignored; groups scored by unbiased scores, or by their best expert alone as in V2."""
    m = published.model
    assert (m.topk_method, m.n_group, m.topk_group) == ("noaux_tc", 8, 4)
    moved = 0
    for layer in expert_layers:
        bias = layer.weight("mlp.gate.e_score_correction_bias")
        for token, affinity in enumerate(layer.affinity):
            expected = chosen_by_the_report(affinity, bias, n_group=8, topk_group=4, top_k=8)
            assert set(layer.experts[token].tolist()) == expected
            moved += expected != chosen_by_the_report(affinity, 0 * bias, n_group=8, topk_group=4, top_k=8)
    assert moved > 10  # so that the bias was seen to matter


def test_a_token_reaches_four_groups_at_most(expert_layers, published):
    """Catches: a limit that is not applied: a token would travel to all eight nodes."""
    for layer in expert_layers:
        groups = layer.experts // (layer.affinity.shape[1] // published.model.n_group)
        assert max(len(set(row)) for row in groups.tolist()) <= 4


def test_experts_of_dropped_groups_stay_out_however_negative_the_biases(shrunk, make_model, batch):
    """Catches: a mask of 0 instead of -inf, as DeepSeek's first demo, transformers and litgpt had it (litgpt still)."""
    model = make_model(shrunk)
    before = [layer.experts for layer in watch_experts(model, batch)]
    for router in model.routers():
        router.e_score_correction_bias -= 3.0  # every biased score is below 0 now; differences are as they were
    for layer, experts in zip(watch_experts(model, batch), before, strict=True):
        groups = layer.experts // (layer.affinity.shape[1] // 8)
        assert max(len(set(row)) for row in groups.tolist()) <= 4
        assert np.array_equal(layer.experts, experts)


def test_gates_and_gradients_know_nothing_of_the_bias(shrunk, make_model, batch):
    """Catches: a bias that is a parameter, or gets a gradient, weight decay, or a place in the gates."""
    model = make_model(shrunk)
    names = dict(model.named_parameters())
    assert not any("bias" in name for name in names)
    output = model(batch, mtp=True)
    (model.logits(output.hidden).sum() + sum(routing.gates.sum() for routing in output.routings)).backward()
    for router in model.routers():
        assert router.e_score_correction_bias.grad is None
        assert not router.e_score_correction_bias.requires_grad


def test_router_scores_and_biases_stay_in_fp32_when_the_model_is_bf16(shrunk, make_model, make_rows):
    """Catches: BF16 biases, on which steps of 0.001 are lost once they lie near 5, as the released ones do."""
    model = make_model(shrunk).to(torch.bfloat16)
    routings = model(TokenBatch.from_rows(make_rows(shrunk, num_rows=1)), mtp=True).routings
    assert all(routing.affinity.dtype == torch.float32 for routing in routings)
    assert all(router.e_score_correction_bias.dtype == torch.float32 for router in model.routers())


def test_the_first_three_layers_are_dense_and_every_other_layer_has_experts(published, model):
    """Catches: experts from the first layer on, or in every second layer (`moe_layer_freq`)."""
    m = published.model
    assert [m.is_moe_layer(layer) for layer in range(61 + 1)] == [False] * 3 + [True] * 59  # 61 is the MTP module's
    assert [isinstance(block, MoeBlock) for block in model.layers] == [False] * 3 + [True] * 2
    assert len(model.routers()) == 3
