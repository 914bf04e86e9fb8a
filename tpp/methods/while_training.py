"""Filters removed in the one training run, a few at a time, and no retraining.

Roy, Panda, Srinivasan, Raghunathan, "Pruning Filters while Training for Efficiently Optimizing Deep
Learning Networks" (IJCNN 2020, arXiv:2003.02800). Only abstract and opening could be read: filters
of convolutions go while the network trains, by L1 norm (best), mean activation or at random; there
is no retraining, and the epochs that are left run on an ever smaller network. When, how many at a
time and from which layers are inferred here, and are settings: a reconstruction. So is what mean
activation is a mean of: all images of the steps since the last event, in training mode.

Filters are removed at once, with their momentum: that is the same training as one that masks them
to its end (the weights are equal to rounding), in less time.
"""

import itertools
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor, nn

from tpp.channels.removal import pruned_on_meta
from tpp.measure.counts import count
from tpp.methods import base
from tpp.models.architecture import meta_copy
from tpp.models.layers import prunable_layers
from tpp.plan import PruningPlan
from tpp.selection.activation import MeanActivations
from tpp.selection.criteria import Criterion
from tpp.selection.selection import same_on_all_ranks


class Settings(base.Settings):
    """The values are ours.

    Attributes:
        events: number of times that filters go. After event t of T, floor(n t / T) have gone of the
            n filters of a layer that are to go in the end.
        start (share of the stage): when the first interval begins; an event is at the end of each
            interval.
        end (share of the stage): when the last event has been; above ``start``.
        criterion: what a filter is worth: ``weights``, as ``pruning.criterion`` says; or
            ``activation``, its mean output after ReLU since the last event, or ``start``. Steps
            whose activations are not finite are left out; an event with no step to go by waits for
            one.

    Example:
        {events: 5, start: 0.05, end: 0.6, criterion: activation}
    """

    events: Annotated[int, Field(ge=1)] = 10
    start: Annotated[float, Field(ge=0, lt=1)] = 0.1
    end: Annotated[float, Field(gt=0, le=1)] = 0.5
    criterion: Literal["weights", "activation"] = "weights"

    @model_validator(mode="after")
    def _ends_behind_its_start(self) -> "Settings":
        if self.end <= self.start:
            raise ValueError(f"end ({self.end:g}) must be above start ({self.start:g})")
        return self

    def due(self, step: int, total: int) -> int:
        """How many events there have been after ``step`` of ``total`` steps."""
        return sum(self.at(event, total) <= step for event in range(1, self.events + 1))

    def at(self, event: int, total: int) -> int:
        """The number of steps after which event 1, 2, ... is."""
        return max(1, round(total * self.share(event)))

    def share(self, event: int) -> float:
        """The same as a share of the stage."""
        return self.start + (self.end - self.start) * event / self.events


class WhileTraining(base.Method):
    """Remove filters in the middle of the stage, in the end as many as the selection asks for."""

    name = "while_training"
    title = "Pruned while training"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "during"
    faithful = False
    ends_pruned = True

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._model: nn.Module | None = None
        # By layer: how many filters go in the end, how many there were, which of them are left.
        self._going: dict[str, int] = {}
        self._filters: dict[str, int] = {}
        self._left: dict[str, list[int]] = {}
        # By activations: these, and how many events there have been. None where none is to come.
        self._activations: MeanActivations | None = None
        self._past = 0
        self._was_last = False

    @property
    def plan(self) -> PruningPlan | None:
        """What has gone of the dense network; None before the first event."""
        if not any(len(left) < self._filters[layer] for layer, left in self._left.items()):
            return None
        gone = {
            layer: [n for n in range(self._filters[layer]) if n not in {*left}]
            for layer, left in self._left.items()
        }
        return PruningPlan(dict(self._filters), gone)

    def refuses_mask(self, stage: str) -> str | None:
        """As in :class:`tpp.methods.base.Method`."""
        return "of filters that will go in the middle of it" if stage == "regularize" else None

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Look at activations from now on, if they are the criterion.

        Raises:
            UserError: the stage's input has masked weights.
        """
        if context.stage != "regularize":
            return
        self.check_mask(context)
        self._model, self._context = model, context
        if self.settings.criterion == "activation":
            # All that may ever be asked for, here and in smaller networks.
            widest = replace(context.selection, floors={}, round_to=1, criterion="l1")
            self._activations = MeanActivations(
                model,
                widest.layers(model, example_input=context.example_input),
                context.average,
                example_input=context.example_input,
            )

    def restore(self, model: nn.Module) -> None:
        """Look at activations no more."""
        if self._activations is not None:
            self._activations.remove()
            self._activations = None

    def before_step(self, step: int) -> bool:
        """Whether activations are looked at no more."""
        changed, self._was_last = self._was_last, False
        return changed

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """None; the micro-batch's activations are counted."""
        if self._activations is not None:
            self._activations.add()
        return {}

    def after_step(self, step: int) -> None:
        """Count the step's activations, if it is of the time between events."""
        if self._activations is not None:
            total = self._context.total_steps
            assert total is not None
            self._activations.count(keep=step >= round(total * self.settings.start))

    def shrink(self, step: int) -> PruningPlan | None:
        """The filters of the smallest scores, if an event is due; all ranks find the same."""
        if self._model is None:
            return None
        model, context, watched = self._model, self._context, self._activations
        assert context.total_steps is not None
        due = self.settings.due(step, context.total_steps)
        if not due:
            return None
        scores: dict[str, Tensor] | None = None
        if self.settings.criterion == "activation":
            if watched is None or due == self._past or not watched.steps:
                return None
            scores = watched.scores()
            watched.forget()
            self._past = due
            self._was_last = due == self.settings.events
            if self._was_last:
                self.restore(model)
        self._look(model, scores)
        widths = {name: len(layer.weight) for name, layer in prunable_layers(model).items()}
        now = {
            layer: going * due // self.settings.events - (self._filters[layer] - widths[layer])
            for layer, going in self._going.items()
        }
        now = {layer: many for layer, many in now.items() if many > 0}
        if not now:
            return None
        selection = replace(
            context.selection,
            ratios={layer: many / widths[layer] for layer, many in now.items()},
            floors={layer: widths[layer] - many for layer, many in now.items()},
            round_to=1,
            budget=None,
            seed=context.selection.seed + due,
            criterion=self._criterion,
        )
        plan = selection.select(model, example_input=context.example_input, scores=scores)
        if context.world_size > 1:
            plan = same_on_all_ranks(plan)
        for layer, gone in plan.pruned.items():
            here = self._left[layer]
            self._left[layer] = [original for n, original in enumerate(here) if n not in {*gone}]
        return plan

    def training_cost(self, model: nn.Module, plan: PruningPlan) -> float | None:
        r"""Multiply-adds of the stage over those of one that keeps all filters, from widths alone.

        .. math:: \sum_t (s_{t+1} - s_t) M_t / M_0

        with shares s of the stage between events, and M the network's multiply-adds there.
        """
        settings = self.settings
        dense = meta_copy(model)
        shares = [settings.share(event) for event in range(1, settings.events + 1)]
        macs = [count(dense).macs]
        for event in range(1, settings.events + 1):
            gone = {
                layer: indices[: len(indices) * event // settings.events]
                for layer, indices in plan.pruned.items()
            }
            _, pruned, _ = pruned_on_meta(
                dense, PruningPlan(plan.filters, gone), dense.state_dict()
            )
            macs.append(count(pruned).macs)
        borders = [0.0, *shares, 1.0]
        lengths = [after - before for before, after in itertools.pairwise(borders)]
        spent = sum(length * of for length, of in zip(lengths, macs, strict=True))
        return float(spent / macs[0])

    def state_dict(self) -> dict[str, Any]:
        """What goes in the end, what there was, what is left, and what was seen since."""
        state: dict[str, Any] = {}
        if self._filters:
            state = {"going": self._going, "filters": self._filters, "left": self._left}
        if self._model is not None and self.settings.criterion == "activation":
            watched = self._activations
            state["past"] = self._past
            state["activations"] = watched.state_dict() if watched is not None else {}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what there was before filters went."""
        if "filters" in state:
            self._going, self._filters = dict(state["going"]), dict(state["filters"])
            self._left = {layer: list(left) for layer, left in state["left"].items()}
        if self._activations is not None:
            self._past = state["past"]
            self._activations.load_state_dict(state["activations"])
            if self._past == self.settings.events:
                assert self._model is not None
                self.restore(self._model)

    @property
    def _criterion(self) -> Criterion:
        """Of the selection; where scores are given, one that asks nothing of the network."""
        by_weights = self.settings.criterion == "weights"
        return self._context.selection.criterion if by_weights else "l1"

    def _look(self, model: nn.Module, scores: Mapping[str, Tensor] | None) -> None:
        """Count at the first event, on the dense network: the same however often it is saved."""
        if self._filters:
            return
        context = self._context
        selection = replace(context.selection, criterion=self._criterion)
        plan = selection.select(model, example_input=context.example_input, scores=scores)
        if context.world_size > 1:
            plan = same_on_all_ranks(plan)
        self._filters = dict(plan.filters)
        self._going = {layer: len(gone) for layer, gone in plan.pruned.items()}
        self._left = {layer: list(range(n)) for layer, n in plan.filters.items()}
