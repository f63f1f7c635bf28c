"""When our kernels are used, and what is said when they are not."""

import logging

import pytest
import torch

from dsv3 import native
from dsv3.errors import CompilerError, ConfigError


def test_only_real_fp32_tensors_on_the_cpu_are_served():
    ours = torch.zeros(2)
    assert native.usable(ours, torch.nn.Parameter(torch.zeros(2)))
    assert not native.usable(ours, torch.zeros(2, dtype=torch.float64))
    assert not native.usable(ours, torch.zeros(2, dtype=torch.bfloat16))
    assert not native.usable(torch.zeros(2, device="meta"))
    with torch._subclasses.FakeTensorMode():
        assert not native.usable(torch.zeros(2))


def test_torchs_kernels_are_taken_when_asked_for():
    native.choose_cpu_kernels("torch")
    assert not native.usable(torch.zeros(2))


def test_an_unknown_choice_is_refused():
    with pytest.raises(ConfigError, match="cpu_kernels = 'mine'; choose one of 'auto', 'native', 'torch'"):
        native.choose_cpu_kernels("mine")


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch):
    def refuse(name, *, sources):
        raise CompilerError("there is no C++ compiler")

    monkeypatch.setattr(native, "compiled_library", refuse)
    for cached in (native._load, native._load_or_say_why, native.say_once):
        cached.cache_clear()
    yield
    for cached in (native._load, native._load_or_say_why):
        cached.cache_clear()


def test_without_a_compiler_torch_computes_and_the_log_says_why(no_compiler, caplog: pytest.LogCaptureFixture):
    native.choose_cpu_kernels("auto")
    with caplog.at_level(logging.INFO, logger="dsv3"):
        assert not native.usable(torch.zeros(2))
        assert not native.usable(torch.zeros(2))
    assert [record.getMessage() for record in caplog.records] == [
        "CPU kernels: torch's, which are slower; ours were not compiled: there is no C++ compiler"
    ]


def test_without_a_compiler_asking_for_ours_is_refused(no_compiler):
    with pytest.raises(ConfigError, match="'native', but there is no C\\+\\+ compiler; 'auto' takes torch's"):
        native.choose_cpu_kernels("native")
