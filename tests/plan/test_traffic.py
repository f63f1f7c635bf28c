import random
from dataclasses import replace
from itertools import combinations
from statistics import mean

import pytest

from dsv3 import recipes
from dsv3.plan.hardware import H800
from dsv3.plan.traffic import expected_places, token_traffic

V3 = recipes.v3_671b()
SMALL = replace(V3.model, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3)


@pytest.mark.parametrize("places", [1, 2, 4, 8])
def test_expected_places_are_those_of_all_allowed_choices(places):
    """Every pair of groups, and every three of the four experts in it, written out."""
    found = []
    for groups in combinations(range(4), 2):
        open_experts = [expert for expert in range(8) if expert // 2 in groups]
        found += [len({expert * places // 8 for expert in choice}) for choice in combinations(open_experts, 3)]
    assert expected_places(SMALL, places=places) == pytest.approx(mean(found))


def test_expected_nodes_of_v3_are_those_of_drawn_choices():
    draw = random.Random(0)
    nodes = []
    for _ in range(20_000):
        groups = draw.sample(range(8), 4)
        reachable = [32 * group + place for group in groups for place in range(32)]
        nodes.append(len({expert // 32 for expert in draw.sample(reachable, 8)}))
    assert expected_places(V3.model, places=8) == pytest.approx(mean(nodes), abs=0.02)


def test_a_router_without_groups_reaches_all_experts():
    model = recipes.by_name("v3_16b").model
    # 6 of 64 experts over 2 halves: one half is missed with a chance of C(32, 6) / C(64, 6), nearly 1 in 83.
    assert expected_places(model, places=2) == pytest.approx(2 * (1 - 906_192 / 74_974_368))


def test_rows_of_v3_have_the_reports_bytes():
    traffic = token_traffic(V3, gpu=H800)
    # Report 3.3.3: 7168 in FP8 and 56 scales out, BF16 back.
    assert (traffic.dispatch_row, traffic.combine_row) == (7392, 14_336)
    # Report 2.1.2: at most four nodes, one of which may be the token's own.
    assert 3 < traffic.nodes < 4


def test_experts_within_a_node_send_nothing_over_the_network():
    inside = replace(V3, parallel=replace(V3.parallel, expert=8))
    assert token_traffic(inside, gpu=H800).bytes_on("IB") == (0, 0)
    alone = replace(V3, parallel=replace(V3.parallel, expert=1, wire="compute"))
    assert token_traffic(alone, gpu=H800).bytes_on("NVLink") == (0, 0)
