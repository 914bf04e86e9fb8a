"""Sharing the penalty's work out among ranks, without any communication.

The pruned filters of all layers are laid in one line, each as long as its cost, and the line is
cut into as many equal parts as there are ranks. A part is one block of rows for each layer that
it touches. Every rank computes the same cut from the plan alone, and no rank carries more than
one filter's cost above the mean.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tpp.plan import PruningPlan


@dataclass(frozen=True)
class WorkUnit:
    """A block of pruned filters of one layer: what a rank computes at once.

    Attributes:
        layer: the layer's name.
        rows: indices of the pruned filters in this block.
        cost: multiply-adds of one forward and backward pass.
    """

    layer: str
    rows: tuple[int, ...]
    cost: int


def row_cost(filters: int, kept: int, row_size: int) -> int:
    """Multiply-adds that one pruned filter costs: G_B (n d), G_B W (n d) and G_BK^T W_B (k d)."""
    return (2 * filters + kept) * row_size


def work_units(
    plan: PruningPlan, row_sizes: Mapping[str, int], *, rank: int, world_size: int
) -> list[WorkUnit]:
    """The blocks of pruned filters that ``rank`` of ``world_size`` computes.

    Args:
        plan: which filters go.
        row_sizes: per layer of the plan the weights per filter (d = c_in * k_h * k_w).
        rank: 0-based rank.
        world_size: number of ranks, at least 1.

    Returns:
        At most one unit per layer, in network order; over all ranks every pruned filter exactly
        once.
    """
    costs = {
        layer: row_cost(plan.filters[layer], len(plan.kept(layer)), row_sizes[layer])
        for layer in plan.active_layers
    }
    total = sum(costs[layer] * len(plan.pruned[layer]) for layer in costs)
    units = []
    start = 0
    for layer, cost in costs.items():
        rows = plan.pruned[layer]
        # A filter belongs to the rank in whose part its midpoint lies; in integers, exactly.
        first = _rows_before(rank, world_size, total, start, cost, len(rows))
        last = _rows_before(rank + 1, world_size, total, start, cost, len(rows))
        if last > first:
            block = tuple(rows[first:last])
            units.append(WorkUnit(layer, block, cost * len(block)))
        start += cost * len(rows)
    return units


def _rows_before(rank: int, world_size: int, total: int, start: int, cost: int, rows: int) -> int:
    """How many of a layer's rows, the first beginning at ``start``, lie before ``rank``'s part."""
    # Row i has its midpoint at start + (i + 1/2) cost; count those below rank * total / world_size.
    doubled = 2 * rank * total - world_size * (2 * start + cost)
    count = -(-doubled // (2 * world_size * cost))
    return min(max(count, 0), rows)


def rank_costs(plan: PruningPlan, row_sizes: Mapping[str, int], world_size: int) -> Sequence[int]:
    """Multiply-adds per step of every rank's share."""
    return [
        sum(unit.cost for unit in work_units(plan, row_sizes, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
