"""Report 3.3 as far as it concerns files: E4M3 weights in 128 x 128 blocks, as in the published checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from dsv3.checkpoint.names import published_shapes
from dsv3.checkpoint.published import load_published, save_published
from dsv3.config.published import published_from_model_config

IN_BF16 = ("embed_tokens", "lm_head", "norm", "mlp.gate.", "eh_proj", "shared_head")
"""Parts of a name that the report keeps in their original precision: embedding, head, gate, norms; and eh_proj."""


def e4m3_value(byte: int) -> float:
    """One sign, four exponent and three mantissa bits, bias 7, no infinities: written out."""
    sign, exponent, mantissa = byte >> 7, (byte >> 3) & 15, byte & 7
    size = mantissa / 8 * 2.0**-6 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)
    return -size if sign else size


E4M3 = np.array([e4m3_value(byte) if byte & 127 != 127 else np.nan for byte in range(256)])


@pytest.fixture
def config(shrunk):
    """Matrices of more than one block each way, with ragged ones at both edges."""
    return replace(shrunk.model, hidden_size=160, intermediate_size=272, num_hidden_layers=4, n_routed_experts=16)


@pytest.fixture
def fp8_folder(config, tmp_path, make_model, shrunk):
    """A checkpoint as DeepSeek published it, with random bytes for its weights, and the values those bytes mean."""
    model = make_model(replace(shrunk, model=config)).float()
    save_published(model, folder=tmp_path / "plain", tokenizer_folder=None)
    [file] = (tmp_path / "plain").glob("*.safetensors")
    generator = np.random.default_rng(0)
    stored, meant = {}, {}
    for name, tensor in load_file(file).items():
        if any(part in name for part in IN_BF16):
            stored[name], meant[name] = tensor, tensor.double().numpy()
            continue
        rows, columns = tensor.shape
        bits = generator.integers(0, 256, size=(rows, columns), dtype=np.uint8)
        bits[bits & 127 == 127] = 3  # no NaN
        scales = generator.uniform(1e-4, 1e-2, size=(-(-rows // 128), -(-columns // 128))).astype(np.float32)
        stored[name] = torch.from_numpy(bits).view(torch.float8_e4m3fn)
        stored[f"{name}_scale_inv"] = torch.from_numpy(scales)
        value = np.empty((rows, columns))
        for row in range(rows):
            for column in range(columns):
                value[row, column] = E4M3[bits[row, column]] * float(scales[row // 128, column // 128])
        meant[name] = value
    folder = tmp_path / "fp8"
    folder.mkdir()
    save_file(stored, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps(published_from_model_config(config, dtype="bfloat16", quantized=True))
    )
    return folder, meant


def test_fp8_weights_are_the_byte_times_the_multiplier_of_its_128_by_128_block(fp8_folder, config):
    """Catches: a division by `weight_scale_inv`, whose name says the opposite of what it is; blocks transposed; ragged
    last blocks padded into the matrix."""
    folder, meant = fp8_folder
    model = load_published(folder, dtype=torch.float32, device="cpu")
    state = model.state_dict()
    for ours, theirs in (
        ("layers.0.self_attn.o_proj.weight", "model.layers.0.self_attn.o_proj.weight"),
        ("layers.1.mlp.down_proj.weight", "model.layers.1.mlp.down_proj.weight"),
        ("layers.3.mlp.shared_experts.up_proj.weight", "model.layers.3.mlp.shared_experts.up_proj.weight"),
        ("mtp.0.block.self_attn.q_b_proj.weight", "model.layers.4.self_attn.q_b_proj.weight"),
    ):
        np.testing.assert_allclose(state[ours].double().numpy(), meant[theirs], rtol=1e-6)
    stacked = state["layers.3.mlp.experts.gate_up_proj"].double().numpy()
    for expert in range(16):
        halves = [meant[f"model.layers.3.mlp.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up")]
        np.testing.assert_allclose(stacked[expert], np.concatenate(halves), rtol=1e-6)
    assert meant["model.layers.1.mlp.down_proj.weight"].shape == (160, 272)


def test_the_published_files_have_91_991_tensors_and_ragged_scales(published):
    """Catches: scales for embedding, head, gate or eh_proj, which stay in BF16; layer 61 left out."""
    shapes = published_shapes(published.model, quantized=True)
    assert len(shapes) == 91_991
    assert shapes["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale_inv"] == (5, 56)
    assert shapes["model.layers.61.eh_proj.weight"] == (7168, 14_336)
    scaled = {name for name in shapes if name.endswith("_scale_inv")}
    assert not any(part in name for name in scaled for part in IN_BF16)
    assert len([name for name in scaled if name.startswith("model.layers.61.")]) == 5 + 3 * 256 + 3


def test_the_exported_config_keeps_the_fields_that_decide_the_routing(config, tmp_path, make_model, shrunk):
    """Catches: transformers, which drops `scoring_func`, `topk_method` and `moe_layer_freq` on saving, so that
    llama.cpp takes softmax gates in silence."""
    save_published(make_model(replace(shrunk, model=config)), folder=tmp_path / "export", tokenizer_folder=None)
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    expected = {
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "moe_layer_freq": 1,
        "n_group": 8,
        "topk_group": 4,
        "norm_topk_prob": True,
        "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 1,
        "first_k_dense_replace": 3,
    }
    assert {key: written[key] for key in expected} == expected
    assert written.get("rope_scaling") is None
