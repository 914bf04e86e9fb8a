"""Sharing the penalty's work out among ranks, without any communication.

The pruned filters of all layers are laid in one line, each as long as its cost, and the line is
cut into as many equal parts as there are ranks. A part is one block of rows for each layer that
it touches. Every rank computes the same cut from the plan alone, and no rank carries more than
one filter's cost above the mean.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

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
    """Multiply-adds that one pruned filter costs: G_B (n d), G_B W (n d) and G_BK^T W_B (k d).

    ``filters`` and ``kept`` count the filters that it can correlate with: the layer's, or those
    of its own group in a convolution in groups.
    """
    return (2 * filters + kept) * row_size


def work_units(
    plan: PruningPlan,
    row_sizes: Mapping[str, int],
    *,
    rank: int,
    world_size: int,
    groups: Mapping[str, int] | None = None,
) -> list[WorkUnit]:
    """The blocks of pruned filters that ``rank`` of ``world_size`` computes.

    Args:
        plan: which filters go.
        row_sizes: per layer of the plan the weights per filter (d = c_in / groups * k_h * k_w).
        rank: 0-based rank.
        world_size: number of ranks, at least 1.
        groups: per layer that is a convolution in groups, their number.

    Returns:
        At most one unit per layer, in network order; over all ranks every pruned filter exactly
        once.
    """
    segments = _segments(plan, row_sizes, groups or {})
    units: dict[str, WorkUnit] = {}
    for (layer, rows, cost), cuts in zip(segments, _cuts(segments, world_size), strict=True):
        first, last = int(cuts[rank]), int(cuts[rank + 1])
        if last > first:
            block = tuple(rows[first:last])
            before = units.get(layer, WorkUnit(layer, (), 0))
            units[layer] = WorkUnit(layer, before.rows + block, before.cost + cost * len(block))
    return list(units.values())


def rank_costs(
    plan: PruningPlan,
    row_sizes: Mapping[str, int],
    world_size: int,
    *,
    groups: Mapping[str, int] | None = None,
) -> list[int]:
    """Multiply-adds per step of every rank's share; arguments as of :func:`work_units`."""
    segments = _segments(plan, row_sizes, groups or {})
    costs = np.zeros(world_size, dtype=np.int64)
    for (_, _, cost), cuts in zip(segments, _cuts(segments, world_size), strict=True):
        costs += cost * np.diff(cuts)
    return [int(cost) for cost in costs]


# A piece of the line of pruned filters, all of one cost: layer, indices, cost of each.
_Segment = tuple[str, list[int], int]


def _segments(
    plan: PruningPlan, row_sizes: Mapping[str, int], groups: Mapping[str, int]
) -> list[_Segment]:
    """The line of pruned filters, one piece for each gram matrix."""
    segments = []
    for layer in plan.active_layers:
        per_group = plan.filters[layer] // groups.get(layer, 1)
        members: dict[int, list[int]] = {}
        for row in plan.pruned[layer]:
            members.setdefault(row // per_group, []).append(row)
        for rows in members.values():
            cost = row_cost(per_group, per_group - len(rows), row_sizes[layer])
            segments.append((layer, rows, cost))
    return segments


def _cuts(segments: Sequence[_Segment], world_size: int) -> Iterator[np.ndarray]:
    """For every piece how many of its filters lie before each rank's part; (world_size + 1,)."""
    total = sum(cost * len(rows) for _, rows, cost in segments)
    boundaries = 2 * total * np.arange(world_size + 1, dtype=np.int64)
    start = 0
    for _, rows, cost in segments:
        # A filter belongs to the rank in whose part its midpoint lies; in integers, exactly.
        # Filter i has it at start + (i + 1/2) cost; count those below rank * total / world_size.
        doubled = boundaries - world_size * (2 * start + cost)
        yield np.clip(-(-doubled // (2 * world_size * cost)), 0, len(rows))
        start += cost * len(rows)


def share_of(costs: Mapping[str, int], rank: int, world_size: int) -> list[str]:
    """The items that ``rank`` of ``world_size`` takes, in the order of ``costs``.

    The costliest first, each goes to the rank with the least so far (ties to the lower rank and
    the earlier item), so every rank works out the same assignment and no rank is more than one
    item above the mean.
    """
    loads = [0] * world_size
    mine = set()
    for name in sorted(costs, key=lambda name: -costs[name]):
        lightest = loads.index(min(loads))
        loads[lightest] += costs[name]
        if lightest == rank:
            mine.add(name)
    return [name for name in costs if name in mine]
