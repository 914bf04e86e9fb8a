"""The settings of what goes, as a configuration has them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from tpp.common.errors import UserError
from tpp.common.settings import PositiveFloat, PositiveInt, Ratio, Section, UserPath
from tpp.measure.timing import LatencySettings
from tpp.selection.budget import BUDGET_KINDS, Budget, BudgetKind, parse_count
from tpp.selection.criteria import Criterion, check_floor
from tpp.selection.selection import Selection

# A part of the old ratios makes no sense among the new.
PRUNING_REPLACED = (("pruning", "ratios"), ("pruning", "floors"))


def another_budget(where: tuple[str, ...], base: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    """Whether a new budget is of another kind than the old one, and so replaces it as a whole."""
    return where == ("pruning", "budget") and not {*_kinds(new)} <= {*_kinds(base)}


def _count(value: Any) -> Any:
    try:
        return None if value is None else parse_count(value)
    except UserError as error:
        raise ValueError(str(error)) from None


def _floor(value: Any) -> int | float:
    try:
        check_floor(value, "a floor")
    except UserError as error:
        raise ValueError(str(error)) from None
    return value


Count = Annotated[PositiveInt | None, BeforeValidator(_count)]
Floor = Annotated[int | float, PlainValidator(_floor)]


class _Limits:
    speedup: Annotated[float, Field(ge=1)] | None = None
    macs: Count = None
    parameters: Count = None
    latency_ms: PositiveFloat | None = None
    latency_speedup: Annotated[float, Field(ge=1)] | None = None
    table: UserPath | None = None


# A budget in another form than Python has it (tpp.selection.budget.Budget): a key for each kind,
# with counts as people write them, and beside it, as keys of its own, how a latency is measured.
#
# pydantic takes fields from the last base on, and has no use for the dataclass being frozen.
class BudgetSection(Section, LatencySettings, _Limits):  # type: ignore[misc]
    """What the pruned network may cost: exactly one of the first five keys. The others say how a
    latency is measured, and go with ``latency_ms`` and ``latency_speedup`` only.

    Attributes:
        speedup: the least ratio of the dense network's multiply-accumulates to those of the pruned
            one.
        macs (multiply-accumulates for one image): the most that the pruned network may have;
            ``2000000000``, ``2e9`` or ``2G``.
        parameters: the most that the pruned network may have; written likewise.
        latency_ms (milliseconds per batch): the longest time that the pruned network may take, on
            the machine that the run is on.
        latency_speedup: the least ratio of the time that the dense network takes there to that of
            the pruned one.
        table: a file of the times of layers at all widths, which is made where there is none; what
            goes is then what leaves the most score within the time. null: the lowest filters of all
            layers.

    Example:
        {speedup: 2.31}

        {macs: 2G}

        {parameters: 12M}

        {latency_ms: 4.5, batch: 8, threads: 4, dtype: bf16, channels_last: true, compile: true,
        device: cuda, repeats: 50, warmup: 10}

        {latency_speedup: 2, batch: 8}

        {latency_ms: 20, backend: onnxruntime, table: resnet50_layers.json}
    """

    @model_validator(mode="after")
    def _one_kind(self) -> "BudgetSection":
        kinds = _kinds(self.model_dump())
        if len(kinds) != 1:
            found = f", not {' and '.join(kinds)}" if kinds else ""
            raise ValueError(f"exactly one of {', '.join(BUDGET_KINDS)} is needed{found}")
        if not kinds[0].startswith("latency"):
            for key, value in {**self._conditions(), "table": self.table}.items():
                if value != type(self).model_fields[key].default:
                    raise ValueError(f"{key} goes with latency_ms and latency_speedup only")
        return self

    def budget(self) -> Budget:
        """The budget itself."""
        kind = _kinds(self.model_dump())[0]
        measured = LatencySettings(**self._conditions()) if kind.startswith("latency") else None
        return Budget(kind, getattr(self, kind), measured, self.table)

    def _conditions(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(LatencySettings)}


# What tpp.selection.selection.Selection is to Python, in plain dicts and lists, a budget by its
# kinds, and without a seed, which is the run's; `selection` makes the one of the other, key by key.
class PruningSection(Section):
    """How many filters of which layers are removed, and which ones (docs/pruner.md). A stage may
    have a ``pruning`` of its own, which replaces this one as a whole.

    Attributes:
        ratios: share of the filters to remove, by pattern of layers; the last pattern that matches
            a layer wins. With a budget, the most that may go.
        budget: what the whole network may cost; which layers lose how many follows from it. null
            for ``ratios`` alone.
        criterion: what a filter is worth; those of the lowest worth go. ``l1``: mean absolute
            weight, as published; ``l2``: root mean square; ``bn_scale``: absolute scale of the
            layer's own BatchNorm (Liu et al., ICCV 2017); ``random``; ``largest``: as ``l1``, but
            the highest go, as a control experiment; ``fpgm``: distance to the other filters
            (He et al., CVPR 2019); ``group_norm``: norm of all weights that go with a filter (Fang
            et al., CVPR 2023); ``taylor``: squared change of the loss to first order, on training
            images (Molchanov et al., CVPR 2019); ``hessian``: change of the loss to second order,
            by its mean curvature (Yu et al., WACV 2022).
        batches (batches): over how many training batches ``taylor`` and ``hessian`` average.
        round_to (filters): the number of filters that a layer keeps is a multiple of this, rounded
            up.
        floors: how many filters of a layer (3), or what share of them (0.3), must stay, by pattern
            of layers.
        skip: patterns of layers that lose nothing.
        coupled: whether layers that are tied to the chosen ones, by a sum for instance, are pruned
            with them.

    Example:
        {ratios: {layer*.conv1: 0.7, layer4*.conv1: 0.5}, criterion: l2, round_to: 8,
        floors: {layer1*: 16, layer2*: 0.3}, skip: [layer1.0.conv1], coupled: true}

        {budget: {speedup: 2}, criterion: taylor, batches: 100}
    """

    ratios: dict[str, Ratio] = {}
    budget: BudgetSection | None = None
    criterion: Criterion = "l1"
    round_to: PositiveInt = 1
    floors: dict[str, Floor] = {}
    skip: list[str] = []
    coupled: bool = False
    batches: PositiveInt = 50

    def selection(self, seed: int) -> Selection:
        """How the filters that go are chosen; ``seed`` is of the criterion ``random``."""
        budget = self.budget.budget() if self.budget else None
        return Selection(**{**dict(self), "skip": tuple(self.skip), "budget": budget, "seed": seed})


def _kinds(budget: Mapping[str, Any]) -> list[BudgetKind]:
    return [kind for kind in BUDGET_KINDS if budget.get(kind) is not None]
