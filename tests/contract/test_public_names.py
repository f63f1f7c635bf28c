"""What users of the package may rely on. A change here is a change of the public interface: see CHANGELOG.md."""

import subprocess
import sys

import pytest
import torch

import dsv3
from dsv3.infer.loaded import LoadedModel, SamplingSettings
from dsv3.infer.runner import TorchRunner
from dsv3.model.transformer import Transformer

PACKAGE = ["TokenBatch", "__version__", "load", "recipes"]
LOADED_MODEL = {
    # what it is
    "config",
    "is_base",
    "model",
    "runner",
    "source",
    "streams",
    "tokenizer",
    "trained_length",
    # what it does
    "chat",
    "chat_ids",
    "generate",
    "logits",
    "new_engine",
    "prompt_ids",
    "stream",
    "stream_chat",
    "stream_ids",
}
SAMPLING = {
    "frequency_penalty",
    "ignore_end",
    "logit_bias",
    "max_tokens",
    "min_p",
    "presence_penalty",
    "repetition_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "temperature",
    "top_k",
    "top_p",
}
RECIPES = {"small", "tiny", "v3_16b", "v3_236b", "v3_671b"}


def run_python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


def test_the_package_has_these_names_and_all_of_them_work():
    assert sorted(dsv3.__all__) == PACKAGE
    assert sorted(dir(dsv3)) == PACKAGE
    for name in PACKAGE:
        assert getattr(dsv3, name) is not None


def test_another_name_is_refused_with_those_there_are():
    with pytest.raises(AttributeError, match="no attribute 'lode'; it has TokenBatch"):
        dsv3.lode  # noqa: B018


def test_the_recipes_are_functions_of_these_names():
    for name in RECIPES:
        assert getattr(dsv3.recipes, name)().recipe == name


def test_a_loaded_model_has_these_members_and_no_others():
    with torch.device("meta"):
        model = Transformer(dsv3.recipes.tiny().model)
    made = LoadedModel(TorchRunner(model), tokenizer=None, source="", is_base=True, trained_length=1)
    members = {name for name in {*vars(made), *vars(LoadedModel)} if not name.startswith("_")}
    assert members == LOADED_MODEL


def test_sampling_settings_are_these_keywords():
    assert {*SamplingSettings.__annotations__} == SAMPLING


def test_importing_the_package_and_its_recipes_loads_neither_torch_nor_numpy():
    code = "import sys, dsv3; dsv3.recipes.tiny(); print([name for name in ('torch', 'numpy') if name in sys.modules])"
    done = run_python(code)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[]", "")


def test_importing_the_command_line_loads_no_torch():
    done = run_python("import sys, dsv3.cli.generate, dsv3.cli.chat, dsv3.cli.serve; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")


def test_importing_the_server_and_what_joins_it_loads_no_torch():
    pytest.importorskip("uvicorn", reason="needs the extra 'serve'")
    done = run_python("import sys, dsv3.serve.server, dsv3.serve.joining; print('torch' in sys.modules)")
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "False", "")
