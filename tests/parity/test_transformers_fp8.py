"""transformers reads our FP8 export as we do, and what FP8 changes is what its number format says it must.

Without a GPU transformers dequantises while it loads. Tested with 5.23; three things about that version:

- it asks for the package accelerate, of which nothing is used on one device, so the question is answered here;
- asked for FP32 it leaves in BF16 what is stored in BF16, and then cannot multiply: all is cast once more;
- it takes the blocks of a matrix to be of equal size. The last test here says what that does to a last block that the
  edge cuts off; `write_published` warns of it.
"""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import load_published, save_published
from dsv3.config import YarnConfig
from dsv3.fp8.quantise import Quantised, dequantise

FP8 = torch.float8_e4m3fn
TOLERANCE = 1e-5
"""Of a token's logits, relative to their norm, in FP32: two programs, one and the same set of weights."""

SIZES = {
    "hidden_size": 256,
    "q_lora_rank": 128,
    "kv_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 384,
    "moe_intermediate_size": 128,
    "initializer_range": 0.05,
    "num_nextn_predict_layers": 1,
}
"""Every side of a matrix is a number of whole blocks, or less than one."""

MODELS = {
    "groups and YaRN": {"rope_scaling": YarnConfig(factor=8.0, original_max_position_embeddings=32)},
    "without a query latent, two shared": {"q_lora_rank": None, "n_shared_experts": 2},
    "less than a block": {"hidden_size": 100, "q_lora_rank": 60, "intermediate_size": 90, "moe_intermediate_size": 52},
}

ALL_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 4, "n_group": 1, "topk_group": 1}
"""Every token goes to every expert, so that logits are a smooth function of the weights."""
CUT_OFF = {"hidden_size": 200, "intermediate_size": 300, "kv_lora_rank": 130, "moe_intermediate_size": 140}

FACTOR = 1.25
"""How far the size of the change may be from the predicted one. Over 4,000 logits that depend on a million rounded
weights, chance and the second order are a few percent."""


@pytest.fixture
def load_fp8(load_with_transformers, monkeypatch):
    """Load a published FP8 folder with transformers, dequantised, all of it in FP32."""
    import transformers
    from transformers.quantizers import quantizer_finegrained_fp8

    monkeypatch.setattr(quantizer_finegrained_fp8, "is_accelerate_available", lambda: True)
    how = transformers.FineGrainedFP8Config(dequantize=True)

    def load(folder):
        theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=how)
        return theirs.float()

    return load


@pytest.fixture
def export(tmp_path, make_model):
    """Write a model, whose blocks differ in size by up to 8, in FP8; return it and the folder."""

    def write(**change):
        model = make_model(**SIZES | change)
        generator = torch.Generator().manual_seed(2)
        for _, weight in fp8_parts(model, model.state_dict()):
            for _, block in blocks(weight):
                block *= 2.0 ** torch.randint(-2, 2, (), generator=generator)
        save_published(model, folder=tmp_path / "fp8", tokenizer_folder=None, dtype=FP8)
        return model, tmp_path / "fp8"

    return write


def fp8_parts(model, tensors):
    """The parts of the named tensors that are stored in FP8, by their published names."""
    layout = published_layout(model.config)
    return [(tensor.name, tensor.part_of(tensors[tensor.source])) for tensor in layout if tensor.in_fp8]


def blocks(matrix):
    """All blocks of 128 x 128, with the row and column they begin at."""
    rows, columns = matrix.shape
    return [
        ((row, column), matrix[row : row + 128, column : column + 128])
        for row in range(0, rows, 128)
        for column in range(0, columns, 128)
    ]


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_transformers_reads_the_same_weights_and_agrees_on_every_logit(
    export, load_fp8, sequences, largest_difference, change
):
    _, folder = export(**change)
    ours, theirs = load_published(folder, dtype=torch.float32, device="cpu"), load_fp8(folder)
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    found = {name.removeprefix("model."): value for name, value in theirs.state_dict().items()}
    main = {name: value for name, value in ours.state_dict().items() if not name.startswith("mtp.")}
    assert all(torch.equal(found[name], value) for name, value in main.items())
    assert largest_difference(ours, theirs, sequences=sequences) < TOLERANCE


@pytest.mark.parametrize("change", [{}, CUT_OFF], ids=["whole blocks", "blocks cut off"])
def test_logits_move_by_what_rounding_to_e4m3_must_move_them(export, load_fp8, sequences, change):
    """The size of the change is predicted from the unrounded model alone, to first order.

    Logits y depend on weights w; rounding changes w by e, and y by J e to first order. The rounding errors of many
    weights are as good as independent and uniform over one step of the format, so that E e^2 = step^2 / 12 and

        E |J e|^2 = sum over weights of |J_w|^2 step_w^2 / 12.

    For random signs r, E (r . J_w)^2 = |J_w|^2, and r . J_w is one backward pass.

    The step of E4M3 is 2^-3 of the power of two below a weight, at least 2^-9, all times the largest of the block over
    448. So an error is 2^-4 of a weight at most; uniform errors are 1/sqrt(3) of that, and the sum adds them up as they
    reach the logits. What is stored in BF16 has the step 2^-7.
    """
    model, folder = export(**ALL_EXPERTS | change)
    batch = TokenBatch.from_sequences(sequences)
    if change:  # which transformers cannot read
        moved = logits_of(load_published(folder, dtype=torch.float32, device="cpu"), batch)
    else:
        theirs = load_fp8(folder)
        with torch.no_grad():
            moved = torch.cat([theirs(torch.tensor([ids])).logits[0] for ids in sequences])
    found = (moved - logits_of(model, batch)).norm()
    predicted = predicted_change(model, batch)
    assert predicted / FACTOR < found < predicted * FACTOR


def test_the_prediction_would_notice_multipliers_in_the_wrong_place(export, sequences):
    model, folder = export(**ALL_EXPERTS, moe_intermediate_size=256, v_head_dim=64)
    [file] = folder.glob("*.safetensors")
    tensors = load_file(file)
    for name, value in tensors.items():
        if name.endswith("_scale_inv") and value.shape[0] == value.shape[1]:
            tensors[name] = value.T.contiguous()
    save_file(tensors, file)
    batch = TokenBatch.from_sequences(sequences)
    swapped = load_published(folder, dtype=torch.float32, device="cpu")
    found = (logits_of(swapped, batch) - logits_of(model, batch)).norm()
    assert found > 2 * predicted_change(model, batch)


@torch.no_grad()
def logits_of(model, batch):
    return model.logits(model(batch).hidden)


def predicted_change(model, batch, *, passes=8):
    """The expected size of the change of all logits when the model is written in FP8, to first order."""
    variances = {name: variance(value.detach().double(), bits=7) for name, value in model.named_parameters()}
    for (_, weight), (_, found) in zip(fp8_parts(model, model.state_dict()), fp8_parts(model, variances), strict=True):
        for (_, block), (_, target) in zip(blocks(weight.double()), blocks(found), strict=True):
            scale = block.abs().max() / 448
            target.copy_(scale**2 * variance(block / scale, bits=3, lowest_exponent=-6))
    generator, squares = torch.Generator().manual_seed(0), 0.0
    for _ in range(passes):
        model.zero_grad()
        logits = model.logits(model(batch).hidden)
        signs = torch.randint(0, 2, logits.shape, generator=generator) * 2.0 - 1.0
        (logits * signs).sum().backward()
        squares += sum(
            float((parameter.grad.double().square() * variances[name]).sum())
            for name, parameter in model.named_parameters()
            if parameter.grad is not None  # MTP modules have no part in these logits
        )
    return (squares / passes) ** 0.5


def variance(value, *, bits, lowest_exponent=-126):
    """Of the error of rounding to a format with so many bits after the point."""
    exponent = torch.log2(value.abs()).floor().clamp_min(lowest_exponent)
    return torch.exp2(exponent - bits).square() / 12


def test_why_cut_off_blocks_are_warned_of(export, load_fp8):
    """A matrix of 160 rows has a block of 128 and one of 32; transformers takes two of 80."""
    _, folder = export(kv_lora_rank=128)
    name = "layers.0.self_attn.kv_a_proj_with_mqa.weight"
    tensors = load_file(next(folder.glob("*.safetensors")))
    stored = Quantised(values=tensors[f"model.{name}"], scales=tensors[f"model.{name}_scale_inv"], tile=(128, 128))
    assert stored.values.shape[0] == 160
    ours = load_published(folder, dtype=torch.float32, device="cpu").state_dict()[name]
    assert torch.equal(ours, dequantise(stored))
    theirs = load_fp8(folder).state_dict()[f"model.{name}"]
    assert torch.equal(theirs, dequantise(replace(stored, tile=(80, 128))))
    assert not torch.equal(theirs, ours)
