"""Meeting a budget: how many filters each layer loses so that the whole network fits.

A budget fixes the size of the network, not of its layers. Filters of all layers compete by scores
that are rescaled per layer (by the mean here; Molchanov et al., ICLR 2017, take the L2 norm) unless
they are of the loss, and the lowest go until the network is small enough. What a network with given
widths costs is a sum over its tensors of products of two widths, so no network is built while
widths are searched for.
"""

import copy
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Literal, Protocol, get_args

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.measure.counts import Counts, count

if TYPE_CHECKING:
    from tpp.measure.timing import LatencySettings

BudgetKind = Literal["speedup", "macs", "parameters", "latency_ms", "latency_speedup"]
BUDGET_KINDS: tuple[BudgetKind, ...] = get_args(BudgetKind)
# A search for a latency measures the dense network, the smallest one, and so many in between.
_BISECTIONS = 6
# Networks of few layers and coarse steps: so many sets of widths are tried in about a second.
_MOST_TRIED = 2**20
_LIMITS = "ratios, floors, skip and round_to"
_SUFFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}


@dataclass(frozen=True)
class Budget:
    """How small, or how fast, the pruned network is to be.

    Attributes:
        kind: ``speedup``: dense multiply-accumulates over those left, at least ``value``;
            ``macs``: multiply-accumulates for one image, at most; ``parameters``: at most;
            ``latency_ms``: milliseconds per batch as measured on this machine, at most;
            ``latency_speedup``: times as fast as the dense network, likewise, at least.
        value: the number.
        latency: under which conditions a latency is measured; by default
            ``LatencySettings()``. For the last two kinds only.
        table: a file of times of layers at all widths (:mod:`tpp.measure.layer_times`), which is
            made where there is none. With it, what goes is what leaves the most score within the
            time (:mod:`tpp.selection.knapsack`), and not the lowest filters of all layers.

    Raises:
        UserError: there is no such kind, or the value makes no sense for it.
    """

    kind: BudgetKind
    value: float
    latency: "LatencySettings | None" = None
    table: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in BUDGET_KINDS:
            raise UserError(f"budget: {self.kind!r} is none of {', '.join(BUDGET_KINDS)}")
        value = self.value
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not math.isfinite(value) or value <= 0:
            raise UserError(f"budget: {self.kind} must be a number above 0, not {value!r}")
        if self.kind.endswith("speedup") and value < 1:
            raise UserError(f"budget: {self.kind} must be at least 1, not {value!r}")
        if self.latency is not None and not self.measured:
            raise UserError(f"budget: {self.kind} takes no conditions of measuring")
        if self.table is not None and not self.measured:
            raise UserError(f"budget: {self.kind} takes no table of layers' times")

    @property
    def measured(self) -> bool:
        """Whether networks are measured on this machine to meet it."""
        return self.kind.startswith("latency")

    def seconds(self, dense: float) -> float:
        """What a batch may take at most, of a latency, where the dense network takes ``dense``."""
        return dense / self.value if self.kind == "latency_speedup" else self.value / 1000

    def limit(self, dense: int) -> int:
        """The most multiply-accumulates (``speedup``, ``macs``) or parameters that fit.

        Args:
            dense: the dense network's.
        """
        # The decimal that was written, so that 1.1 is not a little more than 1.1.
        value = Fraction(repr(float(self.value)))
        return math.floor(dense / value if self.kind == "speedup" else value)

    def __str__(self) -> str:
        if self.kind == "speedup":
            return f"a speedup of {self.value:g}x"
        if self.kind == "latency_ms":
            return f"{self.value:g} ms per batch"
        if self.kind == "latency_speedup":
            return f"a measured speedup of {self.value:g}x"
        name = "MACs" if self.kind == "macs" else "parameters"
        return f"{math.floor(self.value):,} {name}"


def parse_count(text: str | int | float) -> int:
    """A whole number as people write large ones: 2000000, ``2e6``, ``2M``, ``1.5G``, ``300k``.

    Raises:
        UserError: it is no such number, or not above 0.
    """
    found = re.fullmatch(r"(\d+(?:\.\d*)?(?:[eE]\+?\d{1,2})?)\s*([kKMG]?)", str(text).strip())
    count = math.floor(Fraction(found[1]) * _SUFFIXES[found[2]]) if found else 0
    if count < 1:
        raise UserError(f"{text!r} is no number above 0 such as 2000000, 2e6, 2M (k, M, G)")
    return count


@dataclass(frozen=True)
class Unit:
    """Filters that go together: those of tied layers, and one of every group at a time.

    Attributes:
        layers: the tied layers, in network order; one where a layer is alone.
        filters: of each of them.
        groups: equal parts of the filters that must each lose as many.
        step: filters of each group by which the number that is kept changes, see ``round_to``.
        most: filters of each group that may go, at most; a number that :meth:`Widths.rounded`
            leaves alone.
        losses: how many entries a tensor loses along a dimension when one filter of every group
            goes: {(tensor, dim): entries}.
    """

    layers: tuple[str, ...]
    filters: int
    groups: int
    step: int
    most: int
    losses: Mapping[tuple[str, int], int]

    @property
    def per_group(self) -> int:
        """Filters of each group."""
        return self.filters // self.groups


class Widths:
    """Which numbers of filters the units of a network may lose.

    Numbers are int64 tensors (units,) that count filters of each group.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.most = torch.tensor([unit.most for unit in units], dtype=torch.int64)
        self._all = torch.tensor([unit.per_group for unit in units], dtype=torch.int64)
        self._step = torch.tensor([unit.step for unit in units], dtype=torch.int64)

    def rounded(self, wanted: Tensor) -> Tensor:
        """The most that may go if no more than ``wanted`` is to: what is kept is rounded up."""
        kept = -((wanted - self._all) // self._step) * self._step
        return (self._all - kept).clamp(min=0)

    def levels(self) -> list[Tensor]:
        """Per unit all numbers that it may lose, rising from 0."""
        found = []
        for most, filters, step in zip(self.most, self._all, self._step, strict=True):
            gone = torch.arange(int(most) + 1)
            found.append(gone[((filters - gone) % step == 0) | (gone == 0)])
        return found


class WidthCost:
    """Multiply-accumulates, or parameters, of a network as a function of what its units lose.

    Every filter of a unit takes as many entries out of a tensor as any other, so only their
    number counts. A tensor that shrinks along two dimensions a and b costs
    total / (a b) * (a - lost_a) (b - lost_b), as do the multiply-accumulates of its layer.

    Args:
        dense: what the dense network costs.
        totals: what each tensor's share in that is; tensors that no unit shrinks may be left out.
        shapes: of these tensors.
        units: the network's.
    """

    def __init__(
        self,
        dense: int,
        totals: Mapping[str, int],
        shapes: Mapping[str, Sequence[int]],
        units: Sequence[Unit],
    ) -> None:
        self.dense = dense
        dims: dict[str, list[int]] = {}
        for tensor, dim in sorted({place for unit in units for place in unit.losses}):
            if tensor in totals:
                dims.setdefault(tensor, []).append(dim)
        assert all(len(found) <= 2 for found in dims.values()), dims
        self._fixed = dense - sum(totals[tensor] for tensor in dims)
        # float64 holds these whole numbers exactly, and its matrix products are fast.
        self._sizes = torch.ones(2, len(dims), 1, dtype=torch.float64)
        self._lost = torch.zeros(2, len(dims), len(units), dtype=torch.float64)
        factors = []
        for row, (tensor, found) in enumerate(dims.items()):
            for side, dim in enumerate(found):
                self._sizes[side, row] = shapes[tensor][dim]
                for column, unit in enumerate(units):
                    self._lost[side, row, column] = unit.losses.get((tensor, dim), 0)
            factors.append(totals[tensor] // math.prod(shapes[tensor][dim] for dim in found))
        self._factors = torch.tensor(factors, dtype=torch.int64)[:, None]

    @classmethod
    def of_macs(cls, model: nn.Module, counts: Counts, units: Sequence[Unit]) -> "WidthCost":
        """Multiply-accumulates for one image; ``counts`` are those of ``model``."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        totals = {f"{layer.name}.weight": layer.macs for layer in counts.layers}
        return cls(counts.macs, totals, shapes, units)

    @classmethod
    def of_parameters(cls, model: nn.Module, counts: Counts, units: Sequence[Unit]) -> "WidthCost":
        """Trainable values; ``counts`` are those of ``model``."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        totals = {name: math.prod(shape) for name, shape in shapes.items()}
        return cls(counts.parameters, totals, shapes, units)

    def __call__(self, removed: Tensor) -> Tensor:
        """Costs, int64 (candidates,), of networks whose units lose ``removed`` (units, candidates).

        ``removed`` counts filters of each group.
        """
        first, second = (self._sizes - self._lost @ removed.double()).long()
        return self._fixed + (self._factors * first * second).sum(0)

    def to(self, device: torch.device) -> "WidthCost":
        """The same on another device."""
        other = copy.copy(self)
        for name in ("_sizes", "_lost", "_factors"):
            setattr(other, name, getattr(self, name).to(device))
        return other

    def share(self, removed: Tensor) -> Tensor:
        """What is left of the cost of all that units shrink, a scalar in (0, 1], differentiable.

        Where filters go at random, those of one unit independently of those of others, it is the
        expected share.

        Args:
            removed: (units,), filters of each group, or their expected numbers.
        """
        first, second = self._sizes[..., 0] - self._lost @ removed.double()
        factors = self._factors[:, 0].double()
        return (factors * first * second).sum() / (factors * self._sizes[..., 0].prod(0)).sum()

    def one(self, removed: Tensor) -> int:
        """Cost of one network; ``removed`` is (units,)."""
        return int(self(removed[:, None]))


def removals(
    budget: Budget,
    model: nn.Module,
    units: Sequence[Unit],
    order: Tensor,
    *,
    seconds: Callable[[Tensor], float],
    knapsack: "Callable[[Widths], Knapsack] | None" = None,
    example_input: Tensor | None = None,
) -> Tensor:
    """What every unit loses for a network to meet a budget.

    Args:
        budget: what to meet.
        model: the dense network; only its shapes matter.
        units: what can go.
        order, seconds: see :func:`meet` and :func:`meet_latency`.
        knapsack: makes one of the units' widths, for a budget with a table.
        example_input: see :func:`tpp.measure.counts.count`.

    Returns:
        int64 (units,): filters of each group to remove.

    Raises:
        UserError: the budget cannot be met; names the best that can be had.
    """
    counts = count(model, example_input=example_input)
    widths = Widths(units)
    if budget.measured and knapsack is not None:
        return meet_latency(Reach.of_knapsack(knapsack, widths), widths, budget, seconds)
    if budget.measured:
        macs = WidthCost.of_macs(model, counts, units)
        return meet_latency(Reach.of_cost(macs, widths, order), widths, budget, seconds)
    price = WidthCost.of_parameters if budget.kind == "parameters" else WidthCost.of_macs
    cost = price(model, counts, units)
    limit, least = budget.limit(cost.dense), cost.one(widths.most)
    if least > limit:
        of_image = f" for {counts.of_image}" if budget.kind == "macs" else ""
        best = f"{cost.dense / least:.4f}x" if budget.kind == "speedup" else f"{least:,}"
        raise UserError(
            f"budget: {budget}{of_image} cannot be met: the best that {_LIMITS} allow is {best}"
        )
    return meet(cost, widths, order, limit)


def meet(cost: WidthCost, widths: Widths, order: Tensor, limit: int) -> Tensor:
    """What every unit loses for the network to cost no more than ``limit``.

    As few filters as will do go in the given order. Where that ends more than 1% below the limit,
    for a filter or a step of ``round_to`` costs more than that, units take over from each other
    until it is 1%, or nothing that is tried comes closer to the limit from below.

    Args:
        cost: of the network.
        widths: of its units.
        order: int64, the unit that the next filter (of each group) is taken from; holds every
            unit as often as it may lose one.
        limit: what the network may cost; no less than what is left when all goes that may.

    Returns:
        int64 (units,): filters of each group to remove.
    """

    def after(taken: int) -> Tensor:
        wanted = torch.bincount(order[:taken], minlength=len(widths.most))
        return widths.rounded(wanted)

    low, high = 0, len(order)
    while low < high:
        middle = (low + high) // 2
        if cost.one(after(middle)) <= limit:
            high = middle
        else:
            low = middle + 1
    return _come_closer(cost, widths, after(low), limit)


def _come_closer(cost: WidthCost, widths: Widths, removed: Tensor, limit: int) -> Tensor:
    """Change two units at a time while the cost is more than 1% below the limit.

    By as few steps as will do, so that the order is departed from no more than it must be; where
    two units cannot do it, all are changed if there are not too many ways to.
    """
    levels = widths.levels()
    reaches = [2**power for power in range(max(map(len, levels), default=0).bit_length())]
    stage = 0
    while 101 * cost.one(removed) < 100 * limit and stage <= len(reaches):
        last = stage == len(reaches)
        near = _all_widths(levels) if last else _neighbours(levels, removed, reaches[stage])
        closest = _closest(cost, near, limit)
        if closest is not None and cost.one(closest) > cost.one(removed):
            removed, stage = closest, 0
        else:
            stage += 1
    return removed


def _closest(cost: WidthCost, batches: Iterable[Tensor], limit: int) -> Tensor | None:
    """Of networks (units, candidates) the one that costs most within the limit; the first one."""
    closest, price = None, -1
    for candidates in batches:
        costs = cost(candidates)
        costs[costs > limit] = -1
        found = int(costs.argmax())
        if int(costs[found]) > price:
            closest, price = candidates[:, found], int(costs[found])
    return closest


def _neighbours(levels: list[Tensor], removed: Tensor, reach: int) -> Iterator[Tensor]:
    """Networks (units, candidates) in which one or two units are up to ``reach`` levels away."""
    near = []
    for unit, allowed in enumerate(levels):
        here = int(torch.searchsorted(allowed, removed[unit]))
        near.append(allowed[max(here - reach, 0) : here + reach + 1])
    for one, other in itertools.combinations(range(len(levels)), 2):
        pairs = torch.cartesian_prod(near[one], near[other])
        candidates = removed[:, None].repeat(1, len(pairs))
        candidates[one], candidates[other] = pairs[:, 0], pairs[:, 1]
        yield candidates
    if len(levels) == 1:
        yield near[0][None]


def _all_widths(levels: list[Tensor]) -> Iterator[Tensor]:
    """All networks (units, candidates) that there are; none where they are too many to try."""
    sizes = [len(allowed) for allowed in levels]
    total = math.prod(sizes)
    if total > _MOST_TRIED:
        return
    for numbers in torch.arange(total).split(2**14):
        candidates = []
        for allowed, size in zip(levels, sizes, strict=True):
            candidates.append(allowed[numbers % size])
            numbers = numbers // size
        yield torch.stack(candidates)


class Knapsack(Protocol):
    """See :class:`tpp.selection.knapsack.Knapsack`."""

    dense: int
    least: int

    def within(self, limit: int) -> Tensor:
        """What every unit loses for a time of ``limit`` nanoseconds at most."""


@dataclass(frozen=True)
class Reach:
    """Networks from the dense to the smallest one, by what they should cost.

    Attributes:
        dense, least: what these two should.
        within: what every unit loses, (units,), for a network to cost no more than so much.
    """

    dense: int
    least: int
    within: Callable[[int], Tensor]

    @classmethod
    def of_cost(cls, cost: WidthCost, widths: Widths, order: Tensor) -> "Reach":
        """By a count; see :func:`meet`."""
        return cls(
            cost.dense, cost.one(widths.most), lambda limit: meet(cost, widths, order, limit)
        )

    @classmethod
    def of_knapsack(cls, knapsack: Callable[[Widths], Knapsack], widths: Widths) -> "Reach":
        """By the times of its layers."""
        made = knapsack(widths)
        return cls(made.dense, made.least, made.within)


def meet_latency(
    reach: Reach, widths: Widths, budget: Budget, seconds: Callable[[Tensor], float]
) -> Tensor:
    """What every unit loses for a batch to take no longer than it may: the least that will do.

    Bisects over what networks should cost, between the dense network's and the least possible, and
    measures eight networks at most.

    Args:
        reach: these networks.
        widths: of the units.
        budget: of a latency.
        seconds: measures the network whose units lose so much, (units,), in seconds per batch.

    Returns:
        int64 (units,): filters of each group to remove.

    Raises:
        UserError: the smallest network takes longer; names the fastest that was measured.
    """
    nothing = torch.zeros_like(widths.most)
    dense_seconds = seconds(nothing)
    limit = budget.seconds(dense_seconds)
    if dense_seconds <= limit:
        return nothing
    least_seconds = seconds(widths.most)
    if least_seconds > limit:
        fastest = min(dense_seconds, least_seconds)
        times = f", {dense_seconds / fastest:.3g}x as fast as the dense one"
        raise UserError(
            f"budget: {budget} cannot be met: with what {_LIMITS} allow, the fastest "
            f"network measured takes {1000 * fastest:.4g} ms{times}"
        )
    best, fast, slow = widths.most, reach.least, reach.dense
    for _ in range(_BISECTIONS):
        middle = (fast + slow) // 2
        removed = reach.within(middle)
        if seconds(removed) <= limit:
            best, fast = removed, middle
        else:
            slow = middle
    return best
