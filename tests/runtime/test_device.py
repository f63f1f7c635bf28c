import os

import pytest
import torch

from dsv3.errors import ConfigError
from dsv3.runtime.device import choose_device, choose_dtype, set_threads


@pytest.fixture
def _without_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.fixture
def _two_cuda_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


@pytest.fixture
def _threads_put_back():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_without_cuda")
def test_auto_takes_the_cpu_where_there_is_no_cuda():
    assert choose_device("auto") == torch.device("cpu")


@pytest.mark.usefixtures("_two_cuda_devices")
def test_auto_takes_cuda_where_there_is_one():
    assert choose_device("auto") == torch.device("cuda")
    assert choose_device("cuda:1") == torch.device("cuda:1")


@pytest.mark.usefixtures("_without_cuda")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_cuda_is_refused_where_there_is_none(name):
    with pytest.raises(ConfigError, match="there is no CUDA device here; 'auto' takes what there is"):
        choose_device(name)


@pytest.mark.usefixtures("_two_cuda_devices")
def test_a_cuda_device_beyond_the_last_is_refused():
    with pytest.raises(ConfigError, match="there are 2 CUDA devices here"):
        choose_device("cuda:2")


@pytest.mark.parametrize("name", ["gpu", "", "cpu:0", "cuda:", "cuda:x", "cuda:-1", "meta"])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(ConfigError, match="choose 'auto', 'cpu', 'cuda' or 'cuda:N'"):
        choose_device(name)


def test_the_cpu_computes_in_fp32_unless_told_otherwise():
    cpu = torch.device("cpu")
    assert choose_dtype("auto", device=cpu) == torch.float32
    assert choose_dtype("bfloat16", device=cpu) == torch.bfloat16
    assert choose_dtype("float32", device=torch.device("cuda")) == torch.float32


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float32)])
def test_cuda_computes_in_bf16_where_it_can(supported, dtype, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_dtype("auto", device=torch.device("cuda")) == dtype


def test_an_unknown_compute_type_is_refused():
    with pytest.raises(ConfigError, match=r"runtime.dtype = 'float16'; choose 'auto', 'float32' or 'bfloat16'"):
        choose_dtype("float16", device=torch.device("cpu"))


@pytest.mark.usefixtures("_threads_put_back")
def test_a_number_of_threads_is_obeyed():
    assert set_threads(3) == 3
    assert torch.get_num_threads() == 3


@pytest.mark.usefixtures("_threads_put_back")
def test_zero_threads_takes_the_cores_this_process_may_use(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {4, 6}, raising=False)
    assert set_threads(0) == 2
    assert torch.get_num_threads() == 2


def test_a_negative_number_of_threads_is_refused():
    with pytest.raises(ConfigError, match=r"runtime.threads = -1"):
        set_threads(-1)
