"""What a pruning method may do in a run: every hook does nothing unless the method says so."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tpp.checkpoints.prune_file import prune_checkpoint
from tpp.common.errors import UserError
from tpp.masks import COMPANION, Sparsity
from tpp.measure.counts import Counts
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import LayerStatistics
from tpp.selection.selection import Selection


class Settings(BaseModel):
    """Base of a method's settings; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def for_batch(self, factor: Fraction) -> Self:
        """These settings for a global batch of ``factor`` times the one that they are for.

        Learning rates are then ``factor`` times as high, and epochs have so many fewer steps:
        weights of terms in the loss stay, as weight decay does, and numbers of steps are divided.
        By default nothing is counted in steps.

        Raises:
            ValidationError: of pydantic; the new values are out of bounds.
        """
        return self

    def changed(self, **changes: Any) -> Self:
        """A copy with other values, validated like all settings."""
        return type(self)(**{**dict(self), **changes})


def _no_dense_network() -> nn.Module:
    raise UserError("there is no dense network here")


def _no_companion(name: str) -> dict[str, Tensor]:
    return {}


def _of_one_rank(values: Tensor) -> Tensor:
    return values


def _no_images(tensors: Sequence[Tensor]) -> list[Tensor]:
    raise UserError("there are no images here")


@dataclass(frozen=True)
class TrainingContext:
    """Where a method finds itself when training is about to begin.

    Attributes:
        stage: kind of the stage, ``dense``, ``regularize`` or ``finetune``.
        plan: the filters that a regularised stage drives out, where they are picked before it
            (see :attr:`Method.picks`); None for all else.
        selection: how filters are chosen, for a method that picks them itself.
        rank: this process's rank.
        world_size: number of ranks over which gradients are averaged.
        example_input: a batch to trace the network with.
        total_steps: length of the stage in optimiser steps; None where the method sets it.
        episode_steps: optimiser steps for which images are of the same few classes; None where they
            are of all of them.
        steps_per_epoch: optimiser steps that one pass over the training images takes.
        dense: reads the dense network of the run: on the stage's device, in evaluation mode, its
            parameters without gradients. It is read when it is asked for, and not kept.
        companion: reads tensors by name that the stage's input file holds beside the network's,
            such as ``mask``; empty where it has none of that name.
        counts_zeros: what in the stage's training depends on filters that are at zero, in words;
            None where nothing does, and a network without them trains just as one with them.
        average: mean of a tensor over the ranks, the same bits on all of them, which all have to
            call it.
        first_gradients: in :meth:`Method.prepare`, gradients of the task's loss with respect to
            tensors that the network computes with, at its weights as they are then: the mean over
            the images of the stage's first step, of all ranks and micro-batches, as training
            computes it, in float32 or wider. It changes neither buffers nor random generators. All
            ranks have to call it, and get the same bits.
    """

    stage: str
    plan: PruningPlan | None
    selection: Selection
    rank: int
    world_size: int
    example_input: Tensor
    total_steps: int | None = None
    episode_steps: int | None = None
    steps_per_epoch: float = 1.0
    dense: Callable[[], nn.Module] = _no_dense_network
    companion: Callable[[str], dict[str, Tensor]] = _no_companion
    counts_zeros: str | None = None
    average: Callable[[Tensor], Tensor] = _of_one_rank
    first_gradients: Callable[[Sequence[Tensor]], list[Tensor]] = _no_images


class Method:
    """A way from a dense network to a pruned one.

    A training stage calls, of a fresh instance: :meth:`modify` on the network that it begins with,
    or goes on with, before any weights of a checkpoint are loaded; :meth:`prepare` once the weights
    are in their place; in every step :meth:`before_step`, :meth:`batch_terms` for each micro-batch,
    :meth:`loss_terms`, :meth:`after_step`, then :meth:`shrink`; at the end :meth:`restore`. After a
    removal by ``shrink`` it begins again with ``modify``, on the smaller network. ``select``,
    :meth:`remove` and ``after_removal`` belong to the pruning stage.

    Attributes:
        name: in configurations.
        title: in tables and plots.
        settings_type: class of the hyper-parameters.
        picks: when the filters to remove are picked, as seen from the regularised stage:
            ``before`` it, by ``select``; ``during`` it, by the method itself, which then shows
            them as ``plan``; or ``after`` it, when the pruning stage calls ``select``. Without a
            regularised stage the pruning stage always calls ``select``. ``never`` for a method of
            single weights, whose regularised stage has to do with no filters.
        faithful: whether it is as published; not so where only an abstract could be read, which
            ``--dry-run`` and the report say.
        finetunes: whether it is a way of finetuning, whatever was removed before it.
        ends_pruned: whether its regularised stage ends with the network that it is for, and no
            finetuning is meant to follow.
        trains_dense: whether it has a say in the training of the dense network, too.
        needs_cross_entropy: whether its terms go with plain cross entropy alone: no label
            smoothing, no other loss, no teacher.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    picks: ClassVar[Literal["before", "during", "after", "never"]] = "before"
    faithful: ClassVar[bool] = True
    finetunes: ClassVar[bool] = False
    ends_pruned: ClassVar[bool] = False
    trains_dense: ClassVar[bool] = False
    needs_cross_entropy: ClassVar[bool] = False

    def __init__(self, settings: Any) -> None:
        self.settings = settings

    def select(
        self, model: nn.Module, selection: Selection, *, example_input: Tensor
    ) -> PruningPlan:
        """Choose the filters to remove; by default just as ``selection`` says."""
        return selection.select(model, example_input=example_input)

    @property
    def plan(self) -> PruningPlan | None:
        """The filters that were picked ``during`` the stage; None as long as none were."""
        return None

    def check(self, model: nn.Module, plan: PruningPlan) -> None:
        """Raise UserError if the settings do not suit this model and plan (before training)."""

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Raise UserError if the settings do not suit this network (before anything is trained).

        Args:
            model: the dense network, without its weights (on the meta device).
            stage: kind of the training stage that asks.
        """

    def steps(self) -> int | None:
        """Length of the regularised stage in steps, where it is known beforehand."""
        return None

    def removes_after(
        self,
        model: nn.Module,
        plan: PruningPlan,
        *,
        counts_zeros: str | None = None,
        example_input: Tensor | None = None,
    ) -> int | None:
        """Steps of the regularised stage after which it goes on without the plan's filters.

        None for a stage that has them all to its end. Arguments as in :class:`TrainingContext`.
        """
        return None

    def steps_before_picking(self) -> float:
        """How many steps of the regularised stage are the same whichever filters go in the end.

        Of all pruning settings they may depend on which layers lose filters
        (:meth:`tpp.selection.selection.Selection.layers`) and on nothing else. Runs of a sweep
        that differ in the rest train them once. ``math.inf``: the whole stage. None unless the
        method says so.
        """
        return 0

    def rank_costs(self, model: nn.Module, plan: PruningPlan, ranks: int) -> list[int] | None:
        """Multiply-adds per step of each rank's share of the penalty; None if not known."""
        return None

    def training_cost(self, model: nn.Module, plan: PruningPlan) -> float | None:
        """Multiply-adds of a stage that removes filters, over those of one that keeps them all.

        By the widths of ``plan`` alone; None for a stage that keeps them, or whose cost is told
        otherwise (:meth:`removes_after`).
        """
        return None

    def left(self, counts: Counts) -> Sparsity | None:
        """What is left of the network in the form that the stage trained, at its end.

        None where that is the network's own weights. A network of sparse factors is dense when they
        are multiplied out: its file alone does not say it.

        Args:
            counts: of the network that was multiplied out.
        """
        return None

    def refuses_mask(self, stage: str) -> str | None:
        """Why a stage of that kind cannot keep masked weights of its input at zero; None: it can.

        As the end of a sentence that begins "its input has masked weights, ...".
        """
        return None

    def check_mask(self, context: TrainingContext) -> None:
        """Raise UserError if the stage's input has a mask that the method refuses."""
        why = self.refuses_mask(context.stage)
        if why is not None and context.companion(COMPANION):
            raise UserError(f"method {self.name}: the stage's input has masked weights, {why}")

    def modify(self, model: nn.Module, stage: str) -> None:
        """Register what a stage trains besides the network's own weights, or in their place.

        Gates, factors, a basis: parameters, buffers, parametrisations, forward hooks. Their values
        are those of a stage that begins; of one that goes on they are loaded afterwards. The
        training state keeps them, the stage's model file does not, see :meth:`restore`. Where a
        parameter's attribute ``spared`` is True, its weight decay is left to the method.

        Args:
            model: an ordinary network of its architecture, on the CPU, changed in place.
            stage: kind of the stage.
        """

    def restore(self, model: nn.Module) -> None:
        """Make what :meth:`modify` changed an ordinary network of its architecture again.

        In place, at the end of the stage, before the network is written: what was added is gone or
        is merged into the weights.
        """

    def keeps(self, model: nn.Module) -> dict[str, dict[str, Tensor]]:
        """Tensors of what :meth:`modify` added that the stage's model file keeps, by companion.

        Asked before :meth:`restore`, of the same network. A stage that starts from the file reads
        them by ``TrainingContext.companion``; pruning leaves them out.
        """
        return {}

    def prepare(self, model: nn.Module, context: TrainingContext) -> None:
        """Get ready to train ``model``, before the optimiser exists; adds no parameters."""

    def before_step(self, step: int) -> bool:
        """Write what depends on the 0-based optimiser step ``step``, such as lambda, into tensors.

        What :meth:`loss_terms` and :meth:`batch_terms` do is then the same in every step, and may
        be compiled or captured.

        Returns:
            Whether they do something else from this step on than in the one before, so that what
            was compiled or captured of them is of no more use.
        """
        return False

    def loss_terms(self) -> dict[str, Tensor]:
        """Scalars by name of the weights alone, added to the loss once per optimiser step.

        Shared over the ranks: each rank's share times the number of ranks.
        """
        return {}

    def batch_terms(self, batch: tuple[Tensor, Tensor], outputs: Tensor) -> dict[str, Tensor]:
        """Scalars by name of activations, means over a micro-batch, added to its loss.

        Asked for every micro-batch after its forward pass, under the run's autocast. Each rank
        returns its own; they are divided by the number of micro-batches, as the task's loss is.

        Args:
            batch: the loader's images (n, c, h, w) and labels.
            outputs: what the network made of them, float32.
        """
        return {}

    def after_step(self, step: int) -> Sequence[nn.Parameter] | None:
        """Touch the weights after the optimiser's 0-based ``step``.

        Returns:
            the parameters that were given values other than zero, on all ranks alike, which an
            engine that keeps copies of its own (DeepSpeed's ZeRO) then takes over.
        """
        return None

    def shrink(self, step: int) -> PruningPlan | None:
        """Filters to remove from the network now, after ``step`` steps; None to go on as it is.

        The stage prunes the network and the optimiser's state and begins again with them. All ranks
        have to return the same; it is asked once after each step.
        """
        return None

    def finished(self, step: int) -> bool:
        """Whether the regularised stage is done after ``step`` steps."""
        return True

    def remove(self, source: Path, plan: PruningPlan, target: Path) -> None:
        """Make the pruning stage's checkpoint of its input; by default without the plan's filters.

        A method that masks filters keeps them, with a companion ``mask`` beside the weights.

        Args:
            source: one of our checkpoints.
            plan: which filters go.
            target: the checkpoint to write.
        """
        prune_checkpoint(source, plan, target)

    def after_removal(self, model: nn.Module, seed: int) -> bool:
        """Change the pruned network's weights before it is finetuned; whether it did."""
        return False

    def scalars(self, step: int) -> dict[str, float]:
        """Values by name to show in TensorBoard beside the loss."""
        return {}

    def statistics(self) -> dict[str, LayerStatistics]:
        """Per layer what a person watches to see the method at work."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """JSON-ready state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take up what :meth:`state_dict` returned."""
