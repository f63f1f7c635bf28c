"""Report 2.1.2, eq. 17-20 and the bias rule, as one real training step of the recipe does them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def frequencies(affinity: np.ndarray, *, top_k: int) -> np.ndarray:
    """Eq. 18 for one sequence: N_r / (K_r T) times how often each expert is among the K_r largest s. No bias in it."""
    num_tokens, num_experts = affinity.shape
    counts = np.zeros(num_experts)
    for scores in affinity:
        for expert in sorted(range(num_experts), key=lambda expert: -scores[expert])[:top_k]:
            counts[expert] += 1
    return num_experts / (top_k * num_tokens) * counts


def shares(affinity: np.ndarray) -> np.ndarray:
    """Eq. 19 and 20 for one sequence: the mean over its tokens of s_i / sum_j s_j."""
    total = np.zeros(affinity.shape[1])
    for scores in affinity:
        total += scores / scores.sum()
    return total / len(affinity)


def sequences(routing, batch) -> list[np.ndarray]:
    affinity = array(routing.affinity)
    starts = batch.starts.tolist()
    return [affinity[start:end] for start, end in pairwise(starts)]


def written_out_loss(seen, *, alpha: float, top_k: int) -> float:
    """Eq. 17, summed over MoE layers, mean over the sequences of the whole batch."""
    num_sequences = sum(len(batch.lengths) for batch in seen.batches)
    total = 0.0
    for output in seen.outputs:
        for routing, batch in zip(output.routings, output.routed_batches, strict=True):
            for affinity in sequences(routing, batch):
                total += alpha * float(frequencies(affinity, top_k=top_k) @ shares(affinity)) / num_sequences
    return total


@pytest.fixture
def seen(shrunk, make_state, watched_step, micro_batches):
    return watched_step(make_state(shrunk), batches=micro_batches())


def test_eq_17_the_balance_loss_of_the_recipe_enters_the_loss_with_alpha_1e_4(seen, published, shrunk):
    """Catches: Megatron-Bridge, which trained V3 with a sequence balance loss of 0 until #5165. It has three MoE
    layers here, the MTP module's too; alpha comes from `v3_671b()` itself."""
    assert published.balance.method == "bias"
    assert published.balance.sequence_loss_weight == 1e-4
    assert seen.metrics.balance_loss == pytest.approx(written_out_loss(seen, alpha=1e-4, top_k=8), rel=1e-6)
    assert 2.5e-4 < seen.metrics.balance_loss < 4e-4  # three layers, each about alpha


def test_eq_17_its_gradient_reaches_the_router(shrunk, make_state, watched_step, micro_batches):
    """Catches: a loss that is logged and not differentiated; a gradient through f, which has none; one through P that
    is not divided by the sequences of the whole batch. The MTP module's router is the last, so that what alpha changes
    in its gradient is the slope of its own loss alone: written out below."""
    gradients, last = {}, {}
    for alpha in (0.0, shrunk.balance.sequence_loss_weight):
        config = replace(shrunk, balance=replace(shrunk.balance, sequence_loss_weight=alpha))
        state = make_state(config)
        inputs = []
        handle = state.model.routers()[-1].register_forward_hook(
            lambda m, args, out, into=inputs: into.append(array(args[0]))
        )
        seen = watched_step(state, batches=micro_batches())
        handle.remove()
        gradients[alpha] = seen.gradients["mtp.0.block.mlp.gate.weight"].numpy()
        last = {"seen": seen, "normed": inputs}
    expected = np.zeros_like(gradients[1e-4])
    for output, normed in zip(last["seen"].outputs, last["normed"], strict=True):
        first = 0
        for affinity in sequences(output.routings[-1], output.routed_batches[-1]):
            f = frequencies(affinity, top_k=8)
            for s, u in zip(affinity, normed[first : first + len(affinity)], strict=True):
                # d/ds_e of sum_i f_i s_i / sum_j s_j, then the slope of the sigmoid.
                of_scores = (f - f @ s / s.sum()) / s.sum()
                expected += np.outer(1e-4 / 6 / len(affinity) * of_scores * s * (1 - s), u)
            first += len(affinity)
    np.testing.assert_allclose(gradients[1e-4] - gradients[0.0], expected, rtol=1e-6, atol=1e-12)
    assert np.abs(expected).max() > 1e-7


def test_eq_18_f_counts_the_plain_top_k_without_bias_and_without_groups(seen):
    """Catches: f made of the experts really chosen (V2's rule), which the bias evens out, so that the loss would see
    nothing to mend."""
    differ, with_chosen = 0, 0.0
    for output in seen.outputs:
        for routing, batch in zip(output.routings, output.routed_batches, strict=True):
            chosen = torch.nn.functional.one_hot(routing.experts, 32).sum(1)
            starts = batch.starts.tolist()
            for affinity, start, end in zip(sequences(routing, batch), starts, starts[1:], strict=False):
                really = chosen[start:end].sum(0).numpy() * 32 / (8 * (end - start))
                differ += not np.allclose(really, frequencies(affinity, top_k=8))
                with_chosen += 1e-4 / 6 * float(really @ shares(affinity))
    assert differ == 18  # in each of 3 layers and 6 rows bias and groups chose otherwise
    assert seen.metrics.balance_loss == pytest.approx(written_out_loss(seen, alpha=1e-4, top_k=8), rel=1e-6)
    assert abs(with_chosen - seen.metrics.balance_loss) > 1e-6


def test_eq_19_and_20_p_is_the_mean_share_of_a_sequence(seen, shrunk, make_state, watched_step, micro_batches):
    """Catches: P over the whole batch instead of each sequence (4.5.3 names both); scores not divided by their sum."""
    for output in seen.outputs:
        for routing, batch in zip(output.routings, output.routed_batches, strict=True):
            for affinity in sequences(routing, batch):
                assert shares(affinity).sum() == pytest.approx(1.0)
    batchwise = replace(shrunk, balance=replace(shrunk.balance, method="batch_loss", auxiliary_loss_weight=1e-4))
    other = watched_step(make_state(batchwise), batches=micro_batches()).metrics.balance_loss
    assert abs(other - seen.metrics.balance_loss) > 1e-6


def test_a_perfectly_even_router_has_a_balance_loss_of_alpha_a_layer(shrunk, make_state, watched_step, micro_batches):
    """Catches: N_r / K_r left out, or a sum over sequences for a mean. All scores equal: sum f P = sum f / N_r = 1."""
    state = make_state(shrunk)
    for router in state.model.routers():
        torch.nn.init.zeros_(router.weight)
    seen = watched_step(state, batches=micro_batches())
    assert seen.metrics.balance_loss == pytest.approx(3 * 1e-4, rel=1e-6)


def counts_by_router(seen) -> list[np.ndarray]:
    num_layers = len(seen.outputs[0].routings)
    return [
        sum(np.bincount(output.routings[layer].experts.flatten(), minlength=32) for output in seen.outputs)
        for layer in range(num_layers)
    ]


def test_after_a_step_every_router_has_moved_by_gamma_against_its_load(
    shrunk, published, make_state, watched_step, micro_batches
):
    """Catches: torchtitan, which walks `model.layers` alone, so that the router of the MTP module never moves; a bias
    moved by each micro-batch instead of the whole batch; a centred step; a step in proportion to the load."""
    assert published.balance.bias_update_speed == 1e-3
    state = make_state(shrunk)
    before = [router.e_score_correction_bias.clone() for router in state.model.routers()]
    seen = watched_step(state, batches=micro_batches(seed=3))  # of these rows, some experts lie just on the mean
    assert len(before) == 3  # two MoE layers and the MTP module's
    by_micro_batch_differs = on_the_mean = 0
    for router, old, counts, layer in zip(state.model.routers(), before, counts_by_router(seen), range(3), strict=True):
        moved = router.e_score_correction_bias - old
        for expert, count in enumerate(counts):
            mean = counts.sum() / 32
            expected = 1e-3 if count < mean else -1e-3 if count > mean else 0.0
            assert moved[expert].item() == pytest.approx(expected, abs=2e-7)
            on_the_mean += count == mean
            signs = [
                np.sign(o.routings[layer].load.float().mean().item() - o.routings[layer].load[expert].item())
                for o in seen.outputs
            ]
            by_micro_batch_differs += sum(signs) != 3 * np.sign(expected)
        assert moved.count_nonzero() > 16
    assert by_micro_batch_differs > 10
    assert on_the_mean > 0


@pytest.mark.parametrize(("tokens", "moves"), [(14_300_000_000_000 - 1, True), (14_300_000_000_000, False)])
def test_gamma_is_1e_3_until_14_3_trillion_tokens_and_then_zero(
    tokens, moves, shrunk, make_state, watched_step, micro_batches
):
    """Catches: a bias that keeps moving through the last 500B tokens; a milestone counted in steps."""
    state = make_state(shrunk, tokens=tokens, step=230_000)
    before = [router.e_score_correction_bias.clone() for router in state.model.routers()]
    seen = watched_step(state, batches=micro_batches())
    assert seen.metrics.bias_update_speed == (1e-3 if moves else 0.0)
    for router, old in zip(state.model.routers(), before, strict=True):
        assert torch.equal(router.e_score_correction_bias, old) is not moves


def test_the_choice_of_a_step_uses_the_bias_of_before_it(shrunk, make_state, watched_step, micro_batches):
    """Catches: a bias updated before or during the forward pass, so that later tokens leak into the choice."""
    seen = watched_step(make_state(shrunk), batches=micro_batches())
    fresh = make_state(shrunk).model
    for batch, output in zip(seen.batches, seen.outputs, strict=True):
        for one, other in zip(fresh(batch, mtp=True).routings, output.routings, strict=True):
            assert torch.equal(one.experts, other.experts)


def test_the_batch_wise_loss_takes_all_tokens_of_the_batch_as_one_sequence(
    shrunk, make_state, watched_step, micro_batches
):
    """Catches: f and P of each micro-batch instead of the whole batch: then the setting would depend on memory."""
    config = replace(shrunk, balance=replace(shrunk.balance, method="batch_loss", auxiliary_loss_weight=0.01))
    seen = watched_step(make_state(config), batches=micro_batches())
    expected = 0.0
    for layer in range(3):
        # The last three outputs are those of the step; before it the batch is run once to count.
        whole = np.concatenate([array(output.routings[layer].affinity) for output in seen.outputs[-3:]])
        expected += 0.01 * float(frequencies(whole, top_k=8) @ shares(whole))
    assert seen.metrics.balance_loss == pytest.approx(expected, rel=1e-6)
