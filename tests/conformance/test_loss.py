"""Report 2.2, eq. 24-25: what a real training step of the recipe minimises, and with which weights."""

from dataclasses import replace

import numpy as np
import pytest

T = 1_000_000_000_000


def array(tensor) -> np.ndarray:
    return tensor.detach().numpy()


def nll(hidden: np.ndarray, head: np.ndarray, target: int) -> float:
    logits = head @ hidden
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[target])


def summed_nll(outputs, head: np.ndarray) -> float:
    """Sum of -log P over what the hidden states are to predict; `outputs` are (hidden, targets) pairs."""
    return sum(
        nll(state, head, target)
        for hidden, targets in outputs
        for state, target in zip(array(hidden), targets.tolist(), strict=True)
    )


def test_the_main_loss_is_the_mean_over_all_next_tokens(shrunk, make_state, watched_step, micro_batches):
    """Catches: a mean of the means of micro-batches of unlike size; a last place left out."""
    state = make_state(shrunk)
    head = array(state.model.lm_head.weight).copy()
    seen = watched_step(state, batches=micro_batches(num_rows=6, at_a_time=4))  # four rows, then two
    expected = summed_nll(
        [(output.hidden, batch.targets) for output, batch in zip(seen.outputs, seen.batches, strict=True)], head
    ) / (6 * 12)
    assert seen.metrics.loss == pytest.approx(expected, rel=1e-6)


def test_places_without_a_target_count_neither_above_nor_below_the_line(
    shrunk, make_state, watched_step, micro_batches
):
    """Catches: a mean of the means of micro-batches, or a T that counts padding: here the last row ends early."""
    state = make_state(shrunk)
    head = array(state.model.lm_head.weight).copy()
    batches = micro_batches(num_rows=6, at_a_time=4)
    batches[1] = replace(batches[1], targets=batches[1].targets.clone())
    batches[1].targets[-5:] = -100
    seen = watched_step(state, batches=batches)
    main = [
        (output.hidden[batch.targets >= 0], batch.targets[batch.targets >= 0])
        for output, batch in zip(seen.outputs, batches, strict=True)
    ]
    assert sum(len(targets) for _, targets in main) == 67
    assert seen.metrics.loss == pytest.approx(summed_nll(main, head) / 67, rel=1e-6)
    ahead = [(o.mtp[0].hidden[o.mtp[0].batch.targets >= 0], o.mtp[0].batch.targets) for o in seen.outputs]
    ahead = [(hidden, targets[targets >= 0]) for hidden, targets in ahead]
    assert sum(len(targets) for _, targets in ahead) == 61
    assert seen.metrics.mtp_loss[0] == pytest.approx(summed_nll(ahead, head) / 67, rel=1e-6)


def test_eq_24_the_mtp_loss_is_a_sum_over_t_minus_k_terms_divided_by_t(shrunk, make_state, watched_step, micro_batches):
    """Catches: Megatron-LM, which divided it by another size (#1532, #3959); a mean over the T - k terms there are."""
    config = replace(shrunk, model=replace(shrunk.model, num_nextn_predict_layers=2))
    state = make_state(config)
    head = array(state.model.lm_head.weight).copy()
    seen = watched_step(state, batches=micro_batches(config))
    for k in (1, 2):
        pairs = [(output.mtp[k - 1].hidden, output.mtp[k - 1].batch.targets) for output in seen.outputs]
        assert sum(len(targets) for _, targets in pairs) == 6 * (12 - k)
        expected = summed_nll(pairs, head) / (6 * 12)
        assert seen.metrics.mtp_loss[k - 1] == pytest.approx(expected, rel=1e-6)


def slope_of_norm_gain(seen, *, depth: int, head: np.ndarray, gain: np.ndarray, weight: float) -> np.ndarray:
    """d(weight / T sum -log P) by the gain of the module's final norm, which nothing but its own loss depends on."""
    slope = np.zeros_like(gain)
    for output in seen.outputs:
        one = output.mtp[depth]
        for hidden, target in zip(array(one.hidden), one.batch.targets.tolist(), strict=True):
            logits = head @ hidden
            probabilities = np.exp(logits - logits.max())
            probabilities /= probabilities.sum()
            probabilities[target] -= 1
            slope += weight / (6 * 12) * (probabilities @ head) * (hidden / gain)
    return slope


@pytest.mark.parametrize(("tokens", "weight"), [(0, 0.3), (10 * T - 1, 0.3), (10 * T, 0.1), (14 * T, 0.1)])
def test_eq_25_lambda_is_0_3_for_ten_trillion_tokens_and_then_0_1(
    tokens, weight, published, shrunk, make_state, watched_step, micro_batches
):
    """Catches: Pai-Megatron-Patch #538, where lambda is ignored; a weight that is logged and not applied: the gradient
    itself is compared, with the slope written out."""
    assert published.mtp.switch_tokens == 10 * T
    state = make_state(shrunk, tokens=tokens, step=5000)
    head = array(state.model.lm_head.weight).copy()
    gain = array(state.model.mtp[0].norm.weight).copy()
    seen = watched_step(state, batches=micro_batches())
    assert seen.metrics.mtp_weight == weight
    expected = slope_of_norm_gain(seen, depth=0, head=head, gain=gain, weight=weight)
    np.testing.assert_allclose(seen.gradients["mtp.0.norm.weight"].numpy(), expected, rtol=1e-6, atol=1e-10)


def test_eq_25_divides_lambda_by_the_number_of_modules(shrunk, make_state, watched_step, micro_batches):
    """Catches: a sum over depths for a mean: with D = 2 every module would count double."""
    config = replace(shrunk, model=replace(shrunk.model, num_nextn_predict_layers=2))
    state = make_state(config)
    head = array(state.model.lm_head.weight).copy()
    gain = array(state.model.mtp[1].norm.weight).copy()
    seen = watched_step(state, batches=micro_batches(config))
    expected = slope_of_norm_gain(seen, depth=1, head=head, gain=gain, weight=0.3 / 2)
    np.testing.assert_allclose(seen.gradients["mtp.1.norm.weight"].numpy(), expected, rtol=1e-6, atol=1e-10)


def test_embedding_and_head_learn_from_both_losses(shrunk, make_state, watched_step, micro_batches):
    """Catches: a detached state or a copied head: sharing means that gradients of both losses meet (report 3.2.3)."""
    gradients = {}
    for weight in (0.3, 0.0):
        config = replace(shrunk, mtp=replace(shrunk.mtp, early_weight=weight))
        gradients[weight] = watched_step(make_state(config), batches=micro_batches()).gradients
    for name in ("embed_tokens.weight", "lm_head.weight", "layers.0.self_attn.o_proj.weight"):
        assert (gradients[0.3][name] - gradients[0.0][name]).abs().max() > 1e-4, name


def test_cutting_the_batch_into_micro_batches_changes_memory_and_not_the_loss(
    shrunk, make_state, watched_step, micro_batches
):
    """Catches: a loss divided by the size of the micro-batch. One row, two, or all six at a time: the same gradient."""
    seen = [watched_step(make_state(shrunk), batches=micro_batches(at_a_time=size)) for size in (1, 2, 6)]
    for other in seen[1:]:
        assert other.metrics.loss == pytest.approx(seen[0].metrics.loss, rel=1e-6)
        assert other.metrics.balance_loss == pytest.approx(seen[0].metrics.balance_loss, rel=1e-6)
        for name, gradient in seen[0].gradients.items():
            np.testing.assert_allclose(other.gradients[name].numpy(), gradient.numpy(), rtol=1e-6, atol=1e-9)
