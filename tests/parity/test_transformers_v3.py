"""transformers' DeepseekV3ForCausalLM computes what we compute: both ways through the files, forward and backward."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from dsv3.batch import TokenBatch
from dsv3.checkpoint.published import load_published, save_published
from dsv3.config import YarnConfig

YARN = YarnConfig(factor=8.0, original_max_position_embeddings=32)
TOLERANCE = 1e-4
"""Of a token's logits, relative to their norm, in FP32."""

SAME_NAMES = (
    "initializer_range",
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "first_k_dense_replace",
    "n_routed_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
)
"""Fields of DeepseekV3Config that are called as ours are."""

MODELS = {
    "groups and YaRN": {"rope_scaling": YARN},
    "without YaRN": {},
    "without a query latent": {"rope_scaling": YARN, "q_lora_rank": None},
    "one group": {"n_group": 1, "topk_group": 1, "rope_scaling": YARN},
    "half of the groups, two experts each": {"n_group": 8, "topk_group": 4},
    "all layers of experts, two shared": {"first_k_dense_replace": 0, "n_shared_experts": 2},
    "dense layers only": {"first_k_dense_replace": 3},
    "gates not normalised": {"norm_topk_prob": False, "routed_scaling_factor": 1.7},
    "YaRN of the 16B model": {"rope_scaling": YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707)},
    "YaRN that scales cos and sin": {
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.0)
    },
    "YaRN with unequal mscales": {
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=32, mscale=1.0, mscale_all_dim=0.5)
    },
    "other theta": {"rope_theta": 500.0, "rope_scaling": YARN},
    "wider and deeper": {
        "hidden_size": 128,
        "num_hidden_layers": 5,
        "num_attention_heads": 8,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "q_lora_rank": 48,
        "kv_lora_rank": 40,
        "n_routed_experts": 32,
        "num_experts_per_tok": 6,
        "rope_scaling": YARN,
    },
}


@pytest.mark.parametrize("change", MODELS.values(), ids=MODELS.keys())
def test_transformers_loads_our_export_and_agrees_on_every_logit(
    tmp_path, make_model, load_with_transformers, sequences, largest_difference, change
):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32, max_shard_bytes=200_000)
    theirs = load_with_transformers(tmp_path / "out")
    assert type(theirs).__name__ == "DeepseekV3ForCausalLM"
    assert largest_difference(model, theirs, sequences=sequences) < TOLERANCE


@pytest.mark.parametrize("yarn", [None, YARN])
def test_we_load_what_transformers_saved_and_agree_on_every_logit(
    tmp_path, make_model, load_with_transformers, sequences, largest_difference, yarn, caplog
):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    rope = {"rope_type": "default", "rope_theta": 10000.0}
    if yarn is not None:
        rope |= {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32, "mscale": 1.0}
        rope |= {"mscale_all_dim": 1.0}
    sizes = {name: getattr(make_model().config, name) for name in SAME_NAMES}
    torch.manual_seed(3)
    theirs = DeepseekV3ForCausalLM(DeepseekV3Config(**sizes, num_key_value_heads=4, rope_parameters=rope))
    for name, buffer in theirs.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_(-0.5, 0.6)
    theirs.save_pretrained(tmp_path / "theirs")
    saved = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert saved.keys().isdisjoint({"scoring_func", "topk_method", "moe_layer_freq"})  # what the next lines are about

    ours = load_published(tmp_path / "theirs", dtype=torch.float32, device="cpu")
    assert largest_difference(ours, theirs.eval(), sequences=sequences) < TOLERANCE
    assert [sum(name in message for message in caplog.messages) for name in ("scoring_func", "without MTP")] == [1, 1]


def test_a_round_through_transformers_changes_no_weight(tmp_path, make_model, load_with_transformers):
    model = make_model(rope_scaling=YARN, num_nextn_predict_layers=1)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    load_with_transformers(tmp_path / "out").save_pretrained(tmp_path / "theirs")
    back = load_published(tmp_path / "theirs", dtype=torch.float32, device="cpu").state_dict()
    main = {name: value for name, value in model.state_dict().items() if not name.startswith("mtp.")}
    assert back.keys() == main.keys()
    assert all(torch.equal(back[name], value) for name, value in main.items())


@pytest.mark.parametrize("change", [{"rope_scaling": YARN}, {"q_lora_rank": None, "n_shared_experts": 2}])
def test_gradients_of_the_loss_agree_for_every_parameter(
    tmp_path, make_model, load_with_transformers, sequences, change
):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    theirs = load_with_transformers(tmp_path / "out").train()
    ids = torch.tensor([sequences[-1]])
    loss = theirs(ids, labels=ids).loss
    loss.backward()

    batch = TokenBatch.from_rows(ids)
    ours = F.cross_entropy(model.logits(model(batch).hidden), batch.targets)
    ours.backward()
    assert ours.item() == pytest.approx(loss.item(), rel=1e-5)
    expected = {name.removeprefix("model."): parameter.grad for name, parameter in theirs.named_parameters()}
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 0, name
        assert (found[name] - gradient).norm() / gradient.norm() < 1e-3, name


@pytest.mark.parametrize("depths", [1, 2])
def test_mtp_modules_agree_with_the_ones_of_transformers(
    tmp_path, make_model, load_with_transformers, sequences, depths
):
    from transformers.modeling_layers import MtpLayer
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as v3

    model = make_model(rope_scaling=YARN, num_nextn_predict_layers=depths)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    theirs = load_with_transformers(tmp_path / "out")
    file = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
    ids = torch.tensor([sequences[-1]])
    with torch.no_grad():
        found = model(TokenBatch.from_sequences([sequences[-1]]), mtp=True).mtp
        hidden = theirs.model(ids).last_hidden_state
        for depth in range(depths):
            module = MtpLayer(theirs.config, v3.DeepseekV3DecoderLayer, v3.DeepseekV3RMSNorm, layer_idx=3)
            module.load_state_dict(mtp_state(file, layer=3 + depth, experts=16))
            # Place i reads the state of token i and the embedding of the token `depth + 1` further on.
            hidden, embedded = hidden[:, :-1], theirs.model.embed_tokens(ids[:, depth + 1 :])
            positions = torch.arange(hidden.shape[1])[None]
            rotary = theirs.model.rotary_emb(hidden, positions)
            hidden = module(embedded, hidden, rotary, None, positions, None)
            difference = (found[depth].hidden - hidden[0]).norm(dim=-1) / hidden[0].norm(dim=-1)
            assert difference.max() < TOLERANCE


def mtp_state(file, *, layer, experts):
    """The tensors of one published MTP module under the names of transformers' MtpLayer."""
    prefix = f"model.layers.{layer}."
    state = {name.removeprefix(prefix): value for name, value in file.items() if name.startswith(prefix)}
    parts = {
        part: torch.stack([state.pop(f"mlp.experts.{expert}.{part}.weight") for expert in range(experts)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    state["mlp.experts.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), dim=1)
    state["mlp.experts.down_proj"] = parts["down_proj"]
    own = {name: state.pop(name) for name in ("enorm.weight", "hnorm.weight", "eh_proj.weight")}
    own["post_norm.weight"] = state.pop("shared_head.norm.weight")
    del state["embed_tokens.weight"], state["shared_head.head.weight"]
    return own | {f"mtp_block.{name}": value for name, value in state.items()}
