import pytest

from dsv3.errors import ConfigError
from dsv3.plan.hardware import GPUS, find_hardware

CUSTOM = {
    "bf16_tflops": 100.0,
    "fp8_tflops": 0.0,
    "memory_gb": 40.0,
    "memory_gb_s": 1000.0,
    "node_gb_s": 100.0,
    "network_gb_s": 10.0,
}


def test_the_h800_has_the_reports_links():
    gpu = find_hardware("h800", changes={})
    assert (gpu.node_gb_s, gpu.network_gb_s, gpu.bf16_tflops) == (160.0, 50.0, 989.0)
    assert gpu.node_gb_s / gpu.network_gb_s == 3.2  # report 3.2.2


@pytest.mark.parametrize("name", GPUS)
def test_every_gpu_says_where_its_numbers_come_from(name):
    assert GPUS[name].origin


def test_a_number_of_a_gpu_can_be_changed_and_the_origin_tells_it():
    gpu = find_hardware("h100", changes={"network_gb_s": 25.0, "ranks_per_node": 4.0})
    assert (gpu.network_gb_s, gpu.ranks_per_node) == (25.0, 4)
    assert "given on the command line: network_gb_s, ranks_per_node" in gpu.origin


def test_a_custom_gpu_needs_all_its_numbers():
    assert find_hardware("custom", changes=CUSTOM).memory_gb == 40.0
    with pytest.raises(ConfigError, match="--hardware NAME=VALUE for each of memory_gb_s;"):
        find_hardware("custom", changes={name: value for name, value in CUSTOM.items() if name != "memory_gb_s"})


@pytest.mark.parametrize(
    ("name", "changes", "told"),
    [
        ("h1000", {}, "choose one of h800, h100"),
        ("h800", {"netwrk_gb_s": 1.0}, "did you mean 'network_gb_s'"),
        ("h800", {"memory_gb": 0.0}, "memory_gb = 0.0; it must be greater than 0"),
    ],
)
def test_what_is_not_there_is_refused(name, changes, told):
    with pytest.raises(ConfigError, match=told):
        find_hardware(name, changes=changes)
