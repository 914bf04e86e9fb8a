"""The settings of what goes."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PlainValidator, model_validator

from tpp.common.errors import UserError
from tpp.common.settings import PositiveFloat, PositiveInt, Ratio, Section
from tpp.selection.budget import BUDGET_KINDS, Budget, BudgetKind, parse_count
from tpp.selection.criteria import Criterion, check_floor


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


class BudgetSection(Section):
    """What the pruned network may cost: exactly one of the first four keys.

    Attributes:
        speedup: dense multiply-accumulates over those left, at least.
        macs: multiply-accumulates for one image, at most; 2000000000, 2e9 or 2G.
        parameters: at most, written likewise.
        latency_ms: milliseconds per batch on the machine that the run is on, at most.
        batch, threads, dtype, channels_last, compile, device, repeats, warmup: how a latency is
            measured, see ``tpp.measure.timing.LatencySettings``.
    """

    speedup: Annotated[float, Field(ge=1)] | None = None
    macs: Count = None
    parameters: Count = None
    latency_ms: PositiveFloat | None = None
    batch: PositiveInt = 1
    threads: PositiveInt | None = None
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    repeats: PositiveInt = 30
    warmup: Annotated[int, Field(ge=0)] = 5

    @model_validator(mode="after")
    def _one_kind(self) -> "BudgetSection":
        kinds = budget_kinds(self.model_dump())
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
        kind = budget_kinds(self.model_dump())[0]
        if kind != "latency_ms":
            return Budget(kind, getattr(self, kind))
        from tpp.measure.timing import LatencySettings

        return Budget(kind, getattr(self, kind), LatencySettings(**self._conditions()))

    def _conditions(self) -> dict[str, Any]:
        return self.model_dump(exclude={*map(str, BUDGET_KINDS)})


class PruningSection(Section):
    """How much of which layers goes; see ``tpp.selection.selection.Selection`` for what it means.

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


def budget_kinds(section: Mapping[str, Any]) -> list[BudgetKind]:
    return [kind for kind in BUDGET_KINDS if section.get(kind) is not None]
