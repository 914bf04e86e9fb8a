from hypothesis import given, settings
from hypothesis import strategies as st

from tpp.plan import PruningPlan
from tpp.sharding import rank_costs, row_cost, work_units


@st.composite
def sharded(draw):
    count = draw(st.integers(0, 6))
    filters = {f"l{i}": draw(st.integers(1, 64)) for i in range(count)}
    pruned = {n: draw(st.sets(st.integers(0, c - 1), max_size=c - 1)) for n, c in filters.items()}
    sizes = {name: draw(st.integers(1, 500)) for name in filters}
    return PruningPlan.from_indices(filters, pruned), sizes, draw(st.integers(1, 40))


@given(sharded())
@settings(max_examples=200, deadline=None)
def test_every_pruned_filter_has_exactly_one_owner(case):
    plan, sizes, world_size = case
    owned: dict[str, list[int]] = {layer: [] for layer in plan.filters}
    for rank in range(world_size):
        for unit in work_units(plan, sizes, rank=rank, world_size=world_size):
            owned[unit.layer] += unit.rows
    assert owned == plan.pruned


@given(sharded())
@settings(max_examples=200, deadline=None)
def test_no_rank_carries_more_than_one_filter_above_the_mean(case):
    plan, sizes, world_size = case
    costs = rank_costs(plan, sizes, world_size)
    rows = [
        row_cost(plan.filters[name], len(plan.kept(name)), sizes[name])
        for name in plan.active_layers
    ]
    assert sum(costs) == sum(
        cost * len(plan.pruned[name]) for cost, name in zip(rows, plan.active_layers, strict=True)
    )
    assert max(costs) - sum(costs) / world_size <= max(rows, default=0)
