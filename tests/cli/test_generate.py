import inspect
import io
import json
import logging
import re

import pytest
import torch

from dsv3.checkpoint.published import save_published
from dsv3.cli.generate import generate
from dsv3.cli.main import main
from dsv3.config import ModelConfig
from dsv3.data.tokenizer import Tokenizer
from dsv3.infer.loaded import load
from dsv3.infer.params import SamplingParams
from dsv3.model.transformer import Transformer

PROMPT = "In the beginning"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published-format folder of a small random model."""
    path = tmp_path_factory.mktemp("model")
    tokenizer = Tokenizer.train(["In the beginning there was a word. 你好"] * 3, vocab_size=300)
    tokenizer.save(path / "tokenizer")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=16,
        num_hidden_layers=2,
        initializer_range=0.2,
        max_position_embeddings=40,
        num_attention_heads=2,
        q_lora_rank=None,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        first_k_dense_replace=1,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        num_nextn_predict_layers=0,
    )
    model = Transformer(config)
    model.init_weights(generator=torch.Generator().manual_seed(0))
    save_published(model, folder=path / "weights", tokenizer_folder=path / "tokenizer", dtype=torch.float32)
    return path / "weights"


@pytest.fixture(autouse=True)
def quiet_afterwards():
    """Leave the log as it was: the command line turns it on for the whole process."""
    logger = logging.getLogger("dsv3")
    before = (logger.handlers[:], logger.propagate, logger.level)
    threads = torch.get_num_threads()
    yield
    logger.handlers[:], logger.propagate, logger.level = before
    torch.set_num_threads(threads)


def run(*arguments):
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    return end.value.code


def generate_text(folder, *arguments):
    return run("generate", folder, "--device", "cpu", "--weights", "fp32", *arguments)


def test_the_continuation_goes_to_standard_output_and_the_rest_to_standard_error(folder, capsys):
    status = generate_text(folder, "--prompt", PROMPT, "--max-tokens", "9", "--seed", "4")
    output, errors = capsys.readouterr()
    expected = load(folder, device="cpu").generate(PROMPT, max_tokens=9, seed=4)
    assert (status, output) == (0, expected + "\n")
    assert re.search(r"answer: \d tokens at \d+\.\d tokens/s; ended by \w+; seed 4", errors)


def test_a_prompt_of_a_dash_is_read_from_standard_input(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(PROMPT))
    generate_text(folder, "--prompt", "-", "--max-tokens", "9", "--seed", "4")
    assert capsys.readouterr().out == load(folder, device="cpu").generate(PROMPT, max_tokens=9, seed=4) + "\n"


def test_json_has_the_text_and_what_was_measured(folder, capsys):
    assert generate_text(folder, "--prompt", PROMPT, "--max-tokens", "5", "--temperature", "0", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["prompt"] == PROMPT
    assert found["text"] == load(folder, device="cpu").generate(PROMPT, max_tokens=5, temperature=0.0)
    assert found["prompt_tokens"] == len(Tokenizer.from_file(folder).encode(PROMPT)) + 1
    assert found["finish_reason"] == "max_tokens"
    assert found["completion_tokens"] == 5
    assert found["tokens_per_second"] > 0


def test_a_fresh_seed_is_told_and_repeats_the_text(folder, capsys):
    generate_text(folder, "--prompt", PROMPT, "--max-tokens", "12", "--json")
    first = json.loads(capsys.readouterr().out)
    generate_text(folder, "--prompt", PROMPT, "--max-tokens", "12", "--json", "--seed", first["seed"])
    assert json.loads(capsys.readouterr().out)["text"] == first["text"]


def test_weights_can_be_used_in_fp8(folder, capsys, tmp_path):
    flags = ("--device", "cpu", "--weights", "fp8")
    assert run("generate", folder, *flags, "--prompt", PROMPT, "--max-tokens", "9", "--seed", "4") == 0
    expected = load(folder, device="cpu", weights="fp8").generate(PROMPT, max_tokens=9, seed=4)
    assert capsys.readouterr().out == expected + "\n"
    (tmp_path / "text.txt").write_text("In the beginning there was a word. " * 40)
    bits = []
    for weights in ("fp8", "fp32"):
        flags = ("--device", "cpu", "--weights", weights)
        assert run("evaluate", folder, "--data", tmp_path / "text.txt", *flags, "--json") == 0
        bits.append(json.loads(capsys.readouterr().out)["model"]["bits_per_byte"])
    assert bits[0] != bits[1]
    assert bits[0] == pytest.approx(bits[1], rel=0.02)


def test_every_sampling_option_is_obeyed(folder, capsys):
    options = {"temperature": 1.7, "top_p": 0.6, "top_k": 5, "max_tokens": 14, "seed": 6}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    text = load(folder, device="cpu").generate(PROMPT, **options)
    generate_text(folder, "--prompt", PROMPT, *flags)
    assert capsys.readouterr().out == text + "\n"
    stop = text[3:5]
    generate_text(folder, "--prompt", PROMPT, *flags, "--stop", "never there", "--stop", stop)
    assert capsys.readouterr().out == text[: text.index(stop)] + "\n"


def test_the_defaults_are_those_of_the_python_interface():
    parameters = inspect.signature(generate).parameters
    ours = {name: parameters[name].default for name in ("max_tokens", "temperature", "top_p", "top_k", "seed")}
    assert SamplingParams(**ours) == SamplingParams()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "-1"], "temperature = -1.0"),
        (["--top-p", "0"], "top_p = 0.0"),
        (["--top-k", "-2"], "top_k = -2"),
        (["--max-tokens", "0"], "max_tokens = 0"),
        (["--seed", "-1"], "seed = -1"),
        (["--stop", ""], "empty stop string"),
        (["--threads", "-1"], "threads = -1"),
        (["--weights", "q4"], "q4"),
        (["--average"], "is no run folder"),
        (["--prompt", "x" * 300], "the model's context is 40 tokens"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_one_line(folder, capsys, arguments, message):
    status = run("generate", folder, "--device", "cpu", "--prompt", PROMPT, *arguments)
    output, errors = capsys.readouterr()
    assert (status, output) == (2, "")
    assert message in errors
    assert "Traceback" not in errors


def test_a_folder_that_is_no_model_is_refused(tmp_path, capsys):
    assert run("generate", tmp_path, "--prompt", PROMPT) == 2
    assert "it is empty. A model is one of: a run folder" in capsys.readouterr().err
