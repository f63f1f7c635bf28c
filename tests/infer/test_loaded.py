import shutil
from dataclasses import replace

import pytest
import torch

import dsv3
from dsv3.batch import TokenBatch
from dsv3.checkpoint.published import load_published, save_published
from dsv3.checkpoint.writer import FP8
from dsv3.config.files import read_json
from dsv3.data.tokenizer import Tokenizer
from dsv3.errors import CheckpointError, ConfigError, TokenizerError
from dsv3.infer.loaded import LoadedModel, load, sampling_params
from dsv3.infer.params import SamplingParams
from dsv3.model.transformer import Transformer

CPU = {"device": "cpu", "weights": "fp32", "plain": True}
PROMPT = "In the beginning"


def logits_of(model, ids):
    return model.logits(model(TokenBatch.from_sequences([ids])).hidden)


@pytest.fixture
def loaded(published):
    return load(published, **CPU)


def test_logits_are_those_of_the_saved_model(loaded, model):
    ids = [0, 5, 9, 260]
    logits = loaded.logits(ids)
    assert (logits.dtype, tuple(logits.shape)) == (torch.float32, (4, model.config.vocab_size))
    torch.testing.assert_close(logits, logits_of(model, ids))


def test_a_run_gives_the_weights_of_its_newest_snapshot(run_with_snapshots, model):
    loaded = load(run_with_snapshots, **CPU)
    torch.testing.assert_close(loaded.logits([0, 5, 9]), logits_of(model, [0, 5, 9]))


def test_bfloat16_rounds_the_weights_and_leaves_the_router_biases(run_with_snapshots, model):
    loaded = load(run_with_snapshots, device="cpu", weights="bf16", plain=True)
    for name, tensor in loaded.model.state_dict().items():
        kept = name.endswith("e_score_correction_bias")
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16)
        assert torch.equal(tensor, model.state_dict()[name].to(tensor.dtype))
    logits = loaded.logits([0, 5, 9])
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, logits_of(model, [0, 5, 9]), atol=0.3, rtol=0.1)


def test_a_run_is_known_as_a_base_model_of_its_row_length(run_with_snapshots, published):
    run, other = load(run_with_snapshots, **CPU), load(published, **CPU)
    assert (run.is_base, run.trained_length) == (True, 32)
    assert (other.is_base, other.trained_length) == (False, 64)


def test_the_average_of_a_run_is_loaded_when_asked_for(run_with_snapshots, model, average):
    save_published(model, folder=run_with_snapshots / "export", tokenizer_folder=None, dtype=torch.float32)
    loaded = load(run_with_snapshots, average=True, **CPU)
    for name, tensor in loaded.model.state_dict().items():
        assert torch.equal(tensor, average.get(name, model.state_dict()[name]))
    assert loaded.source.endswith("step-000020 (average)")


def test_an_average_that_was_not_kept_is_refused(run_with_snapshots, published):
    with pytest.raises(ConfigError, match="is no run folder"):
        load(published, average=True, **CPU)
    shutil.rmtree(run_with_snapshots / "snapshots" / "step-000020")
    with pytest.raises(ConfigError, match=r"no average of the weights: the run had optim.ema_decay = 0"):
        load(run_with_snapshots, average=True, **CPU)


def test_a_snapshot_of_another_shape_is_refused_by_tensor_name(run_with_snapshots):
    config = run_with_snapshots / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 24', '"hidden_size": 32'))
    with pytest.raises(CheckpointError, match="does not fit") as error:
        load(run_with_snapshots, **CPU)
    assert "embed_tokens.weight" in str(error.value)


def test_generate_joins_what_stream_gives(loaded):
    options = {"max_tokens": 12, "seed": 3}
    assert loaded.generate(PROMPT, **options) == "".join(loaded.stream(PROMPT, **options))


def test_generation_is_the_same_for_a_seed_and_another_for_another(loaded):
    first, again, other = (loaded.generate(PROMPT, max_tokens=16, temperature=1.5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_text_is_continued_after_the_begin_token(loaded, model, tokenizer):
    # Greedy by hand: the likeliest next token of the full forward, among those the tokenizer has.
    ids = [loaded.config.bos_token_id, *tokenizer.encode(PROMPT)]
    answer = []
    for _ in range(6):
        answer.append(int(logits_of(model, ids + answer)[-1, : tokenizer.vocab_size].argmax()))
    assert loaded.config.eos_token_id not in answer
    decoder = tokenizer.stream_decoder()
    expected = "".join(decoder.add(token) for token in answer) + decoder.finish()
    assert loaded.generate(PROMPT, max_tokens=6, temperature=0.0) == expected


def test_token_ids_are_taken_as_they_are(loaded, tokenizer):
    ids = [loaded.config.bos_token_id, *tokenizer.encode(PROMPT)]
    options = {"max_tokens": 8, "temperature": 0.0}
    assert loaded.generate(ids, **options) == loaded.generate(PROMPT, **options)


def test_an_empty_text_still_begins_with_the_begin_token(loaded):
    assert loaded.stream("", max_tokens=1).prompt_tokens == 1


def test_a_stop_string_may_be_given_alone_or_in_a_list(loaded):
    text = loaded.generate(PROMPT, max_tokens=20, seed=5)
    stop = text[4:6]
    expected = text[: text.index(stop)]
    for given in (stop, [stop], ("no such text", stop)):
        assert loaded.generate(PROMPT, max_tokens=20, seed=5, stop=given) == expected


def test_a_misspelt_setting_is_an_error_and_not_ignored(loaded):
    with pytest.raises(TypeError, match="temprature"):
        loaded.generate(PROMPT, temprature=0.1)


def test_a_chat_is_put_in_the_format_of_the_tokenizer(loaded, tokenizer):
    messages = [{"role": "system", "content": "Be."}, {"role": "user", "content": "a word"}]
    # Fact sheet 1.8: BOS + system + <User> question + <Assistant>, nothing between.
    expected = [
        tokenizer.bos_id,
        *tokenizer.encode("Be."),
        tokenizer.user_id,
        *tokenizer.encode("a word"),
        tokenizer.assistant_id,
    ]
    assert loaded.chat_ids(messages) == expected
    options = {"max_tokens": 8, "seed": 1}
    assert loaded.chat(messages, **options) == loaded.generate(expected, **options)


def test_chat_with_a_base_model_is_said_in_the_log(run_with_snapshots, log):
    load(run_with_snapshots, **CPU).chat([{"role": "user", "content": "hi"}], max_tokens=1)
    assert "is a base model" in log.text


def test_a_conversation_without_messages_is_refused(loaded):
    with pytest.raises(ConfigError, match="no messages"):
        loaded.chat([])


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "logits of no tokens"),
        ([3, 1000], "token id 1000 at place 1"),
        ([-1], "token id -1"),
        ([5] * 65, "65 tokens were given, and the model's context is 64"),
    ],
)
def test_logits_of_ids_that_cannot_be_are_refused(loaded, ids, message):
    with pytest.raises(ConfigError, match=message):
        loaded.logits(ids)


def test_without_a_tokenizer_ids_work_and_text_is_refused(published, log):
    (published / "tokenizer.json").unlink()
    loaded = load(published, **CPU)
    assert "has no tokenizer.json" in log.text
    assert loaded.logits([0, 5]).shape[0] == 2
    with pytest.raises(TokenizerError, match=r"no tokenizer.json, so text cannot be read"):
        loaded.generate("a")


def test_a_tokenizer_of_another_model_is_refused(published):
    text = "many more words than the small model has ever had rows for, under quite different spellings"
    Tokenizer.train([text] * 3, vocab_size=340).save(published)
    assert Tokenizer.from_file(published).vocab_size > 320
    with pytest.raises(TokenizerError, match="another model's tokenizer"):
        load(published, **CPU)


@pytest.mark.parametrize(
    ("wrong", "message"), [({"weights": "float8"}, "'float8'; choose one of 'auto'"), ({"device": "tpu"}, "tpu")]
)
def test_a_device_or_type_that_is_not_there_is_refused(published, wrong, message):
    with pytest.raises(ConfigError, match=message):
        load(published, **wrong)


def test_dsv3_load_is_this_function(published):
    assert isinstance(dsv3.load(published, **CPU), LoadedModel)


def test_settings_left_out_keep_the_defaults_of_the_sampler():
    assert sampling_params() == SamplingParams()
    assert sampling_params(stop="a", seed=3) == SamplingParams(stop=("a",), seed=3)


def test_a_model_for_use_answers_as_the_model_that_trains(published, our_kernels):
    used, plain = load(published, device="cpu"), load(published, **CPU)
    torch.testing.assert_close(used.logits([0, 5, 9, 260]), plain.logits([0, 5, 9, 260]), atol=1e-4, rtol=1e-4)
    assert used.generate(PROMPT, max_tokens=9, temperature=0.0) == plain.generate(PROMPT, max_tokens=9, temperature=0.0)
    with pytest.raises(ConfigError, match="plain=True"):
        _ = used.model


@pytest.mark.parametrize("weights", ["fp32", "bf16", "fp8", "int8", "int4"])
def test_every_format_loads_from_a_folder_and_from_a_snapshot(published, run_with_snapshots, weights, our_kernels):
    """Published in FP32, so both have the same numbers to round."""
    one, other = load(published, device="cpu", weights=weights), load(run_with_snapshots, device="cpu", weights=weights)
    assert one.runner.model.format_name == weights
    assert torch.equal(one.logits([0, 5, 9]), other.logits([0, 5, 9]))


@pytest.mark.parametrize(("dtype", "kept"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16"), (FP8, "fp8")])
def test_weights_stay_as_they_are_stored_unless_asked_otherwise(model, tmp_path, dtype, kept, our_kernels):
    save_published(model, folder=tmp_path / "m", tokenizer_folder=None, dtype=dtype)
    assert load(tmp_path / "m", device="cpu").runner.model.format_name == kept


def test_drafts_change_no_text(published, our_kernels):
    plain, drafting = load(published, device="cpu"), load(published, device="cpu", drafts=2)
    options = {"max_tokens": 30, "seed": 1, "ignore_end": True}
    stream = drafting.stream(PROMPT, **options)
    assert "".join(stream) == plain.generate(PROMPT, **options)
    drafted, accepted = stream.drafts
    assert drafted > accepted >= 0


def test_drafts_of_a_model_without_mtp_are_refused(published, our_kernels):
    config = read_json(published / "config.json")
    model = load_published(published, dtype=torch.float32, device="cpu")
    bare = Transformer(replace(model.config, num_nextn_predict_layers=0))
    bare.load_state_dict(model.state_dict(), strict=False)
    save_published(bare, folder=published.parent / "bare", tokenizer_folder=None, dtype=torch.float32)
    assert config["num_nextn_predict_layers"] == 1
    with pytest.raises(ConfigError, match="has no MTP module to draft with"):
        load(published.parent / "bare", device="cpu", drafts=1)
