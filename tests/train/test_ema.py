import pytest
import torch
from torch import nn

from dsv3.train.ema import WeightAverage


def test_the_average_is_the_decayed_mean_of_the_weights_after_each_step():
    weights = [torch.randn(4, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    average = WeightAverage({"w": weights[0]}, decay=0.9)
    for weight in weights:
        average.update({"w": weight})
    shares = [0.9 ** (5 - i) * 0.1 / (1 - 0.9**6) for i in range(6)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight.double() for share, weight in zip(shares, weights, strict=True))
    assert torch.allclose(average.average["w"].double(), expected, atol=1e-6)


def test_after_one_step_the_average_is_that_step():
    average = WeightAverage({"w": torch.zeros(3)}, decay=0.999)
    average.update({"w": torch.tensor([1.0, 2.0, 3.0])})
    assert average.average["w"].tolist() == [1.0, 2.0, 3.0]


def test_the_average_is_kept_in_fp32_whatever_the_weights_are():
    average = WeightAverage({"w": torch.zeros(3, dtype=torch.bfloat16)}, decay=0.5)
    average.update({"w": torch.ones(3, dtype=torch.bfloat16)})
    assert average.average["w"].dtype == torch.float32


def test_a_model_gets_its_own_weights_back_after_being_seen_through_the_average():
    layer = nn.Linear(3, 2, bias=False)
    own = layer.weight.detach().clone()
    average = WeightAverage({"weight": layer.weight}, decay=0.9)
    average.update({"weight": torch.ones(2, 3)})
    optimizer_sees = layer.weight.data_ptr()
    with average.in_place_of(dict(layer.named_parameters())):
        assert torch.equal(layer.weight, torch.ones(2, 3))
    assert torch.equal(layer.weight, own)
    assert layer.weight.data_ptr() == optimizer_sees


def test_an_error_inside_leaves_the_models_own_weights():
    layer = nn.Linear(3, 2, bias=False)
    own = layer.weight.detach().clone()
    average = WeightAverage({"weight": layer.weight}, decay=0.9)
    average.update({"weight": torch.ones(2, 3)})
    with pytest.raises(KeyError), average.in_place_of(dict(layer.named_parameters())):
        raise KeyError
    assert torch.equal(layer.weight, own)


def test_a_loaded_average_goes_on_as_if_it_had_never_stopped():
    steps = [torch.randn(5, generator=torch.Generator().manual_seed(seed)) for seed in range(6)]
    whole = WeightAverage({"w": steps[0]}, decay=0.8)
    first = WeightAverage({"w": steps[0]}, decay=0.8)
    for step in steps:
        whole.update({"w": step})
    for step in steps[:4]:
        first.update({"w": step})
    second = WeightAverage({"w": steps[0]}, decay=0.8)
    second.load(first.average, updates=first.updates)
    for step in steps[4:]:
        second.update({"w": step})
    assert torch.equal(whole.average["w"], second.average["w"])
