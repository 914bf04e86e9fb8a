"""TPP: decorrelate the filters that will go from all others while they shrink to zero."""

import math
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field
from torch import Tensor, nn

from tpp.channels.removal import why_inexact
from tpp.methods import base
from tpp.models.layers import filters_removed, layer_sizes, prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization import sharding
from tpp.regularization.regularizer import LayerStatistics, Regularizer
from tpp.regularization.schedule import GrowthSchedule


class GrowthSettings(base.Settings):
    """How lambda, the decay of the filters that go, grows: as published for CIFAR (Wang & Fu 2023,
    appendix).

    Attributes:
        delta: growth of lambda per update.
        tau: ceiling of lambda.
        update_interval (steps): K_u, from one update of lambda to the next (ImageNet: 5).
        stabilize_steps (steps): K_s, length of the phase at lambda = tau (ImageNet: 40,000).
    """

    delta: Annotated[float, Field(gt=0)] = 1e-4
    tau: Annotated[float, Field(gt=0)] = 1.0
    update_interval: Annotated[int, Field(ge=1)] = 10
    stabilize_steps: Annotated[int, Field(ge=1)] = 10_000

    @property
    def growth(self) -> GrowthSchedule:
        """The schedule of lambda, which no layer ends at zero."""
        return GrowthSchedule(
            delta=self.delta,
            tau=self.tau,
            update_interval=self.update_interval,
            stabilize_steps=self.stabilize_steps,
            zero_out_interval=None,
        )

    def for_batch(self, factor: Fraction) -> Self:
        """Lambda as a function of the images seen stays the same line, up to the same tau.

        An update is of a whole number of steps, so Delta makes up for what rounding does to K_u:
        Delta over the images between two updates is kept exactly.
        """
        interval = max(1, round(self.update_interval / factor))
        return self.changed(
            update_interval=interval,
            delta=growth_per_update(self.delta, self.update_interval, interval, factor),
            stabilize_steps=math.ceil(self.stabilize_steps / factor),
        )


def growth_per_update(growth: float, old: int, new: int, factor: Fraction) -> float:
    """Growth per update every ``new`` steps that is ``growth`` per ``old`` steps of fewer images.

    ``factor`` is the images of a new step over those of an old one.
    """
    return growth * float(factor * new / old)


class Settings(GrowthSettings):
    """The stage is as long as these settings say: lambda grows by ``delta`` every
    ``update_interval`` steps up to ``tau``, and then ``stabilize_steps`` follow. The defaults are
    those published for CIFAR (Wang & Fu 2023, appendix).

    Attributes:
        gram_weight: weight of the gram penalty relative to the decay.
        zero_out_interval (steps): from one layer's turn to be held at zero to the next one's.
        remove_at_zero: whether the filters are removed as soon as the last layer is held at zero,
            and the rest of the stage trains the smaller network, which is the same function with
            the same gradients (docs/performance.md). null: where that is so of everything in the
            stage.

    Example:
        {delta: 2e-4, tau: 0.5, update_interval: 5, stabilize_steps: 40000, gram_weight: 100,
        zero_out_interval: 50, remove_at_zero: false}
    """

    gram_weight: Annotated[float, Field(ge=0)] = 1000.0
    zero_out_interval: Annotated[int, Field(ge=1)] = 100
    remove_at_zero: bool | None = None

    @property
    def growth(self) -> GrowthSchedule:
        """The schedule of lambda and of zeroing."""
        return replace(super().growth, zero_out_interval=self.zero_out_interval)

    def for_batch(self, factor: Fraction) -> Self:
        """As the growth; turns come no later than they did, so that the last one still comes."""
        interval = max(1, math.floor(self.zero_out_interval / factor))
        return super().for_batch(factor).changed(zero_out_interval=interval)


class TPP(base.Method):
    """Trainability Preserving Pruning (Wang & Fu, ICLR 2023)."""

    name = "tpp"
    title = "TPP"
    settings_type: ClassVar[type[base.Settings]] = Settings

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._growth = settings.growth
        self._regularizer: Regularizer | None = None
        self._may_remove_at: int | None = None

    def check(self, model: nn.Module, plan: PruningPlan) -> None:
        """Raise UserError if the stabilise phase ends before the last layer is zeroed."""
        if plan.active_layers:
            number = list(prunable_layers(model)).index(plan.active_layers[-1])
            self._growth.check_zero_out(number)

    def steps(self) -> int:
        """Growth and stabilise phase together."""
        return self._growth.total_steps

    def rank_costs(self, model: nn.Module, plan: PruningPlan, ranks: int) -> list[int] | None:
        """Those of the gram penalty."""
        row_sizes, groups = layer_sizes(model, plan)
        return sharding.rank_costs(plan, row_sizes, ranks, groups=groups)

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Set the regulariser up; what follows the removal is ordinary training."""
        if context.stage == "regularize":
            assert context.plan is not None
            if filters_removed(model, context.plan):
                return
            self._model, self._context = model, context
            self._regularizer = Regularizer(
                model,
                context.plan,
                rank=context.rank,
                world_size=context.world_size,
                gram_weight=self.settings.gram_weight,
                growth=self._growth,
                example_input=context.example_input,
            )
            self._may_remove_at = self._steps_until_zero(model, context.plan)

    def before_step(self, step: int) -> bool:
        """Lambda, and which layers are at zero, so that their penalty is."""
        return self._regularizer.before_step(step) if self._regularizer else False

    def loss_terms(self) -> dict[str, Tensor]:
        """Gram penalty and decay, this rank's shares."""
        return self._regularizer.loss_terms() if self._regularizer else {}

    def after_step(self, step: int) -> None:
        """Zero the layers whose turn has come."""
        if self._regularizer:
            self._regularizer.after_step(step)

    def removes_after(
        self,
        model: nn.Module,
        plan: PruningPlan,
        *,
        counts_zeros: str | None = None,
        example_input: Tensor | None = None,
    ) -> int | None:
        """Steps until the last layer is held at zero, if its filters are removed then."""
        steps, wanted = self._steps_until_zero(model, plan), self.removes_at_zero
        if steps is None or wanted is False:
            return None
        if wanted is None and (
            counts_zeros is not None
            or why_inexact(model, plan, example_input=example_input) is not None
        ):
            return None
        return steps

    @property
    def removes_at_zero(self) -> bool | None:
        """Whether filters at zero are removed; None for where it changes nothing."""
        wanted: bool | None = self.settings.remove_at_zero
        return wanted

    def shrink(self, step: int) -> PruningPlan | None:
        """All filters of the plan, once they are held at zero, see :meth:`removes_after`.

        Also in a stage that goes on from a checkpoint of later steps.
        """
        due = self._may_remove_at
        if self._regularizer is None or due is None or step < due or self.finished(step):
            return None
        self._may_remove_at = None  # asked once: the answer stays what it is
        context, plan = self._context, self._regularizer.plan
        removes = self.removes_after(
            self._model,
            plan,
            counts_zeros=context.counts_zeros,
            example_input=context.example_input,
        )
        return None if removes is None else plan

    def _steps_until_zero(self, model: nn.Module, plan: PruningPlan) -> int | None:
        if not plan.active_layers:
            return None
        number = list(prunable_layers(model)).index(plan.active_layers[-1])
        return self._growth.steps_until_zero(number)

    def finished(self, step: int) -> bool:
        """Whether the stabilise phase is over."""
        return step >= self._growth.total_steps

    def scalars(self, step: int) -> dict[str, float]:
        """Lambda."""
        return {"lambda": self._growth.strength(step)} if self._regularizer else {}

    def statistics(self) -> dict[str, LayerStatistics]:
        """Magnitudes and correlations of the regularised layers."""
        return self._regularizer.statistics() if self._regularizer else {}

    def state_dict(self) -> dict[str, Any]:
        """The regulariser's."""
        return self._regularizer.state_dict() if self._regularizer else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The regulariser's."""
        if self._regularizer:
            self._regularizer.load_state_dict(state)
