"""Balance of devices: by hand, and by what must hold."""

import pytest

from dsv3.errors import ConfigError
from dsv3.plan.expert_balance import Devices, balances, drawn_loads, expected_imbalance, slots_for

TWO = Devices(num_devices=2)


def test_loads_by_hand_come_out_in_order_and_placed():
    loads = {"code": [[6.0, 3.0, 2.0, 1.0]]}
    before, placed, with_copies = balances(loads, devices=TWO, redundancy=(0.0, 0.5))
    assert before.layers == (pytest.approx(9 / 6),)
    assert placed.layers == (pytest.approx(7 / 6),)  # 6 and 1 beside 3 and 2
    # Halves of 6 and of 3 on both, as copies lie apart; with them 2 and 1.
    assert (with_copies.copies, with_copies.layers[0]) == (2, pytest.approx(6.5 / 6))


def test_traffic_that_turns_meets_a_placement_made_for_all():
    """What all text together hides, each kind of it shows."""
    code, prose = [5.0, 4.0, 1.0, 1.0], [1.0, 1.0, 5.0, 4.0]
    found = balances({"code": [code], "prose": [prose]}, devices=TWO, redundancy=(0.0,))
    assert [(one.traffic, one.placed_for) for one in found] == [
        ("code", None),
        ("code", "code"),
        ("code", "all"),
        ("prose", None),
        ("prose", "prose"),
        ("prose", "all"),
    ]
    assert found[1].mean == pytest.approx(6 / 5.5)
    assert found[2].mean == pytest.approx(9 / 5.5)  # of both together, 6 and 5 lie beside 6 and 5


def test_experts_placed_for_what_was_recorded_before_meet_what_comes():
    met, before = [5.0, 4.0, 1.0, 1.0], [1.0, 1.0, 5.0, 4.0]
    _, placed = balances({"code": [met]}, devices=TWO, redundancy=(0.0,), known={"code": [before]})
    assert placed.layers == (pytest.approx(6 / 5.5),)  # 5 and 1, as 1 and 4 lay beside 1 and 5
    with pytest.raises(ConfigError, match="the same kinds of traffic"):
        balances({"code": [met]}, devices=TWO, redundancy=(0.0,), known={"prose": [before]})


def test_copies_fill_the_devices():
    assert slots_for(256, share=0.125, num_devices=144) == 288
    assert slots_for(256, share=0.0, num_devices=144) == 288
    assert slots_for(256, share=0.25, num_devices=32) == 320


def test_more_copies_balance_drawn_loads_of_v3_better():
    loads = {"drawn": drawn_loads(num_experts=256, num_layers=6, skew=0.7, seed=0)}
    means = [one.mean for one in balances(loads, devices=Devices(num_devices=64), redundancy=(0.0, 0.125, 0.25))]
    assert means == sorted(means, reverse=True)
    assert means[0] > 1.5
    assert means[-1] < 1.1


def test_kinds_of_traffic_with_other_experts_are_refused():
    with pytest.raises(ConfigError, match="same layers and experts"):
        balances({"a": [[1.0, 2.0]], "b": [[1.0]]}, devices=TWO, redundancy=(0.0,))
    with pytest.raises(ConfigError, match="0 or more"):
        balances({"a": [[1.0, 2.0]]}, devices=TWO, redundancy=(-0.1,))


def test_the_expected_imbalance_is_that_of_the_busiest_device_and_copies_level_it():
    loads = {"text": [[3.0, 1.0, 1.0, 1.0]]}
    # In pairs one device has 3 + 1 of 6; with two copies the busy expert is there three times, and all six slots alike.
    assert expected_imbalance(loads, num_devices=2, copies=0) == pytest.approx(4 / 3 - 1)
    assert expected_imbalance(loads, num_devices=2, copies=2) == pytest.approx(0)
    assert expected_imbalance({"text": [[2.0] * 8]}, num_devices=4, copies=0) == pytest.approx(0)
