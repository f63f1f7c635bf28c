import json

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv3.batch import TokenBatch
from dsv3.checkpoint.gguf import convert_gguf, save_gguf
from dsv3.checkpoint.gguf_layout import gguf_layout
from dsv3.checkpoint.names import published_layout
from dsv3.checkpoint.published import save_published
from dsv3.config import YarnConfig
from dsv3.data.special_tokens import BOS, EOS, THINK_BEGIN, USER
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, ConfigError, TokenizerError

gguf = pytest.importorskip("gguf", reason="the package gguf is not installed")

PROSE = [
    "In the beginning there was a word, and 1234 words came after it.\n",
    "却说天下大势，分久必合。",
    "x = [1, 2]\n",
]
DIRECT = {"q_lora_rank": None, "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False}
"""As the 16B model of V2 has it."""


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(PROSE * 3, vocab_size=330)


def written(file):
    """Return the tensors of a file in FP32, shaped as torch has them, and its settings."""
    reader = gguf.GGUFReader(file)
    tensors = {
        tensor.name: torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        .float()
        .reshape(*reversed(tensor.shape.tolist()))
        for tensor in reader.tensors
    }
    return tensors, {name: field.contents() for name, field in reader.fields.items()}


@pytest.mark.parametrize("change", [{}, DIRECT], ids=["v3", "v2-lite"])
def test_every_weight_of_the_main_model_is_in_the_file_once(make_model, tmp_path, change):
    model = make_model(**change)
    save_gguf(model, file=tmp_path / "m.gguf", kind="f32", tokenizer=None)
    tensors, _ = written(tmp_path / "m.gguf")
    state, config = model.state_dict(), model.config
    main = [t for t in published_layout(config) if f"layers.{config.num_hidden_layers}." not in t.name]
    expected = {tensor.name: tensor.part_of(state[tensor.source]) for tensor in main}
    for tensor in gguf_layout(config):
        stored = tensors.pop(tensor.name)
        if tensor.name.endswith("attn_k_b.weight"):
            heads = expected[tensor.parts[0].name].unflatten(0, (config.num_attention_heads, -1))
            values = tensors[tensor.name.replace("k_b", "v_b")]
            assert torch.equal(torch.cat((stored.transpose(1, 2), values), dim=1), heads)
        elif tensor.name.endswith("attn_v_b.weight"):
            continue
        elif len(tensor.parts) > 1:
            assert torch.equal(stored, torch.stack([expected[part.name] for part in tensor.parts]))
        else:
            assert torch.equal(stored, expected[tensor.parts[0].name])
    assert not tensors
    assert {part.name for tensor in gguf_layout(config) for part in tensor.parts} == expected.keys()


def test_a_published_folder_and_its_model_give_the_same_file(make_model, tmp_path, tokenizer):
    model = make_model(vocab_size=400)
    tokenizer.save(tmp_path / "tokenizer")
    save_published(
        model,
        folder=tmp_path / "model",
        tokenizer_folder=tmp_path / "tokenizer",
        dtype=torch.float32,
        max_shard_bytes=8_000,
    )
    (tmp_path / "a").mkdir()
    save_gguf(model, file=tmp_path / "a" / "m.gguf", kind="bf16", tokenizer=Tokenizer.from_file(tmp_path / "tokenizer"))
    convert_gguf(tmp_path / "model", file=tmp_path / "m.gguf", kind="bf16")
    assert (tmp_path / "m.gguf").read_bytes() == (tmp_path / "a" / "m.gguf").read_bytes()


@pytest.mark.parametrize(("kind", "relative"), [("f16", 2**-11), ("bf16", 2**-8), ("q8_0", 0.5 / 127)])
def test_a_narrower_type_rounds_to_the_nearest(make_model, tmp_path, kind, relative):
    model = make_model(hidden_size=64, kv_lora_rank=32, qk_nope_head_dim=5)
    save_gguf(model, file=tmp_path / "exact.gguf", kind="f32", tokenizer=None)
    save_gguf(model, file=tmp_path / "m.gguf", kind=kind, tokenizer=None)
    exact, _ = written(tmp_path / "exact.gguf")
    tensors, _ = written(tmp_path / "m.gguf")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    for name, value in exact.items():
        if value.dim() == 1 or name.endswith("ffn_gate_inp.weight"):
            assert kinds[name] == "F32"
            assert torch.equal(tensors[name], value)
        elif kind == "q8_0" and value.shape[-1] % 32:
            assert kinds[name] == "F16"
        else:
            assert kinds[name] == kind.upper()
            # Of Q8_0 the step follows the largest value of its 32, and is itself rounded to FP16.
            largest = value.unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True) if kind == "q8_0" else value.abs()
            error = (tensors[name] - value).abs()
            bound = largest * relative * 1.13 + 1e-7
            assert (error.unflatten(-1, (-1, 32)) <= bound if kind == "q8_0" else error <= bound).all(), name


def test_settings_are_named_as_the_format_has_them(make_model, tmp_path, tokenizer):
    yarn = YarnConfig(factor=8.0, original_max_position_embeddings=64)
    model = make_model(vocab_size=400, rope_scaling=yarn, n_routed_experts=8, n_group=4, topk_group=2)
    save_gguf(model, file=tmp_path / "little.gguf", kind="q8_0", tokenizer=tokenizer)
    _, settings = written(tmp_path / "little.gguf")
    assert (
        settings
        | {
            "general.architecture": "deepseek2",
            "general.name": "little",
            "general.file_type": 7,
            "deepseek2.block_count": 2,
            "deepseek2.leading_dense_block_count": 1,
            "deepseek2.attention.head_count": 2,
            "deepseek2.attention.head_count_kv": 1,
            "deepseek2.attention.q_lora_rank": 10,
            "deepseek2.attention.kv_lora_rank": 6,
            "deepseek2.attention.key_length": 10,
            "deepseek2.attention.value_length": 6,
            "deepseek2.attention.key_length_mla": 9,
            "deepseek2.attention.value_length_mla": 7,
            "deepseek2.rope.dimension_count": 4,
            "deepseek2.rope.scaling.type": "yarn",
            "deepseek2.rope.scaling.original_context_length": 64,
            "deepseek2.expert_count": 8,
            "deepseek2.expert_used_count": 2,
            "deepseek2.expert_group_count": 4,
            "deepseek2.expert_group_used_count": 2,
            "deepseek2.expert_gating_func": 2,
            "deepseek2.expert_weights_norm": True,
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "deepseek-v3",
            "tokenizer.ggml.bos_token_id": 0,
            "tokenizer.ggml.eos_token_id": 1,
            "tokenizer.ggml.add_bos_token": True,
            "tokenizer.chat_template": tokenizer.chat_template,
        }
        == settings
    )
    assert settings["deepseek2.rope.scaling.yarn_log_multiplier"] == pytest.approx(0.1)
    assert settings["deepseek2.expert_weights_scale"] == pytest.approx(2.5)


def test_every_row_of_the_vocabulary_has_a_spelling_and_a_kind(make_model, tmp_path, tokenizer):
    save_gguf(make_model(vocab_size=400), file=tmp_path / "m.gguf", kind="f32", tokenizer=tokenizer)
    _, settings = written(tmp_path / "m.gguf")
    spellings, kinds = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.token_type"]
    assert len(spellings) == len(kinds) == len(set(spellings)) == 400
    control, user_defined, unused = gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED, gguf.TokenType.UNUSED
    assert [kinds[spellings.index(name)] for name in (BOS, EOS, USER)] == [control] * 3
    assert kinds[spellings.index(THINK_BEGIN)] == user_defined  # It is shown: a reasoning model's text has it.
    assert kinds[tokenizer.vocab_size :] == [unused] * (400 - tokenizer.vocab_size)
    assert all(merge.count(" ") == 1 for merge in settings["tokenizer.ggml.merges"])


def test_mtp_modules_are_left_out_and_it_is_said(make_model, tmp_path, caplog):
    save_gguf(make_model(), file=tmp_path / "m.gguf", kind="f32", tokenizer=None)
    assert "MTP modules are left out" in caplog.text
    tensors, settings = written(tmp_path / "m.gguf")
    assert not [name for name in tensors if name.startswith("blk.2.")]
    assert settings["deepseek2.block_count"] == 2


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"topk_method": "group_limited_greedy"}, "two best"),
        ({"n_shared_experts": 0}, "shared expert"),
        ({"num_hidden_layers": 27}, "V2-Lite"),
        ({"rope_scaling": YarnConfig(mscale=1.0, mscale_all_dim=0.0)}, "equal values"),
        ({"rope_scaling": YarnConfig(mscale=0.707, mscale_all_dim=1.0)}, "equal values"),
    ],
)
def test_a_model_that_readers_would_compute_otherwise_is_refused(make_model, tmp_path, change, match):
    with pytest.raises(ConfigError, match=match):
        save_gguf(make_model(**change), file=tmp_path / "m.gguf", kind="f32", tokenizer=None)
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_cuts_text_otherwise_is_refused(make_model, tmp_path, tokenizer):
    definition = tokenizer.definition
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\p{N}"
    other = tmp_path / "tokenizer.json"
    other.write_text(json.dumps(definition))
    with pytest.raises(TokenizerError, match="does not cut"):
        save_gguf(
            make_model(vocab_size=400), file=tmp_path / "m.gguf", kind="f32", tokenizer=Tokenizer.from_file(other)
        )


def test_what_is_in_the_way_stays_unless_told(make_model, tmp_path):
    file = tmp_path / "m.gguf"
    file.write_text("precious")
    with pytest.raises(CheckpointError, match="there already"):
        save_gguf(make_model(), file=file, kind="f32", tokenizer=None)
    assert file.read_text() == "precious"
    save_gguf(make_model(), file=file, kind="f32", tokenizer=None, overwrite=True)
    assert file.read_bytes().startswith(b"GGUF")
    with pytest.raises(CheckpointError, match=r"ends in \.gguf"):
        save_gguf(make_model(), file=tmp_path, kind="f32", tokenizer=None)


@pytest.mark.parametrize(("kind", "value"), [("f16", 1e5), ("f16", float("nan")), ("q8_0", float("inf"))])
def test_a_weight_out_of_range_leaves_no_file(make_model, tmp_path, kind, value):
    model = make_model(hidden_size=32)
    model.lm_head.weight.data[3, 4] = value
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        save_gguf(model, file=tmp_path / "m.gguf", kind=kind, tokenizer=None)
    assert not list(tmp_path.iterdir())


def test_llama_cpp_computes_the_same(make_model, tmp_path, tokenizer, llama):
    tokens = tokenizer.encode(PROSE[0] + PROSE[1], add_bos=True)
    for number, change in enumerate(VARIANTS):
        model = make_model(vocab_size=400, max_position_embeddings=256, **change)
        file = tmp_path / f"{number}.gguf"
        save_gguf(model, file=file, kind="f32", tokenizer=tokenizer)
        with torch.no_grad():
            ours = model.double().logits(model(TokenBatch.from_sequences([tokens])).hidden)
        theirs = llama(file).logits(tokens)
        worst = (torch.from_numpy(theirs).double() - ours).abs().max()
        assert worst < 1e-4, change


def test_llama_cpp_cuts_text_into_the_same_tokens(make_model, tmp_path, tokenizer, llama):
    save_gguf(make_model(vocab_size=400), file=tmp_path / "m.gguf", kind="f32", tokenizer=tokenizer)
    peer = llama(tmp_path / "m.gguf")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(st.text(max_size=60))
    def same(text):
        assert peer.tokens(text) == tokenizer.encode(text)

    for text in (*PROSE, f"{USER}Hello{THINK_BEGIN}", "don't  stop\r\n\n 12345 it's\t", "ｆｕｌｌ 日本語テキスト"):
        assert peer.tokens(text) == tokenizer.encode(text), text
    same()


VARIANTS = (
    {},
    {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3},
    {"rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=32), "qk_rope_head_dim": 8},
    {"rope_scaling": YarnConfig(factor=40.0, original_max_position_embeddings=32, mscale=0.707, mscale_all_dim=0.707)},
    DIRECT,
    {"n_group": 1, "topk_group": 1, "num_nextn_predict_layers": 0, "n_shared_experts": 2},
)


@pytest.fixture(scope="module")
def llama():
    """Open a file in llama.cpp."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed; it is built from source")
    return lambda file: Peer(llama_cpp, file=file)


class Peer:
    """A GGUF file in llama.cpp."""

    def __init__(self, llama_cpp, *, file):
        wide = llama_cpp.GGML_TYPE_F32  # Of the cache, which is in FP16 unless told.
        self._model = llama_cpp.Llama(
            str(file), n_ctx=256, n_threads=2, logits_all=True, verbose=False, type_k=wide, type_v=wide
        )

    def logits(self, tokens):
        self._model.reset()
        self._model.eval(tokens)
        return np.array(self._model.scores[: len(tokens)])

    def tokens(self, text):
        return self._model.tokenize(text.encode(), add_bos=False, special=True)
