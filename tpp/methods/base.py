"""What a pruning method may do in a run: every hook does nothing unless the method says so."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from tpp.plan import PruningPlan
from tpp.regularization.regularizer import LayerStatistics
from tpp.selection.selection import Selection


class Settings(BaseModel):
    """Base of a method's hyper-parameters; an unknown key is an error."""

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


@dataclass(frozen=True)
class TrainingContext:
    """Where a method finds itself when training is about to begin.

    Attributes:
        stage: kind of the stage, ``regularize`` or ``finetune``.
        plan: the filters that a regularised stage drives out, where they are picked before it
            (see :attr:`Method.picks`); None for all else.
        selection: how filters are chosen, for a method that picks them itself.
        rank: this process's rank.
        world_size: number of ranks over which gradients are averaged.
        example_input: a batch to trace the network with.
    """

    stage: str
    plan: PruningPlan | None
    selection: Selection
    rank: int
    world_size: int
    example_input: Tensor


class Method:
    """A way from a dense network to a pruned one.

    The training loop knows a method by its hooks ``prepare``, ``loss_terms``, ``after_step`` and
    ``finished`` and nothing else. ``select`` and ``after_removal`` belong to the pruning stage.

    Attributes:
        name: in configurations.
        title: in tables and plots.
        settings_type: class of the hyper-parameters.
        picks: when the filters to remove are picked, as seen from the regularised stage:
            ``before`` it, by ``select``; ``during`` it, by the method itself, which then shows
            them as ``plan``; or ``after`` it, when the pruning stage calls ``select``. Without a
            regularised stage the pruning stage always calls ``select``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    settings_type: ClassVar[type[Settings]] = Settings
    picks: ClassVar[Literal["before", "during", "after"]] = "before"

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

    def steps(self) -> int | None:
        """Length of the regularised stage in steps, where it is known beforehand."""
        return None

    def rank_costs(self, model: nn.Module, plan: PruningPlan, ranks: int) -> list[int] | None:
        """Multiply-adds per step of each rank's share of the penalty; None if not known."""
        return None

    def prepare(self, model: nn.Module, context: TrainingContext) -> None:
        """Get ready to train ``model``, before the optimiser exists; may add parameters."""

    def loss_terms(self, step: int) -> dict[str, Tensor]:
        """Scalars by name that are added to the loss of 0-based optimiser step ``step``."""
        return {}

    def after_step(self, step: int) -> None:
        """Touch the weights after the optimiser's 0-based ``step``."""

    def finished(self, step: int) -> bool:
        """Whether the regularised stage is done after ``step`` steps."""
        return True

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
