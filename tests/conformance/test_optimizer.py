"""Report 4.2 and 3.3: AdamW as the real training step of the recipe runs it, its schedules, and its number formats."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsv3.model.transformer import Transformer
from dsv3.train.schedule import batch_sequences, total_steps

T, B = 1_000_000_000_000, 1_000_000_000


def fp32_state(config, make_state, make_model, **at):
    return make_state(config, model=make_model(config).float(), **at)


def written_out_adamw(weight, gradient, first, second, *, step: int, rate: float, decay: float):
    """One step of AdamW (decoupled decay) in float64 with the report's betas; returns weight and both moments."""
    first = 0.9 * first + (1 - 0.9) * gradient
    second = 0.95 * second + (1 - 0.95) * gradient**2
    corrected = first / (1 - 0.9**step), second / (1 - 0.95**step)
    weight = weight - rate * decay * weight
    return weight - rate * corrected[0] / (np.sqrt(corrected[1]) + 1e-8), first, second


def test_the_real_step_is_adamw_with_the_published_betas_decay_and_clipping(
    published, shrunk, make_state, make_model, watched_step, micro_batches
):
    """Catches: torch's default beta2 of 0.999; L2 decay inside the gradient; decay on norm gains or none at all; a clip
    by value or by parameter. Two steps, the second from the moments as they were kept after the first."""
    optim = published.optim
    assert (optim.beta1, optim.beta2, optim.weight_decay, optim.clip_gradient_norm) == (0.9, 0.95, 0.1, 1.0)
    # Warm-up would hide the step below rounding; the rate is the schedule's, read at its peak.
    config = replace(
        shrunk,
        optim=replace(shrunk.optim, learning_rate=replace(shrunk.optim.learning_rate, peak=0.02, warmup_steps=0)),
    )
    state = fp32_state(config, make_state, make_model)
    for step in (1, 2):
        before = {name: p.detach().double().numpy().copy() for name, p in state.model.named_parameters()}
        firsts, seconds = (
            {name: moment.double().numpy() for name, moment in moments.items()} for moments in state.optimizer.moments()
        )
        seen = watched_step(state, batches=micro_batches(seed=step))
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in seen.gradients.values()))
        assert seen.metrics.gradient_norm == pytest.approx(norm, rel=1e-5)
        assert norm > 1.2  # so that clipping was seen
        for name, parameter in state.model.named_parameters():
            expected, *_ = written_out_adamw(
                before[name],
                seen.gradients[name].double().numpy() / norm,
                firsts[name],
                seconds[name],
                step=step,
                rate=0.02,
                decay=0.0 if "norm" in name else 0.1,
            )
            unclear = np.abs(seen.gradients[name].numpy()) < 1e-6 * norm  # eps and rounding decide there
            got = parameter.detach().double().numpy()
            np.testing.assert_allclose(got[~unclear], expected[~unclear], rtol=1e-6, atol=1e-6, err_msg=name)


def test_a_gradient_below_the_clip_is_left_as_it_is(shrunk, make_state, watched_step, micro_batches):
    """Catches: gradients scaled UP to a norm of 1. At the published initial spread the norm lies below it."""
    model = Transformer(shrunk.model)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    state = make_state(shrunk, model=model)
    seen = watched_step(state, batches=micro_batches())
    assert 0 < seen.metrics.gradient_norm < 1
    first, _ = state.optimizer.moments()
    name = "lm_head.weight"
    np.testing.assert_allclose(first[name].float().numpy(), 0.1 * seen.gradients[name].numpy(), rtol=2**-7, atol=1e-12)


def test_both_moments_are_kept_in_bf16_and_master_weights_and_gradients_in_fp32(
    published, shrunk, make_state, make_model, watched_step, micro_batches
):
    """Catches: FP32 moments (twice the optimizer memory of report 3.3), or BF16 weights stepped without a master copy,
    on which a step of 2.2e-4 is rounded away."""
    assert published.optim.bf16_moments
    model = make_model(shrunk).to(torch.bfloat16)
    state = make_state(shrunk, model=model, step=3000, tokens=30 * B)
    dtypes = []
    stepped = state.optimizer.step

    def step(**settings):
        dtypes.extend(gradient.dtype for gradient in state.optimizer.gradients.values())
        stepped(**settings)

    state.optimizer.step = step
    before = {name: weight.clone() for name, weight in state.optimizer.master.items()}
    watched_step(state, batches=micro_batches())
    assert set(dtypes) == {torch.float32}
    for moments in state.optimizer.moments():
        assert {moment.dtype for moment in moments.values()} == {torch.bfloat16}
    assert {weight.dtype for weight in state.optimizer.master.values()} == {torch.float32}
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, state.optimizer.master[name].bfloat16())
    # A step of 2.2e-4 is below the spacing of BF16 weights near 0.4: most of them stay, and all master copies move.
    name = "lm_head.weight"
    moved = state.optimizer.master[name] != before[name]
    rounded = state.optimizer.master[name].bfloat16() != before[name].bfloat16()
    assert moved.float().mean() > 0.99
    assert rounded.float().mean() < 0.6


@pytest.mark.parametrize(
    ("step", "tokens", "expected"),
    [
        (1, 0, 2.2e-4 / 2000),
        (1000, 12 * B, 1.1e-4),
        (2000, 25 * B, 2.2e-4),
        (100_000, 6 * T, 2.2e-4),
        (160_000, 10 * T, 2.2e-4),
        (194_000, 12_150 * B, 1.21e-4),  # half-way down the cosine: the mean of 2.2e-4 and 2.2e-5
        (228_000, 14_300 * B, 2.2e-5),
        (233_000, 14_633 * B - 1, 2.2e-5),
        (233_001, 14_633 * B, 7.3e-6),
        (236_000, 14_799 * B, 7.3e-6),
    ],
)
def test_the_learning_rate_of_a_real_step_follows_the_published_course(
    step, tokens, expected, shrunk, make_state, make_model, watched_step, micro_batches
):
    """Catches: a cosine over the whole run, or one to zero; milestones counted in steps; a rate logged but not used."""
    state = fp32_state(shrunk, make_state, make_model, step=step - 1, tokens=tokens)
    used = []
    stepped = state.optimizer.step

    def spy(*, learning_rate, gradient_norm):
        used.append(learning_rate)
        stepped(learning_rate=learning_rate, gradient_norm=gradient_norm)

    state.optimizer.step = spy
    seen = watched_step(state, batches=micro_batches(num_rows=2))
    assert seen.metrics.learning_rate == pytest.approx(expected, rel=1e-6)
    assert used == [seen.metrics.learning_rate]


def test_the_batch_grows_from_3072_to_15360_sequences_over_469_billion_tokens(published):
    """Catches: no ramp, a ramp in steps, or a doubling. Its shape is unpublished: ours is linear in tokens."""
    batch = published.batch
    assert batch_sequences(batch, tokens=0) == 3072
    sizes = [batch_sequences(batch, tokens=tokens) for tokens in range(0, 470 * B, B)]
    assert sizes == sorted(sizes)
    for tokens, size in enumerate(sizes[:469]):
        linear = 3072 + 12_288 * tokens / 469
        assert linear - 480 <= size <= linear or size == 3072
    assert batch_sequences(batch, tokens=469 * B) == 15_360
    assert 15_360 * batch.sequence_length == 62_914_560


def test_the_published_run_sees_14_8_trillion_tokens_in_about_240_thousand_steps(published):
    """Catches: a run length given in steps of the full batch; tokens counted without the ramp."""
    assert published.total_tokens == 14_800 * B
    assert 235_000 < total_steps(published) < 245_000


def test_all_weights_start_normal_with_a_spread_of_0_006(published, shrunk):
    """Catches: transformers' `initializer_range` of 0.02; a smaller spread for output projections, as in GPT-2."""
    assert published.model.initializer_range == 0.006
    config = replace(shrunk.model, hidden_size=160, moe_intermediate_size=64, q_lora_rank=64, kv_lora_rank=64)
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name  # 'all learnable' cannot mean gains: a gain of 0.006 shuts the layer
        else:
            values = parameter.detach()
            assert values.std().item() == pytest.approx(0.006, rel=0.06), name
            assert abs(values.mean().item()) < 0.0006, name
            # Normal, not uniform or cut off: 0.27 per cent lie beyond three spreads.
            assert 0.0005 < (values.abs() > 0.018).float().mean().item() < 0.006, name
    assert all((router.e_score_correction_bias == 0).all() for router in model.routers())


def test_the_weight_average_follows_every_step_on_the_cpu(shrunk, make_state, make_model, watched_step, micro_batches):
    """Catches: an average that is never updated, or that still holds the random start (report 3.2.3 keeps one)."""
    config = replace(
        shrunk,
        optim=replace(
            shrunk.optim, ema_decay=0.9, learning_rate=replace(shrunk.optim.learning_rate, peak=0.02, warmup_steps=0)
        ),
    )
    state = fp32_state(config, make_state, make_model)
    history = []
    for step in range(3):
        watched_step(state, batches=micro_batches(seed=step))
        history.append({name: p.detach().double().clone() for name, p in state.model.named_parameters()})
    for name, average in state.average.average.items():
        assert average.device.type == "cpu"
        weights = [0.9**age * 0.1 / (1 - 0.9**3) for age in (2, 1, 0)]
        expected = sum(weight * step[name] for weight, step in zip(weights, history, strict=True))
        torch.testing.assert_close(average.double(), expected, rtol=1e-5, atol=1e-6)
