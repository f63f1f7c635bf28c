"""Report 2.2, eq. 21-23: one more block, which looks one token further ahead. Its loss: test_loss.py."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from dsv3.batch import TokenBatch
from dsv3.config import YarnConfig
from dsv3.model.block import MoeBlock


def rms_norm(x: np.ndarray, gain: torch.Tensor) -> np.ndarray:
    return gain.detach().numpy() * x / math.sqrt(float(np.mean(x**2)) + 1e-6)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy()


def watch_mtp(model, batch) -> tuple[object, list[dict]]:
    """Run the model's own forward pass; return its output and what each MTP module's projection and block saw."""
    seen: list[dict] = [{} for _ in model.mtp]
    handles = []
    for notes, module in zip(seen, model.mtp, strict=True):

        def of_projection(_, inputs, output, notes=notes):
            notes["joined"], notes["projected"] = array(inputs[0]), array(output)

        def of_block(_, inputs, output, notes=notes):
            notes["entered"], notes["left"] = array(inputs[0]), array(output[0])

        handles += [module.eh_proj.register_forward_hook(of_projection), module.block.register_forward_hook(of_block)]
    output = model(batch, mtp=True)
    for handle in handles:
        handle.remove()
    return output, seen


@pytest.fixture(scope="module")
def two_deep(shrunk):
    """The published recipe has D = 1; two modules show that each reads the one before it."""
    return replace(shrunk, model=replace(shrunk.model, num_nextn_predict_layers=2))


def test_eq_21_a_module_reads_the_state_before_it_and_the_embedding_one_token_further_on(
    two_deep, make_model, make_rows
):
    """Catches: Emb(t_i) or Emb(t_i+k+1) in place of Emb(t_i+k); a missing norm (Pai-Megatron-Patch #538); a second
    embedding table. The halves stand in the order of the released weights, the reverse of eq. 21."""
    model = make_model(two_deep)
    rows = make_rows(two_deep, num_rows=2)
    length = rows.shape[1] - 1
    output, seen = watch_mtp(model, TokenBatch.from_rows(rows))
    table = array(model.embed_tokens.weight)
    before = array(output.hidden).reshape(2, length, -1)  # h^0, behind the final norm: `mtp_hidden_source`
    for k, (module, notes) in enumerate(zip(model.mtp, seen, strict=True), start=1):
        joined = notes["joined"].reshape(2, length - k, -1)
        projected = notes["projected"].reshape(2, length - k, -1)
        for row in range(2):
            for i in range(length - k):
                embedding = rms_norm(table[rows[row, i + k]], module.enorm.weight)
                state = rms_norm(before[row, i], module.hnorm.weight)
                expected = np.concatenate([embedding, state])
                np.testing.assert_allclose(joined[row, i], expected, rtol=1e-9)
                np.testing.assert_allclose(
                    projected[row, i], array(module.eh_proj.weight) @ expected, rtol=1e-8, atol=1e-12
                )
        before = array(output.mtp[k - 1].hidden).reshape(2, length - k, -1)


def test_eq_21_in_the_order_of_the_report_when_asked_for(shrunk, make_model, batch):
    """Catches: a setting that is accepted and ignored."""
    joined = {}
    for order in ("embedding_first", "hidden_first"):
        config = replace(shrunk, model=replace(shrunk.model, mtp_concat_order=order))
        joined[order] = watch_mtp(make_model(config), batch)[1][0]["joined"]
    width = shrunk.model.hidden_size
    swapped = np.concatenate([joined["hidden_first"][:, width:], joined["hidden_first"][:, :width]], axis=1)
    np.testing.assert_allclose(joined["embedding_first"], swapped, rtol=1e-12)


def test_eq_22_the_module_is_a_whole_layer_with_experts_over_the_first_t_minus_k_places(
    published, two_deep, make_model, batch
):
    """Catches: parallel heads instead of a chain of blocks; a dense block; positions shifted with the tokens."""
    assert published.model.num_nextn_predict_layers == 1  # D
    model = make_model(two_deep)
    output, seen = watch_mtp(model, batch)
    for k, (module, notes) in enumerate(zip(model.mtp, seen, strict=True), start=1):
        assert isinstance(module.block, MoeBlock)
        np.testing.assert_array_equal(notes["entered"], notes["projected"])
        inner = output.mtp[k - 1].batch
        assert inner.lengths == (12 - k,) * 3
        assert inner.positions.tolist() == list(range(12 - k)) * 3
        np.testing.assert_allclose(array(output.mtp[k - 1].before_norm), notes["left"], rtol=1e-12)


def test_eq_23_the_output_head_is_the_main_models_own(shrunk, make_model, batch):
    """Catches: a head or an embedding of the module's own; the main model's norm used for the module's."""
    model = make_model(shrunk)
    names = [name for name, _ in model.named_parameters() if name.startswith("mtp.")]
    assert not any("lm_head" in name or "embed" in name or "shared_head.head" in name for name in names)
    output, seen = watch_mtp(model, batch)
    for token in range(output.mtp[0].hidden.shape[0]):
        normed = rms_norm(seen[0]["left"][token], model.mtp[0].norm.weight)
        np.testing.assert_allclose(array(output.mtp[0].hidden[token]), normed, rtol=1e-9)
    expected = array(output.mtp[0].hidden) @ array(model.lm_head.weight).T
    np.testing.assert_allclose(array(model.logits(output.mtp[0].hidden)), expected, rtol=1e-9)


def test_the_module_predicts_the_token_two_ahead(shrunk, model, make_rows):
    """Catches: targets one too near (a copy of its own input) or one too far."""
    rows = make_rows(shrunk, num_rows=2)
    batch = TokenBatch.from_rows(rows)
    predicted = model(batch, mtp=True).mtp[0].batch
    assert predicted.tokens.tolist() == rows[:, 1:-1].flatten().tolist()
    assert predicted.targets.tolist() == rows[:, 2:].flatten().tolist()


def test_the_module_has_11_610_068_224_parameters_in_the_published_model(published):
    """Catches: a module without eh_proj or norms (the released README counts 11.5B so), or with a head of its own."""
    from dsv3.model.transformer import Transformer

    with torch.device("meta"):
        model = Transformer(published.model)
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert sum(t.numel() for name, t in tensors.items() if name.startswith("mtp.")) == 11_610_068_224
    assert sum(t.numel() for name, t in tensors.items() if not name.startswith("mtp.")) == 671_026_419_200


def test_yarn_settings_reach_the_module_too(shrunk, make_model, batch, watch):
    """Catches: a module that keeps the plain frequencies after the context has been extended."""
    config = replace(shrunk, model=replace(shrunk.model, rope_scaling=YarnConfig()))
    layers = watch(make_model(config), batch)
    assert layers[-1].scale == layers[0].scale > 1.8 * (shrunk.model.qk_head_dim**-0.5)


def test_the_main_model_is_the_same_with_and_without_its_module(shrunk, make_model, batch):
    """Catches: a main model that depends on its MTP module, which the report discards for ordinary decoding."""
    model = make_model(shrunk)
    with_module, without = model(batch, mtp=True), model(batch)
    assert torch.equal(with_module.hidden, without.hidden)
    assert without.mtp == ()
    assert len(with_module.routings) == len(without.routings) + 1
