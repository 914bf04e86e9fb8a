"""Choosing which filters go (METHOD: Wang & Fu 2023, sec. 3.2).

How many go is said per layer, by pruning ratios, or for the whole network, by a budget
(:mod:`tpp.selection.budget`). Which ones go is said by a criterion.
"""

import difflib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from tpp.channels.channel_map import LayerChannels
from tpp.channels.survey import survey
from tpp.channels.trials import Trials
from tpp.common.errors import Note, UserError
from tpp.models.architecture import example_input_for
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.budget import Budget, Unit, Widths, removals
from tpp.selection.criteria import (
    CRITERIA,
    JOINT,
    NEED_IMAGES,
    OF_THE_LOSS,
    Criterion,
    Gradients,
    at_least_float32,
    check_floor,
    check_norms,
    floor_count,
    fpgm_scores,
    given_scores,
    group_norm_scores,
    hessian_scores,
    l1_scores,
    l2_scores,
    last_match,
    layer_ratios,
    pruned_count,
    random_scores,
    taylor_scores,
)

if TYPE_CHECKING:
    from tpp.selection.knapsack import Knapsack

# With a budget alone, a layer keeps at least a tenth of its filters unless floors say otherwise:
# global magnitudes know nothing of a layer that becomes too narrow to pass anything on.
_MOST = Fraction(9, 10)


@dataclass(frozen=True)
class Selection:
    """How filters are chosen: how many of which layers, and by what criterion.

    Attributes:
        ratios: layer-name pattern to pruning ratio in [0, 1), see
            :func:`tpp.selection.criteria.layer_ratios`: exactly that share of a layer goes, see
            :func:`tpp.selection.criteria.pruned_count`; of every group, in a convolution in
            groups. With a budget a ratio is the most that may go.
        criterion: what a filter is worth; the lowest go. ``l1``: mean absolute weight, as
            published; ``l2``: root mean square; ``bn_scale``: |gamma| of the layer's own
            BatchNorm (Liu et al., ICCV 2017); ``random``; ``largest``: as ``l1``, but the highest
            go, as a control experiment; ``fpgm``, ``group_norm``, ``taylor`` and ``hessian``: see
            :mod:`tpp.selection.criteria`. The last two ask ``gradients``.
        round_to: the number of filters that is kept is a multiple of it: rounded up, so never
            more goes than without, and to all filters where a layer has no such multiple. The
            groups of a convolution stay equal, so it is then the next multiple of both.
        floors: layer-name pattern to what must stay of each layer: that many filters (a whole
            number) or that share of them (a float up to 1). The last match wins.
        skip: patterns of layers that lose nothing. Layers tied to them then cannot either.
        coupled: whether layers that are tied to those chosen are pruned with them; by default
            all tied layers have to be matched by ratios, and a budget leaves them alone.
        budget: what the whole network may cost. Filters of all layers compete by their scores
            over the mean score of their layer, those of ``taylor`` and ``hessian`` as they are:
            the loss is the same for all. Layers that ``ratios`` match take part; without
            ratios all that can go without changing what is left, with at most 90% of each unless
            ``floors`` say otherwise. The budget is met to 1%, or as closely as whole filters and
            ``round_to`` permit, see :func:`tpp.selection.budget.meet`.
        seed: of the criteria ``random`` and ``hessian``.
        batches: over how many batches of training images ``taylor`` and ``hessian`` average, at
            most.
        gradients: of the loss over these; None where there are no images.

    Raises:
        UserError: a value makes no sense.
    """

    ratios: Mapping[str, float] = field(default_factory=dict)
    criterion: Criterion = "l1"
    round_to: int = 1
    floors: Mapping[str, int | float] = field(default_factory=dict)
    skip: Sequence[str] = ()
    coupled: bool = False
    budget: Budget | None = None
    seed: int = 0
    batches: int = 50
    gradients: Gradients | None = field(default=None, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.criterion not in CRITERIA:
            near = difflib.get_close_matches(str(self.criterion), CRITERIA, n=1, cutoff=0.0)[0]
            raise UserError(
                f"criterion: {self.criterion!r} is none of {', '.join(CRITERIA)}; "
                f"did you mean {near!r}?"
            )
        for name in ("round_to", "batches"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise UserError(f"{name} must be a whole number, not {value!r}")
            if value < 1:
                raise UserError(f"{name} must be at least 1, not {value}")
        for pattern, floor in self.floors.items():
            check_floor(floor, f"floor of {pattern!r}")
        if isinstance(self.skip, str):
            raise UserError(f"skip must be a list of patterns, not {self.skip!r}")

    @property
    def needs_images(self) -> bool:
        """Whether the criterion asks ``gradients``."""
        return self.criterion in NEED_IMAGES

    def select(
        self,
        model: nn.Module,
        *,
        example_input: Tensor | None = None,
        scores: Mapping[str, Tensor] | None = None,
        clock: Callable[[nn.Module], float] | None = None,
        trials: Trials | None = None,
    ) -> PruningPlan:
        """Choose the filters of ``model`` to remove, see :func:`select_filters`.

        Args:
            model, example_input, scores: as there.
            clock: measures a network in seconds per batch, for a budget of a latency; by
                default :func:`tpp.measure.timing.measure` on this machine.
            trials: of a network that differs in its tensors' values at most, to trace it once
                for this and for the removal.
        """
        candidates = self._candidates(model, example_input, trials)
        totals = self._totals(model, candidates, scores)
        relative = scores is not None or self.criterion not in OF_THE_LOSS
        while True:
            plan = self._plan(model, candidates, totals, example_input, clock, relative)
            # What is exact, and possible, at half of a layer need not be so at every width.
            unfit = self._unfit(candidates, plan) if self.budget else {}
            if not unfit:
                return plan
            for layers, reason in unfit.items():
                note = f"budget: {', '.join(layers)} left as wide as before: {reason}"
                warnings.warn(note, Note, stacklevel=2)
            candidates = candidates.without({layer for layers in unfit for layer in layers})

    def _unfit(self, candidates: "_Candidates", plan: PruningPlan) -> dict[tuple[str, ...], str]:
        """Layers of a plan that may not lose so many filters, and why.

        Layers that ratios name may lose those whose removal is not the same as zeroing them.
        """
        trials, channels = candidates.trials, candidates.channels
        trial = trials.run(plan, channels, training=False)
        if trial.fault is None or (self.ratios and not trial.refused):
            return {}
        faults = trials.faults(plan, channels)
        return {
            layers: trial.fault
            for layers, trial in faults.items()
            if trial.fault and (trial.refused or not self.ratios)
        }

    def _plan(
        self,
        model: nn.Module,
        candidates: "_Candidates",
        totals: Mapping[tuple[str, ...], Tensor],
        example_input: Tensor | None,
        clock: Callable[[nn.Module], float] | None,
        relative: bool,
    ) -> PruningPlan:
        """What goes of some candidates, see :meth:`select`."""
        orders, worth = ranked(candidates.units, totals, relative=relative)

        def plan(removed: Tensor) -> PruningPlan:
            return candidates.plan(orders, removed)

        units = candidates.units
        if self.budget is None:
            return plan(torch.tensor([unit.most for unit in units]))

        stopwatch = clock or self._clock(model, example_input)

        def seconds(removed: Tensor) -> float:
            from tpp.channels.removal import prune_model

            with warnings.catch_warnings():
                # Of networks that are measured and thrown away.
                warnings.simplefilter("ignore", Note)
                pruned = prune_model(model, plan(removed), example_input=example_input)
            return stopwatch(pruned)

        def knapsack(widths: Widths) -> "Knapsack":
            from tpp.measure.layer_times import LayerTimes
            from tpp.measure.timing import LatencySettings
            from tpp.selection.knapsack import Knapsack

            assert self.budget is not None and self.budget.table is not None
            times = LayerTimes(self.budget.latency or LatencySettings(), Path(self.budget.table))
            example = example_input_for(model) if example_input is None else example_input
            return Knapsack(model, units, widths, worth, times, example)

        return plan(
            removals(
                self.budget,
                model,
                units,
                _by_score(worth, units),
                seconds=seconds,
                knapsack=knapsack if self.budget.table is not None else None,
                example_input=example_input,
            )
        )

    def ceiling(
        self,
        model: nn.Module,
        *,
        example_input: Tensor | None = None,
        scores: Mapping[str, Tensor] | None = None,
    ) -> PruningPlan:
        """The plan in which all goes that may, whatever the budget; arguments as of select."""
        candidates = self._candidates(model, example_input)
        orders, _ = ranked(candidates.units, self._totals(model, candidates, scores))
        return candidates.plan(orders, torch.tensor([unit.most for unit in candidates.units]))

    def layers(self, model: nn.Module, *, example_input: Tensor | None = None) -> list[str]:
        """The layers that may lose filters, in network order; weights are not looked at."""
        units = self._candidates(model, example_input).units
        found = {layer for unit in units if unit.most for layer in unit.layers}
        return [layer for layer in prunable_layers(model) if layer in found]

    def _candidates(
        self, model: nn.Module, example_input: Tensor | None, trials: Trials | None = None
    ) -> "_Candidates":
        layers = prunable_layers(model)
        sizes = {layer: module.weight.shape[0] for layer, module in layers.items()}
        ratios = layer_ratios(model, self.ratios)
        floors = {
            layer: floor_count(floor, sizes[layer])
            for layer, floor in last_match(list(sizes), self.floors, "floor").items()
        }
        skipped = last_match(list(sizes), dict.fromkeys(self.skip, True), "skip")
        trials = trials or Trials(model, example_input=example_input)
        if self.ratios or self.budget is None:
            active = [
                layer
                for layer, ratio in ratios.items()
                if layer not in skipped and pruned_count(ratio, sizes[layer])
            ]
            channels = trials.channel_map.find(active, coupled=self.coupled)
        else:
            channels = _exact_only(survey(trials, coupled=self.coupled).channels)
        channels = {
            name: found
            for name, found in channels.items()
            if skipped.keys().isdisjoint(_narrowed(found))
        }
        if self.criterion == "bn_scale":
            check_norms(model, channels.values())
        units = self._units(channels, ratios, floors)
        named = {*ratios, *(layer for unit in units for layer in unit.layers)}
        filters = {layer: size for layer, size in sizes.items() if layer in named}
        return _Candidates(filters, units, channels, trials)

    def _units(
        self,
        channels: Mapping[str, LayerChannels],
        ratios: Mapping[str, float],
        floors: Mapping[str, int],
    ) -> list[Unit]:
        units = []
        for together in tied_sets(channels):
            members = [channels[name] for name in together]
            found = members[0]
            groups = math.lcm(*(member.groups for member in members))
            step = math.lcm(self.round_to, groups) // groups
            per_group = found.filters // groups
            stays = [floors[name] for name in _narrowed(*members) if name in floors]
            kept = max(
                per_group - self._most(together, per_group, ratios, bool(stays)),
                -(-max(stays, default=0) // groups),
            )
            most = max(per_group - -(-kept // step) * step, 0)
            units.append(
                Unit(together, found.filters, groups, step, most, losses_of(members, groups))
            )
        return units

    def _most(
        self, together: tuple[str, ...], per_group: int, ratios: Mapping[str, float], floor: bool
    ) -> int:
        """How many of ``per_group`` filters may go by the ratios, or for want of any."""
        given = [name for name in together if name in ratios]
        for name in given[1:]:
            if ratios[name] != ratios[given[0]]:
                raise UserError(
                    f"{given[0]} and {name} are tied (added to or multiplied with each other) and "
                    f"need the same ratio, not {ratios[given[0]]} and {ratios[name]}"
                )
        if given:
            return pruned_count(ratios[given[0]], per_group)
        return per_group - 1 if floor else math.floor(_MOST * per_group)

    def _totals(
        self, model: nn.Module, candidates: "_Candidates", scores: Mapping[str, Tensor] | None
    ) -> dict[tuple[str, ...], Tensor]:
        """What the filters of each unit are worth, (filters,), by the unit's layers."""
        channels = candidates.channels
        units = {unit.layers: [channels[name] for name in unit.layers] for unit in candidates.units}
        if scores is None and self.criterion in JOINT:
            totals = self._joint(model, units)
        else:
            totals = {}
            for layers in units:
                total = torch.zeros(())
                for found in (channels[name] for name in sorted(layers)):
                    total = total + (
                        self._scores(model, found)
                        if scores is None
                        else given_scores(scores, found)
                    )
                totals[layers] = total
        for layers, total in totals.items():
            if not bool(total.isfinite().all()):
                raise UserError(f"{layers[0]}: the scores of its filters are not finite")
        return totals

    def _joint(
        self, model: nn.Module, units: Mapping[tuple[str, ...], Sequence[LayerChannels]]
    ) -> dict[tuple[str, ...], Tensor]:
        """By a criterion that scores all layers of a unit together."""
        if self.criterion == "group_norm":
            return {layers: group_norm_scores(model, found) for layers, found in units.items()}
        if self.gradients is None:
            raise UserError(
                f"criterion {self.criterion}: needs training images; give the data, or use a "
                "criterion of the weights alone, such as group_norm"
            )
        asked = model, [*units.values()], self.gradients, self.batches
        hessian = self.criterion == "hessian"
        found = hessian_scores(*asked, self.seed) if hessian else taylor_scores(*asked)
        return dict(zip(units, found, strict=True))

    def _scores(self, model: nn.Module, found: LayerChannels) -> Tensor:
        """What every filter of a layer is worth by the criterion, (filters,)."""
        if self.criterion == "random":
            return random_scores(found.layer, found.filters, self.seed)
        if self.criterion == "bn_scale":
            norm = found.norms[0]
            scale = at_least_float32(model.get_parameter(f"{norm.module}.weight")).abs()
            return scale[norm.positions.to(scale.device)].mean(1)
        weight = model.get_parameter(found.weight)
        if self.criterion == "fpgm":
            return fpgm_scores(weight, getattr(model.get_submodule(found.layer), "groups", 1))
        if self.criterion == "l2":
            return l2_scores(weight)
        return -l1_scores(weight) if self.criterion == "largest" else l1_scores(weight)

    def _clock(
        self, model: nn.Module, example_input: Tensor | None
    ) -> Callable[[nn.Module], float]:
        from tpp.measure.timing import LatencySettings, measure

        assert self.budget is not None
        settings = self.budget.latency or LatencySettings()
        # A speedup is one beside the dense network, so that it takes turns with each of the others:
        # what slows the machine down for a while slows down both.
        beside = {"dense": model} if self.budget.kind == "latency_speedup" else {}
        dense: list[float] = []

        def clock(network: nn.Module) -> float:
            networks = {**beside, "pruned": network}
            timing = measure(networks, settings, example_input=example_input)
            if not beside:
                return timing["pruned"].median
            dense.append(timing["dense"].median)
            return timing["pruned"].median * dense[0] / dense[-1]

        return clock


def select_filters(
    model: nn.Module,
    ratios: Mapping[str, float] | None = None,
    *,
    example_input: Tensor | None = None,
    scores: Mapping[str, Tensor] | None = None,
    criterion: Criterion = "l1",
    round_to: int = 1,
    floors: Mapping[str, int | float] | None = None,
    skip: Sequence[str] = (),
    coupled: bool = False,
    budget: Budget | None = None,
    seed: int = 0,
    batches: int = 50,
    gradients: Gradients | None = None,
) -> PruningPlan:
    """Choose the filters to remove: by default those with the lowest mean absolute weights.

    Layers whose filters are added to or multiplied with each other lose the same filters, those
    with the lowest sum of scores, and have to be matched together, by one ratio, unless
    ``coupled``. A convolution in groups loses the lowest of every group, since the groups stay
    equal.

    Args:
        model: any network; only its Conv2d and Linear layers are looked at.
        ratios: layer-name pattern to pruning ratio in [0, 1), see
            :func:`tpp.selection.criteria.layer_ratios`.
        example_input: a batch to trace the network with, (1, channels, height, width); by
            default what the architecture expects, 224x224 where it does not say.
        scores: per layer how much each filter is worth, (n,), instead of the criterion's.
        criterion, round_to, floors, skip, coupled, budget, seed, batches, gradients: see
            :class:`Selection`.

    Returns:
        A plan with the matched layers and those tied to them, or with all that can go; ties are
        broken towards the lower index and the earlier layer.

    Raises:
        UserError: a pattern matches no layer or a value makes no sense, see :class:`Selection`; a
            layer's filters cannot be removed, for they feed an addition with those of a layer
            that is not matched or by another ratio, or are the network's output; a layer has no
            BatchNorm for ``bn_scale``; or the budget cannot be met.
    """
    selection = Selection(
        *(ratios or {}, criterion, round_to, floors or {}, skip, coupled, budget, seed, batches),
        gradients=gradients,
    )
    return selection.select(model, example_input=example_input, scores=scores)


def same_on_all_ranks(plan: PruningPlan) -> PruningPlan:
    """Rank 0's plan, on every rank: with a latency budget each rank's clock has its own say.

    All ranks have to call it. Without a process group it returns ``plan``.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return plan
    shared = [plan.to_dict()]
    dist.broadcast_object_list(shared, src=0)
    return PruningPlan.from_dict(shared[0])


@dataclass(frozen=True)
class _Candidates:
    """What may go: ``filters`` of every layer that the plan names, ``units`` of those with any."""

    filters: dict[str, int]
    units: list[Unit]
    channels: Mapping[str, LayerChannels]
    trials: Trials

    def without(self, layers: set[str]) -> "_Candidates":
        """The same, but for some layers and those that lose the same filters."""
        units = [unit for unit in self.units if layers.isdisjoint(unit.layers)]
        return replace(self, units=units)

    def plan(self, orders: list[Tensor], removed: Tensor) -> PruningPlan:
        """Take the first ``removed`` (units,) of every group in the units' orders."""
        pruned: dict[str, list[int]] = {layer: [] for layer in self.filters}
        for unit, order, number in zip(self.units, orders, removed.tolist(), strict=True):
            gone = sorted(order[:, :number].flatten().tolist())
            pruned |= {layer: list(gone) for layer in unit.layers}
        return PruningPlan(self.filters, pruned)


def ranked(
    units: Sequence[Unit], totals: Mapping[tuple[str, ...], Tensor], *, relative: bool = True
) -> tuple[list[Tensor], list[Tensor]]:
    """Per unit the filters of every group, lowest first, (groups, n), and what they are worth.

    The latter, (n,), float64 on the CPU, is for all groups together, since one of every group goes
    at a time: the mean of their scores over the mean of the unit, or, if scores are not
    ``relative``, what they add up to.
    """
    orders, worth = [], []
    for unit in units:
        lowest = torch.sort(totals[unit.layers].view(unit.groups, -1), dim=1, stable=True)
        per_group = torch.arange(unit.groups)[:, None] * unit.per_group
        orders.append(lowest.indices.cpu() + per_group)
        values = lowest.values.cpu().double()
        mean = values.abs().mean()
        if not relative:
            worth.append(values.sum(0))
        else:
            worth.append(values.mean(0) / mean if mean > 0 else values.mean(0))
    return orders, worth


def _by_score(worth: list[Tensor], units: list[Unit]) -> Tensor:
    """The unit that each next filter (of every group) is taken from, lowest score first, int64."""
    owners = [torch.full((unit.most,), number) for number, unit in enumerate(units)]
    scores = [values[: unit.most] for values, unit in zip(worth, units, strict=True)]
    if not units:
        return torch.zeros(0, dtype=torch.int64)
    return torch.cat(owners)[torch.argsort(torch.cat(scores), stable=True)]


def _narrowed(*members: LayerChannels) -> set[str]:
    """The layers that lose outputs: tied layers, and depthwise convolutions that go along."""
    return {
        entry.tensor.rpartition(".")[0]
        for member in members
        for entry in member.slices
        if entry.dim == 0
    }


def tied_sets(channels: Mapping[str, LayerChannels]) -> list[tuple[str, ...]]:
    """Layers that lose the same filters, each set once, in network order.

    A depthwise convolution that was not asked for is in none: it goes along with others.
    """
    sets = []
    for layer, found in channels.items():
        together = tuple(name for name in channels if name == layer or name in found.tied)
        if together[0] == layer and all(layer in channels[name].tied for name in together[1:]):
            sets.append(together)
    return sets


def losses_of(members: Sequence[LayerChannels], groups: int) -> dict[tuple[str, int], int]:
    """What tensors lose with one filter of every group, see :class:`tpp.selection.budget.Unit`."""
    positions: dict[tuple[str, int], list[Tensor]] = {}
    split: dict[tuple[str, int], int] = {}
    for member in members:
        for entry in member.slices:
            place = (entry.tensor, entry.dim)
            positions.setdefault(place, []).append(entry.positions.flatten())
            split[place] = entry.groups
    # Tied layers name what they have in common more than once.
    entries = {place: torch.cat(found).unique().numel() for place, found in positions.items()}
    return {
        place: number * groups // (members[0].filters * split[place])
        for place, number in entries.items()
    }


def _exact_only(channels: Mapping[str, LayerChannels]) -> dict[str, LayerChannels]:
    """The layers that, with all tied to them, can go without changing what the rest computes."""
    return {
        name: found
        for name, found in channels.items()
        if not any(channels[other].inexact for other in (name, *found.tied))
    }
