"""What the methods that train with an orthogonality term in the loss have in common."""

import math
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor, nn

from tpp.methods import base
from tpp.regularization.orthogonality import Form, OrthogonalityPenalty


class Settings(base.Settings):
    """The papers define the sum over layers of squared Frobenius norms. The public code of
    OrthConv, and after it that of TPP, sums the norms themselves with weight 0.1; these are the
    defaults.

    Attributes:
        strength: weight of the orthogonality term in the loss.
        squared: whether the norms are squared.

    Example:
        {strength: 0.01, squared: true}
    """

    strength: Annotated[float, Field(ge=0)] = 0.1
    squared: bool = False


class OrthogonalTraining(base.Method):
    """L1 pruning with an orthogonality term in one of its training stages.

    Attributes:
        form: the measure, see :class:`tpp.regularization.orthogonality.OrthogonalityPenalty`.
        stage: kind of the stage that has the term: ``finetune``, or ``regularize`` for training
            of the dense network, after which filters are picked from the weights as they are then.
    """

    settings_type: ClassVar[type[base.Settings]] = Settings
    form: ClassVar[Form]
    stage: ClassVar[str]

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._penalty: OrthogonalityPenalty | None = None

    def steps_before_picking(self) -> float:
        """All: the term is the same for every layer, and filters are picked afterwards."""
        return math.inf if self.picks == "after" else 0

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Share the layers out among the ranks, if this is the stage that has the term."""
        if context.stage == self.stage:
            self._penalty = OrthogonalityPenalty(
                model,
                self.form,
                strength=self.settings.strength,
                squared=self.settings.squared,
                rank=context.rank,
                world_size=context.world_size,
            )

    def loss_terms(self) -> dict[str, Tensor]:
        """The orthogonality term, this rank's share."""
        return {"orthogonality": self._penalty()} if self._penalty else {}
