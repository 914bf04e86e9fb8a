"""The filters that are worth most within a time: a knapsack over layers' widths.

A network's time is the sum over its layers, each measured by itself at every width of what it reads
and gives (:mod:`tpp.measure.layer_times`), as in HALP (Shen et al., "Structural Pruning via
Latency-Saliency Knapsack", NeurIPS 2022). There the time of a filter is what its layer's grows by
while all else stands still, and the knapsack is filled filter by filter; here all widths are chosen
at once: a layer between two units costs what it does at both their widths. That is an integer
linear program, which scipy's HiGHS solves.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tpp.common.consoles import without_native_output
from tpp.common.errors import UserError
from tpp.measure.layer_times import LayerShape, LayerTimes, layer_shapes
from tpp.selection.budget import Unit, Widths

# Numbers of filters that a unit may keep, about so many: a layer between two of them is measured
# at each pair.
_STEPS = 16
_NANOSECONDS = 1e9
# A solution this close to the best possible is taken for it.
_GAP = 1e-6
_SECONDS = 60.0

_Float64s = NDArray[np.float64]


def thinned(widths: Widths, units: Sequence[Unit]) -> list[list[int]]:
    """Per unit the numbers of filters (of each group) that it may lose, rising from 0.

    Those that keep a multiple of a 16th of the unit's filters, and the most that may go.
    """
    found = []
    for unit, allowed in zip(units, widths.levels(), strict=True):
        step = -(-unit.per_group // _STEPS)
        found.append(
            [
                gone
                for gone in allowed.tolist()
                if (unit.per_group - gone) % step == 0 or gone in (0, unit.most)
            ]
        )
    return found


@dataclass(frozen=True)
class Costs:
    """Nanoseconds of a network's layers by the levels of its units: sums of three kinds of terms.

    Attributes:
        fixed: of what no unit changes.
        single: by unit, (levels,).
        pairs: by two units, (levels of the first, levels of the second).
    """

    fixed: int
    single: Mapping[int, NDArray[np.int64]]
    pairs: Mapping[tuple[int, int], NDArray[np.int64]]

    def total(self, levels: Sequence[int]) -> int:
        """Of the network whose units are at these levels."""
        found = self.fixed + sum(int(times[levels[unit]]) for unit, times in self.single.items())
        return found + sum(
            int(times[levels[one], levels[other]]) for (one, other), times in self.pairs.items()
        )


def costs_of(
    model: nn.Module,
    units: Sequence[Unit],
    levels: Sequence[Sequence[int]],
    times: LayerTimes,
    example_input: Tensor,
) -> Costs:
    """Measure what there is to be known of a network's layers.

    Where a layer reads several units at once (behind a concatenation), what each saves by itself is
    added up.

    Args:
        model: the dense network; only its shapes matter.
        units: what can go.
        levels: see :func:`thinned`.
        times: of layers.
        example_input: a batch that it takes.
    """
    calls = [
        (layer, shape)
        for layer, shapes in layer_shapes(model, example_input).items()
        for shape in shapes
    ]
    changing: list[tuple[LayerShape, dict[int, tuple[int, int]]]] = []
    for layer, shape in calls:
        tensor = f"{layer}.weight"
        lost = {
            number: (unit.losses.get((tensor, 0), 0), unit.losses.get((tensor, 1), 0))
            for number, unit in enumerate(units)
        }
        changing.append((shape, {n: pair for n, pair in lost.items() if any(pair)}))

    def narrowed(shape: LayerShape, gone: Mapping[int, int], lost: Any) -> LayerShape:
        rows, columns = shape.outputs, shape.inputs // shape.groups
        for number, count in gone.items():
            rows, columns = rows - count * lost[number][0], columns - count * lost[number][1]
        return shape.with_widths(rows, columns)

    def choices(lost: Mapping[int, Any]) -> list[dict[int, int]]:
        """What goes of each unit in every network that is measured for a layer."""
        if len(lost) <= 2:
            some = itertools.product(*(levels[number] for number in lost))
            return [dict(zip(lost, gone, strict=True)) for gone in some]
        return [{number: gone} for number in lost for gone in levels[number]]

    times.take(narrowed(shape, gone, lost) for shape, lost in changing for gone in choices(lost))
    fixed, single, pairs = 0, dict[int, Any](), dict[tuple[int, int], Any]()
    for shape, lost in changing:

        def cost(
            gone: Mapping[int, int], shape: LayerShape = shape, lost: Mapping[int, Any] = lost
        ) -> int:
            return round(_NANOSECONDS * times.seconds(narrowed(shape, gone, lost)))

        if len(lost) == 2:
            one, other = lost
            table = np.array(
                [[cost({one: a, other: b}) for b in levels[other]] for a in levels[one]]
            )
            pairs[one, other] = pairs.get((one, other), 0) + table
            continue
        if len(lost) != 1:
            fixed += cost({})
        for number in lost:
            column = np.array([cost({number: gone}) for gone in levels[number]])
            if len(lost) > 1:
                column = column - cost({})
            single[number] = single.get(number, 0) + column
    return Costs(fixed, single, pairs)


def most_worth(values: Sequence[_Float64s], costs: Costs, limit: int) -> list[int] | None:
    """The levels of all units that keep the most score within a time; None where none do.

    Args:
        values: per unit what it is worth at each level, (levels,).
        costs: of the same levels.
        limit: nanoseconds.

    Raises:
        UserError: scipy is missing, or the solver finds nothing in a minute.
    """
    try:
        from scipy.optimize import LinearConstraint, milp
        from scipy.sparse import coo_array
    except ImportError:
        raise UserError("budget.table: needs scipy: pip install scipy") from None
    offsets = [0, *itertools.accumulate(len(value) for value in values)]
    binaries = offsets[-1]
    size = binaries + sum(table.size for table in costs.pairs.values())
    worth, time = np.zeros(size), np.zeros(size)
    worth[:binaries] = np.concatenate([*values, np.zeros(0)])
    for unit, column in costs.single.items():
        time[offsets[unit] : offsets[unit + 1]] += column
    rows: list[int] = []
    columns: list[int] = []
    entries: list[float] = []
    bounds: list[float] = []

    def add(terms: Mapping[int, float], bound: float) -> None:
        rows.extend([len(bounds)] * len(terms))
        columns.extend(terms.keys())
        entries.extend(terms.values())
        bounds.append(bound)

    for start, end in itertools.pairwise(offsets):  # a unit is at one level
        add(dict.fromkeys(range(start, end), 1.0), 1.0)
    place = binaries
    for (one, other), table in costs.pairs.items():
        # What two units are at together: its sums over one are what the other is at.
        numbers = place + np.arange(table.size).reshape(table.shape)
        time[place : place + table.size] = table.ravel()
        for unit, of_level in ((one, numbers), (other, numbers.T)):
            for level, together in enumerate(of_level):
                terms = dict.fromkeys(together.tolist(), 1.0)
                add({**terms, offsets[unit] + level: -1.0}, 0.0)
        place += table.size
    shape = (len(bounds), size)
    equal = LinearConstraint(coo_array((entries, (rows, columns)), shape=shape), bounds, bounds)
    scale = 1 / max(limit, 1)  # solvers like numbers near 1
    within = LinearConstraint(time[None] * scale, -np.inf, (limit - costs.fixed) * scale)
    with without_native_output():  # HiGHS prints lines of its own, asked to or not
        done = milp(
            -worth,
            integrality=(np.arange(size) < binaries).astype(int),
            bounds=(0, 1),
            constraints=[equal, within],
            options={"mip_rel_gap": _GAP, "time_limit": _SECONDS},
        )
    if done.x is None:
        if done.status == 1:
            raise UserError(f"budget.table: no widths were found in {_SECONDS:g} seconds")
        return None
    return [int(done.x[start:end].argmax()) for start, end in itertools.pairwise(offsets)]


class Knapsack:
    """The widths of a network that keep the most score within a time.

    Args:
        model, example_input, times: see :func:`costs_of`.
        units: what can go.
        widths: what each may lose.
        worth: per unit what its filters (one of each group) are worth, lowest first.

    Attributes:
        dense: nanoseconds of the network with all filters.
        least: of the smallest one, where that is faster.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[Unit],
        widths: Widths,
        worth: Sequence[Tensor],
        times: LayerTimes,
        example_input: Tensor,
    ) -> None:
        self._levels = thinned(widths, units)
        self._values = [
            _kept(values, gone) for values, gone in zip(worth, self._levels, strict=True)
        ]
        self._costs = costs_of(model, units, self._levels, times, example_input)
        self.dense = self._costs.total([0] * len(units))
        self.least = min(self.dense, self._costs.total([len(gone) - 1 for gone in self._levels]))

    def within(self, limit: int) -> Tensor:
        """What every unit loses, int64 (units,), for a time of ``limit`` nanoseconds at most.

        The most that may go where there is no such network.
        """
        found = most_worth(self._values, self._costs, limit)
        found = [len(gone) - 1 for gone in self._levels] if found is None else found
        return torch.tensor([gone[at] for gone, at in zip(self._levels, found, strict=True)])

    def nanoseconds(self, removed: Tensor) -> int:
        """What the table says of a network whose units lose so much, of the levels there are."""
        at = [gone.index(int(lost)) for gone, lost in zip(self._levels, removed, strict=True)]
        return self._costs.total(at)


def _kept(worth: Tensor, gone: Sequence[int]) -> _Float64s:
    """What is kept of a unit's score when so many of its lowest filters go, (levels,)."""
    sums = torch.cat([worth.new_zeros(1), worth.cumsum(0)])
    kept: _Float64s = (sums[-1] - sums[[*gone]]).double().numpy()
    return kept
