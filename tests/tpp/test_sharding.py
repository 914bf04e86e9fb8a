import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tpp.models.architecture import Architecture, build_on_meta
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.sharding import rank_costs, row_cost, work_units
from tpp.selection.selection import Selection
from train.preflight import stand_in_plan


@st.composite
def sharded(draw):
    """A plan, weights per filter, groups, and a number of ranks."""
    filters, pruned, sizes, groups = {}, {}, {}, {}
    for i in range(draw(st.integers(0, 6))):
        layer = f"l{i}"
        groups[layer] = draw(st.sampled_from([1, 1, 2, 5]))
        filters[layer] = groups[layer] * draw(st.integers(1, 20))
        pruned[layer] = draw(
            st.sets(st.integers(0, filters[layer] - 1), max_size=filters[layer] - 1)
        )
        sizes[layer] = draw(st.integers(1, 500))
    return PruningPlan.from_indices(filters, pruned), sizes, groups, draw(st.integers(1, 40))


def filter_costs(plan, sizes, groups):
    """Per layer the cost of every pruned filter, counted one by one."""
    costs = {}
    for layer in plan.active_layers:
        peers = plan.filters[layer] // groups[layer]
        costs[layer] = [
            row_cost(peers, sum(k // peers == i // peers for k in plan.kept(layer)), sizes[layer])
            for i in plan.pruned[layer]
        ]
    return costs


@given(sharded())
@settings(max_examples=200, deadline=None)
def test_every_pruned_filter_has_exactly_one_owner(case):
    plan, sizes, groups, world_size = case
    costs = filter_costs(plan, sizes, groups)
    owned: dict[str, list[int]] = {layer: [] for layer in plan.filters}
    totals = []
    for rank in range(world_size):
        units = work_units(plan, sizes, rank=rank, world_size=world_size, groups=groups)
        assert len({unit.layer for unit in units}) == len(units)
        for unit in units:
            owned[unit.layer] += unit.rows
            by_index = dict(zip(plan.pruned[unit.layer], costs[unit.layer], strict=True))
            assert unit.cost == sum(by_index[row] for row in unit.rows)
        totals.append(sum(unit.cost for unit in units))
    assert owned == plan.pruned
    assert totals == rank_costs(plan, sizes, world_size, groups=groups)


@given(sharded())
@settings(max_examples=200, deadline=None)
def test_no_rank_carries_more_than_one_filter_above_the_mean(case):
    plan, sizes, groups, world_size = case
    costs = rank_costs(plan, sizes, world_size, groups=groups)
    rows = [cost for of_layer in filter_costs(plan, sizes, groups).values() for cost in of_layer]
    assert sum(costs) == sum(rows)
    assert max(costs) - sum(costs) / world_size <= max(rows, default=0)


@pytest.mark.parametrize(
    ("name", "ratios"),
    [
        ("resnet50", {"layer[1-3]*conv[1-2]": 0.60, "layer4*conv[1-2]": 0.21}),
        ("mobilenet_v2", {"features.[2-9].conv.0.0": 0.5, "features.[2-9].conv.1.0": 0.5}),
    ],
)
def test_any_number_of_ranks_up_to_1024_is_evenly_loaded(name, ratios):
    model = build_on_meta(Architecture(name, 1000))
    plan = stand_in_plan(model, Selection(ratios))
    layers = prunable_layers(model)
    sizes = {layer: layers[layer].weight[0].numel() for layer in plan.filters}
    groups = {layer: layers[layer].groups for layer in plan.filters}
    smallest_unit = max(cost for of in filter_costs(plan, sizes, groups).values() for cost in of)
    total = rank_costs(plan, sizes, 1, groups=groups)[0]
    for world_size in range(1, 1025):
        costs = rank_costs(plan, sizes, world_size, groups=groups)
        mean = total / world_size
        assert math.fsum(costs) == total
        assert max(costs) - mean <= max(0.05 * mean, smallest_unit), world_size
