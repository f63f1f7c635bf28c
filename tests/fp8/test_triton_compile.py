import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRODUCTS = ("product of experts", "product of few rows, ragged depth", "product of tiles", "weight gradients")
QUANTISERS = (
    "quantise rows",
    "quantise swiglu",
    "quantise blocks",
    "quantise over tokens",
    "requantise over tokens",
)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "compile_triton.py"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton"))
    command = [sys.executable, "-W", "error", str(script)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def test_every_kernel_compiles_for_hopper_without_spilling(kernels):
    assert len(kernels) == 32
    for name, kernel in kernels.items():
        assert kernel["cubin"] > 0, name
        assert kernel["spilled"] == 0, name


def test_products_run_in_fp8_tensor_cores_and_read_ahead(kernels):
    for name in PRODUCTS:
        found = kernels[name]["instructions"]
        assert any(i.startswith("wgmma") and i.endswith("k32.f32.e4m3.e4m3") for i in found), (name, found)
        assert "cp.async.bulk.tensor" in " ".join(found), name
    assert any(i.endswith("e5m2.e4m3") for i in kernels["product of e5m2 gradients"]["instructions"])


def test_quantisers_divide_and_round_as_ieee_says(kernels):
    for name in QUANTISERS:
        found = kernels[name]["instructions"]
        assert "div.rn.f32" in found, (name, found)
        assert "cvt.rn.satfinite.e4m3x2.f32" in found, (name, found)
        # The sigmoid of SwiGLU divides less exactly, before anything is quantised.
        assert name == "quantise swiglu" or not any(i.startswith(("div.full", "div.approx")) for i in found), name
