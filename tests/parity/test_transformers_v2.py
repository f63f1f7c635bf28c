"""transformers' DeepseekV2ForCausalLM computes what we compute under V2's routing: softmax, best expert of a group."""

import pytest
import torch

from dsv3.checkpoint.published import load_published, save_published
from dsv3.config import YarnConfig

V2 = {"scoring_func": "softmax", "norm_topk_prob": False, "first_k_dense_replace": 1}
YARN = YarnConfig(factor=8.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707)
MODELS = {
    "16B: greedy, no query latent": {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "q_lora_rank": None},
    "236B: best expert of a group": {"topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0},
    "greedy passes over groups": {"topk_method": "greedy", "n_shared_experts": 2, "rope_scaling": YARN},
    "groups and YaRN": {"topk_method": "group_limited_greedy", "rope_scaling": YARN, "topk_group": 1},
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_transformers_and_we_agree_on_v2_models_both_ways(
    tmp_path, make_model, load_with_transformers, sequences, largest_difference, change
):
    model = make_model(**V2 | change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    theirs = load_with_transformers(tmp_path / "out")
    assert type(theirs).__name__ == "DeepseekV2ForCausalLM"
    assert largest_difference(model, theirs, sequences=sequences) < 1e-4
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_published(tmp_path / "theirs", dtype=torch.float32, device="cpu")
    assert back.config == model.config
    assert all(torch.equal(value, back.state_dict()[name]) for name, value in model.state_dict().items())
