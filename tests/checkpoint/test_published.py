import json

import pytest
import torch
from safetensors import safe_open

from dsv3.batch import TokenBatch
from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import convert_published, exchange_halves, load_published, save_published
from dsv3.errors import CheckpointError
from dsv3.fp8.blocks import quantise_blocks

BATCH = TokenBatch.from_sequences([[3, 1, 4, 1, 5, 9, 2, 6], [5, 35, 8, 9, 7]])


def states_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    assert one.keys() == other.keys()
    return all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"q_lora_rank": None, "n_shared_experts": 2},
        {"n_shared_experts": 0, "num_nextn_predict_layers": 3},
        {"num_nextn_predict_layers": 0, "first_k_dense_replace": 0},
        {"topk_method": "group_limited_greedy", "scoring_func": "softmax"},
    ],
)
def test_a_model_comes_back_from_its_files_bit_for_bit(tmp_path, make_model, change):
    model = make_model(**change)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32, max_shard_bytes=9_000)
    back = load_published(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert back.config == model.config
    assert states_equal(back, model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_cast_on_loading_and_router_biases_are_not(folder, make_model, dtype):
    loaded = load_published(folder, dtype=dtype, device="cpu").state_dict()
    for name, tensor in make_model().state_dict().items():
        kept = torch.float32 if name.endswith("bias") else dtype
        assert loaded[name].dtype == kept, name
        assert torch.equal(loaded[name], tensor.to(kept)), name


def test_a_loaded_model_can_be_trained(folder):
    model = load_published(folder, dtype=torch.float32, device="cpu")
    output = model(BATCH, mtp=True)
    (model.logits(output.hidden).sum() + output.mtp[0].hidden.sum()).backward()
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in model.parameters())


def test_one_file_without_an_index_is_read_too(folder, rewrite, make_model):
    rewrite(folder, lambda tensors: None)
    assert states_equal(load_published(folder, dtype=torch.float32, device="cpu"), make_model())


def test_a_model_that_reads_the_hidden_state_first_is_written_in_the_published_order(tmp_path, make_model):
    model = make_model(mtp_concat_order="hidden_first", num_nextn_predict_layers=2)
    save_published(model, folder=tmp_path / "out", tokenizer_folder=None, dtype=torch.float32)
    back = load_published(tmp_path / "out", dtype=torch.float32, device="cpu")
    assert back.config.mtp_concat_order == "embedding_first"
    assert torch.equal(back.mtp[1].eh_proj.weight, torch.roll(model.mtp[1].eh_proj.weight, 24, dims=1))
    model.double(), back.double()
    for ours, theirs in zip(model(BATCH, mtp=True).mtp, back(BATCH, mtp=True).mtp, strict=True):
        assert torch.allclose(ours.hidden, theirs.hidden, rtol=1e-9, atol=1e-9)


def test_loading_without_the_exchange_would_be_noticed(make_model):
    model = make_model()
    before = model(BATCH, mtp=True).mtp[0].hidden
    model.mtp[0].eh_proj.weight.data = exchange_halves(model.mtp[0].eh_proj.weight.data)
    assert not torch.allclose(before, model(BATCH, mtp=True).mtp[0].hidden, rtol=0.1)


def test_a_copy_that_differs_from_the_main_models_tensor_is_said_and_not_used(folder, rewrite, make_model, caplog):
    rewrite(folder, lambda tensors: tensors["model.layers.2.embed_tokens.weight"].add_(1))
    model = load_published(folder, dtype=torch.float32, device="cpu")
    assert ["model.layers.2.embed_tokens.weight differs" in message for message in caplog.messages] == [True]
    assert states_equal(model, make_model())


def test_equal_copies_are_not_worth_a_word(folder, caplog):
    load_published(folder, dtype=torch.float32, device="cpu")
    assert caplog.messages == []


def test_what_had_to_be_assumed_is_logged(folder, edit_config, caplog):
    edit_config(folder, scoring_func=None)
    load_published(folder, dtype=torch.float32, device="cpu")
    assert ["scoring_func" in message and "'sigmoid'" in message for message in caplog.messages] == [True]


def test_an_fp8_checkpoint_with_ragged_blocks_loads_as_the_model_it_stands_for(
    tmp_path, make_model, rewrite, edit_config
):
    model = make_model(hidden_size=200, intermediate_size=300, kv_lora_rank=130, moe_intermediate_size=140)
    folder = tmp_path / "out"
    save_published(model, folder=folder, tokenizer_folder=None, dtype=torch.float32)
    expected = {}

    def quantise(tensors):
        for tensor in published_layout(model.config):
            value = tensors[tensor.name]
            if tensor.in_fp8:
                weight, scale = quantise_blocks(value)
                tensors |= {tensor.name: weight, f"{tensor.name}_scale_inv": scale}
                value = weight.float()
                for i, row in enumerate(scale):
                    for j, factor in enumerate(row):  # the definition, block by block
                        value[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)] *= factor
            expected[tensor.name] = value

    rewrite(folder, quantise)
    block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
    edit_config(folder, quantization_config=block)
    loaded = load_published(folder, dtype=torch.float32, device="cpu")
    state = loaded.state_dict()
    for tensor in published_layout(model.config):
        assert torch.equal(tensor.part_of(state[tensor.source]), expected[tensor.name]), tensor.name
    convert_published(folder, folder=tmp_path / "plain", dtype=torch.float32)
    assert states_equal(load_published(tmp_path / "plain", dtype=torch.float32, device="cpu"), loaded)
    assert "quantization_config" not in json.loads((tmp_path / "plain" / "config.json").read_text())


def test_converting_restores_the_copies_and_the_fields_that_the_source_has_lost(folder, tmp_path, rewrite, edit_config):
    names = ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight")
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in names])
    edit_config(folder, scoring_func=None, topk_method=None, moe_layer_freq=None)
    convert_published(folder, folder=tmp_path / "whole", dtype=torch.float32)
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert [config[name] for name in ("scoring_func", "topk_method", "moe_layer_freq")] == ["sigmoid", "noaux_tc", 1]
    with safe_open(tmp_path / "whole" / "model-00001-of-00001.safetensors", framework="pt") as file:
        assert torch.equal(file.get_tensor(names[0]), file.get_tensor("model.embed_tokens.weight"))
        assert torch.equal(file.get_tensor(names[1]), file.get_tensor("lm_head.weight"))


def test_converting_takes_tokenizer_and_generation_settings_along(folder, tmp_path):
    (folder / "tokenizer.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    convert_published(folder, folder=tmp_path / "copy", dtype=torch.bfloat16)
    assert (tmp_path / "copy" / "tokenizer.json").read_text() == "{}"
    assert json.loads((tmp_path / "copy" / "generation_config.json").read_text()) == {"temperature": 0.6}


def test_a_folder_is_not_converted_onto_itself(folder):
    with pytest.raises(CheckpointError, match="onto itself"):
        convert_published(folder, folder=folder.parent / "x" / ".." / folder.name, dtype=torch.float32)
