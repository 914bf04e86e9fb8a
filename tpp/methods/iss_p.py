r"""Iterative soft shrinkage: after every step the smallest weights are made a little smaller.

Wang, Wang, Zhang, Fu, Tao, "Iterative Soft Shrinkage Learning for Efficient Image Super-Resolution"
(ICCV 2023, arXiv:2303.09650); algorithm and values are those of the authors' code. A network is
trained from random weights, and after each optimiser step, in each layer,

.. math:: \theta \leftarrow \alpha \theta \text{ for the } n \text{ smallest } |\theta|

of N weights, n = r N, chosen anew each time: a weight with a strong gradient climbs back. Neither
weights nor gradients are masked. At the end a ``sparsify`` stage of the same share with ``scope:
layer`` sets these weights to zero, and a ``finetune`` stage holds them there; with
``carry_optimizer`` the same optimiser goes on. alpha = 0 is iterative hard thresholding (IHT).

What differs: n is r N rounded, as of ``sparsify``, which then masks just these weights; theirs is
rounded up, and at most 0.995 N. In ``finetune`` gradients of masked weights, and with them their
moments, are zero, which changes nothing for those that stay. N:M is over the input channels, as
sparse tensor cores have it, and layers that M does not divide stay dense; theirs is over a
flattened tensor, with N and M raised together until M divides all layers. The length of the stage,
100,021 steps in their code, is its ``epochs``.

alpha is of one step: for another batch than the reference it is raised to the power of the batch's
factor, so that it is the same per image (our inference).

What holds where: the same weights are chosen on all ranks, which have the same weights, equal
magnitudes in the order of their places. Under ZeRO the optimiser's float32 copies are made smaller
along, through ``after_step``. Steps that a run leaves out after it went back shrink nothing; a
single one that it skips does.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Annotated, Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.common.settings import Ratio
from tpp.masks import (
    Pattern,
    SparsifySection,
    chosen_layers,
    how_many_go,
    n_of_each_m,
    smallest,
)
from tpp.methods import base
from tpp.models.layers import how_computed, prunable_layers


class Settings(base.Settings):
    """Exactly one of ``sparsity`` and ``pattern`` is needed.

    Attributes:
        alpha: factor of the smallest weights after each step; 0 sets them to zero at once, which is
            iterative hard thresholding.
        sparsity: share of each layer's weights that is made smaller.
        pattern: ``N:M``, in quotes: all but N of M weights in a row along the input channels are
            made smaller.
        layers: patterns of the Conv2d and Linear layers that take part.
        skip: patterns of those among them that are left alone.

    Example:
        {alpha: 0.9, sparsity: 0.8, layers: [body.*], skip: [body.0.*]}

        {pattern: "2:4"}
    """

    alpha: Annotated[float, Field(ge=0, le=1)] = 0.95
    sparsity: Ratio | None = None
    pattern: Pattern | None = None
    layers: Annotated[list[str], Field(min_length=1)] = Field(default_factory=lambda: ["*"])
    skip: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _says_one_thing(self) -> "Settings":
        if self.sparsity is not None and self.pattern is not None:
            raise ValueError("one of sparsity and pattern, and here are both")
        return self

    def for_batch(self, factor: Fraction) -> Self:
        """As much smaller per image."""
        return super().for_batch(factor).changed(alpha=self.alpha ** float(factor))

    def chosen(self, model: nn.Module) -> list[str]:
        """The layers whose weights are made smaller.

        Raises:
            UserError: a pattern matches none, or nothing says how many weights.
        """
        if self.sparsity is None and self.pattern is None:
            raise UserError("sparsity: missing, such as 0.9; or pattern, such as '2:4'")
        asked = SparsifySection(
            sparsity=self.sparsity, pattern=self.pattern, layers=self.layers, skip=self.skip
        )
        return chosen_layers([*prunable_layers(model)], asked)


class ISSP(base.Method):
    """Shrink the smallest weights of each layer softly while the network trains."""

    name = "iss_p"
    title = "ISS-P"
    settings_type: ClassVar[type[base.Settings]] = Settings
    picks = "never"

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        self._weights: list[nn.Parameter] = []
        self._step: int | None = None

    def check_network(self, model: nn.Module, stage: str) -> None:
        """Patterns of layers match some, whose weights are parameters."""
        layers = prunable_layers(model)
        for name in self.settings.chosen(model):
            if (how := how_computed(layers[name])) is not None:
                raise UserError(f"layers: the weight of {name} is computed by {how}")

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        """Find the weights; in ``finetune`` the stage itself holds the mask of its input."""
        if context.stage == "regularize":
            layers: Any = prunable_layers(model)
            self._weights = [layers[name].weight for name in self.settings.chosen(model)]

    def before_step(self, step: int) -> bool:
        """A step that is made, not left out."""
        self._step = step
        return False

    @torch.no_grad()
    def after_step(self, step: int) -> Sequence[nn.Parameter] | None:
        """Make the smallest weights smaller."""
        if step != self._step or not self._weights:
            return None
        for weight in self._weights:
            weight.copy_(torch.where(self._smallest(weight), self.settings.alpha * weight, weight))
        return self._weights

    @torch.no_grad()
    def scalars(self, step: int) -> dict[str, float]:
        """How much of the weights' norm is in those that would be set to zero now."""
        if not self._weights:
            return {}
        of_all = sum(weight.double().square().sum().item() for weight in self._weights)
        of_smallest = sum(
            weight[self._smallest(weight)].double().square().sum().item()
            for weight in self._weights
        )
        return {"smallest_norm_share": (of_smallest / of_all) ** 0.5 if of_all else 0.0}

    def _smallest(self, weight: Tensor) -> Tensor:
        """Which weights of a layer are the smallest, bool, of its shape."""
        magnitude = weight.abs()
        if self.settings.pattern is not None:
            everything = torch.ones_like(magnitude, dtype=torch.bool)
            return ~n_of_each_m(magnitude, everything, self.settings.pattern)
        return smallest(magnitude, how_many_go(self.settings.sparsity, weight.numel()))
