"""A model whose weights stay in FP8 computes what the dequantised one computes, and moves as one expects."""

import copy
from dataclasses import replace

import pytest
import torch

from dsv3 import recipes
from dsv3.batch import TokenBatch
from dsv3.config import OptimConfig
from dsv3.errors import ConfigError
from dsv3.fp8.quantise import BLOCKS, TILES, dequantise, quantise
from dsv3.fp8.recipe import AFTER_ATTENTION, EXPERTS_UP
from dsv3.infer.paged_cache import PagedLatentCache
from dsv3.model.precision import ORIGINAL
from dsv3.model.stored_fp8 import StoredFp8, WeightOnlyFp8, precision_of_stored
from dsv3.model.transformer import Transformer
from dsv3.native import choose_cpu_kernels
from dsv3.train.optimizer import AdamW

TINY = recipes.tiny().model
CONFIGS = {
    "64 rows of gate and up": TINY,
    "ragged blocks": replace(TINY, hidden_size=200, moe_intermediate_size=136, intermediate_size=300, kv_lora_rank=130),
    "direct queries": replace(TINY, q_lora_rank=None),
}
BATCH = TokenBatch.from_sequences([list(range(100, 140)), [7, 8, 9]])


def pair_of(config) -> tuple[Transformer, Transformer]:
    """Return a model in FP8, and one in FP32 with the very same weights."""
    plain = Transformer(config)
    plain.init_weights(generator=torch.Generator().manual_seed(0))
    plain.requires_grad_(False)
    stored = copy.deepcopy(plain)
    stored.make_room_in_fp8()
    in_fp8 = {name: parameter for name, parameter in stored.named_parameters() if parameter.dtype == BLOCKS.dtype}
    modules = {
        f"{name}.{own}": (module, own)
        for name, module in stored.named_modules()
        for own in vars(type(module)).get("matrices", ())
    }
    for name in in_fp8:
        module, own = modules[name]
        wide, blocks = plain.get_parameter(name), module.in_blocks(own)
        for matrix, values, scales in zip(
            wide.view(-1, *blocks.values.shape[-2:]),
            blocks.values.flatten(0, 1),
            blocks.scales.flatten(0, 1),
            strict=True,
        ):
            made = quantise(matrix, form=BLOCKS)
            values.copy_(made.values)
            scales.copy_(made.scales)
            matrix.copy_(dequantise(made))
    assert len(in_fp8) == len(plain.weights_in_fp8())
    return stored, plain


def close(ours: torch.Tensor, theirs: torch.Tensor, *, tolerance: float) -> bool:
    return (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_computes_what_the_dequantised_model_computes(name, kernels):
    stored, plain = pair_of(CONFIGS[name])
    choose_cpu_kernels(kernels)
    ours, theirs = stored(BATCH, mtp=True), plain(BATCH, mtp=True)
    assert all(
        torch.equal(one.experts, other.experts) for one, other in zip(ours.routings, theirs.routings, strict=True)
    )
    assert close(stored.logits(ours.hidden), plain.logits(theirs.hidden), tolerance=1e-5)
    assert close(ours.mtp[0].hidden, theirs.mtp[0].hidden, tolerance=1e-5)
    one, other = (
        model.predict_ahead(theirs.mtp[0].before_norm, depth=0, batch=theirs.mtp[0].batch)[0].hidden
        for model in (stored, plain)
    )
    assert close(one, other, tolerance=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_in_fp64_it_is_the_dequantised_model(name):
    """In FP64 there are no roundings to hide behind; weights and scales stay as they are."""
    stored, plain = pair_of(CONFIGS[name])
    stored, plain = stored.double(), plain.double()
    assert close(stored(BATCH, mtp=True).mtp[0].hidden, plain(BATCH, mtp=True).mtp[0].hidden, tolerance=1e-12)


def decoded(model: Transformer, ids: list[int], *, prompt: int, dtype: torch.dtype) -> torch.Tensor:
    cache = PagedLatentCache(model.config, num_pages=8, page_tokens=8, num_mtp_modules=0, dtype=dtype, device="cpu")
    parts = [ids[:prompt], *([token] for token in ids[prompt:])]
    states, place = [], 0
    for part in parts:
        positions = torch.arange(place, place + len(part))
        batch = TokenBatch(tokens=torch.tensor(part), positions=positions, starts=torch.tensor([0, len(part)]))
        states.append(model(batch, cache=cache.bound_to([list(range(8))], batch=batch)).hidden)
        place += len(part)
    return torch.cat(states)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 2e-5)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_decoding_over_the_cache_equals_the_full_forward(name, dtype, tolerance):
    stored = pair_of(CONFIGS[name])[0].to(dtype)
    ids = list(range(200, 230))
    whole = stored(TokenBatch.from_sequences([ids])).hidden
    assert close(decoded(stored, ids, prompt=20, dtype=dtype), whole, tolerance=tolerance)


@torch.no_grad()
def test_packed_sequences_equal_each_alone():
    stored, _ = pair_of(CONFIGS["ragged blocks"])
    texts = [list(range(100, 140)), [7, 8, 9], [500]]
    together = stored(TokenBatch.from_sequences(texts)).hidden.split([len(ids) for ids in texts])
    for ids, hidden in zip(texts, together, strict=True):
        assert close(hidden, stored(TokenBatch.from_sequences([ids])).hidden, tolerance=1e-5)


def test_casts_and_moves_leave_weights_in_fp8_with_fp32_scales():
    stored, _ = pair_of(TINY)
    before = {name: tensor.clone() for name, tensor in stored.state_dict().items()}
    for move in (
        lambda m: m.to(torch.bfloat16),
        lambda m: m.to("cpu", torch.float32),
        lambda m: m.double(),
        lambda m: m.half(),
    ):
        state = move(stored).state_dict()
        for name in (name for name, tensor in before.items() if tensor.dtype == BLOCKS.dtype):
            assert state[name].dtype == BLOCKS.dtype
            assert torch.equal(state[name].view(torch.uint8), before[name].view(torch.uint8))
            assert torch.equal(state[f"{name}_scale_inv"], before[f"{name}_scale_inv"])
    assert stored.lm_head.weight.dtype == torch.float16
    assert {tensor.device.type for tensor in stored.to("meta").state_dict().values()} == {"meta"}


def test_an_ordinary_model_has_no_scales():
    model = Transformer(TINY)
    assert not [name for name in model.state_dict() if name.endswith("scale_inv")]
    assert model.stored_precision() is ORIGINAL


@torch.no_grad()
def test_a_precision_that_knows_no_scales_is_refused():
    stored, _ = pair_of(TINY)
    with pytest.raises(AssertionError, match="without its scales"):
        stored(BATCH, precision=ORIGINAL)


def test_it_cannot_be_trained():
    stored, _ = pair_of(TINY)
    assert not any(parameter.requires_grad for parameter in stored.parameters())
    stored(BATCH)  # nothing asks for gradients
    stored.embed_tokens.weight.requires_grad_(True)
    with pytest.raises(ConfigError, match="weights are in FP8, which is for use only; load it with dtype 'float32'"):
        stored(BATCH)
    with pytest.raises(ConfigError, match=r"weights are in FP8, such as layers.0.self_attn.q_a_proj.weight"):
        AdamW(stored.named_parameters(), config=OptimConfig())


@pytest.fixture
def hopper(monkeypatch):
    """Choose as on an H100, and compute here."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    chosen = lambda weights, device: precision_of_stored(weights, device=torch.device("cuda"))  # noqa: E731
    monkeypatch.setattr("dsv3.model.transformer.precision_of_stored", chosen)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_on_a_gpu_with_fp8_activations_are_quantised_too(name, hopper):
    """Fact sheet 1.6: 1 x 128 tiles, scales that are not rounded to powers of two, as the published code multiplies."""
    stored, plain = pair_of(CONFIGS[name])
    precision = stored.stored_precision()
    assert isinstance(precision, StoredFp8)
    ours, theirs = stored.layers[-1].mlp, plain.layers[-1].mlp
    x = torch.randn(6, stored.config.hidden_size, generator=torch.Generator().manual_seed(1))
    rounded = dequantise(quantise(x, form=TILES))
    for product in (
        precision.products(x, ours.shared_experts.up_proj.weight)[0],
        precision.products(x, ours.shared_experts.up_proj.weight, site=AFTER_ATTENTION)[0],
    ):
        assert close(product, rounded @ theirs.shared_experts.up_proj.weight.T, tolerance=1e-5)
    counts = [0] * stored.config.n_routed_experts
    counts[2], counts[5] = 4, 2
    both = precision.expert_products(x, weight=ours.experts.gate_up_proj, rows_per_expert=counts, site=EXPERTS_UP)
    first, second = theirs.experts.gate_up_proj[2], theirs.experts.gate_up_proj[5]
    assert close(both, torch.cat([rounded[:4] @ first.T, rounded[4:] @ second.T]), tolerance=1e-5)


@torch.no_grad()
def test_on_a_gpu_with_fp8_decoding_reads_the_up_projection_in_fp8(hopper):
    """Every product rounds its input, so results are near and not equal: about 2^-4 of each, summed over layers."""
    stored, plain = pair_of(replace(TINY, first_k_dense_replace=TINY.num_hidden_layers, num_nextn_predict_layers=0))
    ids = list(range(200, 220))
    whole = plain(TokenBatch.from_sequences([ids])).hidden
    got = decoded(stored, ids, prompt=10, dtype=torch.float32)
    assert 0 < (got - whole).norm() / whole.norm() < 0.1
    weight = stored.layers[0].self_attn.kv_b_proj.weight
    matrix = stored.stored_precision().matrix(weight, dtype=torch.float32)
    assert torch.equal(matrix, plain.layers[0].self_attn.kv_b_proj.weight)


def test_a_gpu_without_fp8_computes_as_if_dequantised(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert isinstance(precision_of_stored({}, device=torch.device("cuda")), WeightOnlyFp8)
