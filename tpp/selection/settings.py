"""The settings of what goes, as a configuration has them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from tpp.common.errors import UserError
from tpp.common.settings import PositiveFloat, PositiveInt, Ratio, Section
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


# pydantic takes fields from the last base on, and has no use for the dataclass being frozen.
class BudgetSection(Section, LatencySettings, _Limits):  # type: ignore[misc]
    """What the pruned network may cost: exactly one of the first four keys.

    A configuration says a budget in another form than Python does
    (:class:`tpp.selection.budget.Budget`): it has one key for each kind, with counts as people
    write them, and beside it, as keys of its own, how a latency is measured.

    Attributes:
        speedup: dense multiply-accumulates over those left, at least.
        macs: multiply-accumulates for one image, at most; 2000000000, 2e9 or 2G.
        parameters: at most, written likewise.
        latency_ms: milliseconds per batch on the machine that the run is on, at most.
    """

    @model_validator(mode="after")
    def _one_kind(self) -> "BudgetSection":
        kinds = _kinds(self.model_dump())
        if len(kinds) != 1:
            found = f", not {' and '.join(kinds)}" if kinds else ""
            raise ValueError(f"exactly one of {', '.join(BUDGET_KINDS)} is needed{found}")
        if kinds != ["latency_ms"]:
            for key, value in self._conditions().items():
                if value != type(self).model_fields[key].default:
                    raise ValueError(f"{key} goes with latency_ms only")
        return self

    def budget(self) -> Budget:
        """The budget itself."""
        kind = _kinds(self.model_dump())[0]
        measured = LatencySettings(**self._conditions()) if kind == "latency_ms" else None
        return Budget(kind, getattr(self, kind), measured)

    def _conditions(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(LatencySettings)}


class PruningSection(Section):
    """How much of which layers goes; see ``tpp.selection.selection.Selection`` for what it means.

    This is the form that YAML has of it: plain dicts and lists, a budget by its kinds, and no seed,
    which is the run's. :meth:`selection` makes the one of the other, key by key.

    Attributes:
        ratios: layer-name pattern (shell-style glob) to share of the filters to remove, in
            [0, 1); the last pattern that matches a layer wins. With a budget, the most that may
            go.
        budget: what the whole network may cost.
        criterion: which filters go.
        round_to: the number of filters kept is a multiple of it.
        floors: layer-name pattern to how many filters (3), or what share (0.3), must stay.
        skip: patterns of layers that lose nothing.
        coupled: whether layers tied to those chosen are pruned with them.
    """

    ratios: dict[str, Ratio] = {}
    budget: BudgetSection | None = None
    criterion: Criterion = "l1"
    round_to: PositiveInt = 1
    floors: dict[str, Floor] = {}
    skip: list[str] = []
    coupled: bool = False

    def selection(self, seed: int) -> Selection:
        """How the filters that go are chosen; ``seed`` is of the criterion ``random``."""
        budget = self.budget.budget() if self.budget else None
        return Selection(**{**dict(self), "skip": tuple(self.skip), "budget": budget, "seed": seed})


def _kinds(budget: Mapping[str, Any]) -> list[BudgetKind]:
    return [kind for kind in BUDGET_KINDS if budget.get(kind) is not None]
