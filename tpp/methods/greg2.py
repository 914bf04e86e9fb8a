"""GReg-2: decay all filters alike, pick those that shrink, then go on as GReg-1 with these."""

from collections.abc import Mapping
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpp.methods import base, greg1
from tpp.methods.tpp import growth_per_update
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import LayerStatistics, Regularizer, factors_for
from tpp.regularization.schedule import GrowthSchedule
from tpp.selection.selection import same_on_all_ranks


class Settings(greg1.Settings):
    """The settings of GReg-1, and those of the phase that picks the filters. Defaults of that phase
    are as in GReg's public code, for ImageNet and CIFAR alike.

    Attributes:
        pick_delta: growth per update of the decay on all filters.
        pick_ceiling: the decay at which that growth ends and the filters are picked; not above
            ``tau``.
        kept_decay: decay of the kept filters' weights afterwards. Below zero it lets them recover:
            -1e-4 takes back the ordinary weight decay of the ImageNet runs.

    Example:
        {delta: 2e-4, tau: 0.5, update_interval: 5, stabilize_steps: 5000, pick_delta: 1e-4,
        pick_ceiling: 0.1, kept_decay: 0.0}
    """

    pick_delta: Annotated[float, Field(gt=0)] = 1e-5
    pick_ceiling: Annotated[float, Field(gt=0)] = 1e-2
    kept_decay: float = -1e-4

    @model_validator(mode="after")
    def _picks_below_tau(self) -> "Settings":
        if self.pick_ceiling > self.tau:
            raise ValueError(
                f"pick_ceiling ({self.pick_ceiling:g}) must not be above tau ({self.tau:g})"
            )
        return self

    def for_batch(self, factor: Fraction) -> Self:
        """The decay that picks grows per image as it did, like lambda."""
        new = super().for_batch(factor)
        old, interval = self.update_interval, new.update_interval
        delta = growth_per_update(self.pick_delta, old, interval, factor)
        return new.changed(pick_delta=delta)

    @property
    def picking(self) -> GrowthSchedule:
        """The schedule of the decay on all filters."""
        return GrowthSchedule(
            delta=self.pick_delta, tau=self.pick_ceiling, update_interval=self.update_interval
        )

    @property
    def head_start(self) -> int:
        """Steps that lambda would have taken to grow to the ceiling of the picking phase."""
        return self.update_interval * int(self.pick_ceiling / self.delta + 1e-9)


class GReg2(base.Method):
    """Let the loss's curvature show in the magnitudes before picking (Wang et al., ICLR 2021).

    Under a decay that grows on all filters of the layers to be pruned, filters that the loss
    holds fast shrink less. When it has reached ``pick_ceiling`` the smallest by L1 norm are
    picked, and from there on their decay grows as in GReg-1 while the others are let go. The
    picking phase decays weights only, as in GReg's code; afterwards the picked filters' BatchNorm
    entries decay too, see :class:`tpp.methods.greg1.GReg1`.

    All ranks pick the same filters, as their weights are the same.
    """

    name = "greg2"
    title = "GReg-2"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "during"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._picking = settings.picking
        self._growth = settings.growth
        # What is added to the step to enter the growth of lambda where picking has left off.
        self._offset = settings.head_start - self._picking.growth_steps
        self._model: nn.Module | None = None
        self._regularizer: Regularizer | None = None

    @property
    def plan(self) -> PruningPlan | None:
        """The filters picked; None in the picking phase."""
        return self._regularizer.plan if self._regularizer else None

    def steps(self) -> int:
        """Picking, the rest of the growth, and stabilise phase together."""
        return self._growth.total_steps - self._offset

    def steps_before_picking(self) -> float:
        """All but the last step of the picking phase, after which the filters are picked."""
        return self._picking.growth_steps - 1

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Share the layers out among the ranks; finetuning is ordinary training."""
        if context.stage == "regularize":
            self._model, self._context = model, context
            names = context.selection.layers(model, example_input=context.example_input)
            layers = prunable_layers(model)
            share = names[context.rank :: context.world_size]
            self._layers = {name: layers[name] for name in share}
            self._kept: dict[str, Tensor] = {}
            self._scale = factors_for(model, torch.zeros(()))

    def before_step(self, step: int) -> bool:
        """The decay on all filters; once they are picked, on these, and on those that stay."""
        if self._model is None:
            return False
        strength, changed = self.settings.kept_decay, False
        if self._regularizer is None:
            strength = self._picking.strength(step)
        else:
            changed = self._regularizer.before_step(step + self._offset)
        self._scale.fill_(0.5 * strength * self._context.world_size)
        return changed or step == self._picking.growth_steps  # filters were just picked

    def loss_terms(self) -> dict[str, Tensor]:
        """The decay on all filters; once they are picked, on these, and on those that stay."""
        if self._model is None:
            return {}
        if self._regularizer is None:
            return {"decay": self._decay()}
        return {"decay": self._regularizer.loss_terms()["decay"], "kept_decay": self._decay()}

    def after_step(self, step: int) -> None:
        """Pick the filters when the picking phase is over."""
        if self._model is not None and step + 1 == self._picking.growth_steps:
            context = self._context
            plan = context.selection.select(self._model, example_input=context.example_input)
            self._take_up(same_on_all_ranks(plan) if context.world_size > 1 else plan)

    def finished(self, step: int) -> bool:
        """Whether the stabilise phase is over."""
        return step >= self.steps()

    def scalars(self, step: int) -> dict[str, float]:
        """Lambda, the decay of what will go (at first: of all)."""
        if self._model is None:
            return {}
        if step < self._picking.growth_steps:
            return {"lambda": self._picking.strength(step)}
        return {"lambda": self._growth.strength(step + self._offset)}

    def statistics(self) -> dict[str, LayerStatistics]:
        """Magnitudes and correlations of the layers, once filters are picked."""
        return self._regularizer.statistics() if self._regularizer else {}

    def state_dict(self) -> dict[str, Any]:
        """The plan, or None; all else follows from the step."""
        return {"plan": self.plan.to_dict() if self.plan else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up the plan, if filters were picked before the checkpoint."""
        if state["plan"] is not None:
            self._take_up(PruningPlan.from_dict(state["plan"]))

    def _take_up(self, plan: PruningPlan) -> None:
        """Go on as GReg-1 with the filters of ``plan``."""
        assert self._model is not None
        self._regularizer = Regularizer(
            self._model,
            plan,
            rank=self._context.rank,
            world_size=self._context.world_size,
            gram_weight=self.settings.gram_weight,
            growth=self._growth,
            example_input=self._context.example_input,
        )
        device = next(self._model.parameters()).device
        self._kept = {name: torch.tensor(plan.kept(name), device=device) for name in self._layers}

    def _decay(self) -> Tensor:
        """This rank's share of half the decay's strength times the squares' sum.

        Over all filters; once some are picked, over those kept.
        """
        assert self._model is not None
        total = torch.zeros((), device=next(self._model.parameters()).device)
        for name, layer in self._layers.items():
            weight: Tensor = layer.weight
            if name in self._kept:
                weight = weight.index_select(0, self._kept[name])
            total = total + weight.square().sum()
        return self._scale * total
