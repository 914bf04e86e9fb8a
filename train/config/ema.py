"""The settings of a stage's moving average of weights."""

from fractions import Fraction
from typing import Annotated, Literal, Self

from pydantic import Field

from tpp.common.settings import PositiveFloat, PositiveInt, Section


class EmaSection(Section):
    """An exponential moving average of a training stage's weights and float buffers (docs/ema.md).

    Attributes:
        decay: what is kept of the average at each update, for the batch that the configuration is
            written for: ``training.batch`` says which that is.
        warmup: whether the decay begins at 0 and grows to ``decay``: after u updates it is 1 - (1 +
            u / warmup_gamma)^-warmup_power, as in timm's ModelEmaV3.
        warmup_gamma (updates): the gamma of ``warmup``; the larger, the slower the decay grows.
        warmup_power: the power of ``warmup``; the smaller, the slower the decay grows.
        every (steps): optimiser steps from one update to the next.
        evaluate: the weights to which the stage's figures refer, by which its best checkpoint is
            chosen, and with which the next stage begins: ``ema`` or ``raw``, those that are
            trained. null: ``raw`` in a stage that regularises, else ``ema``.

    Example:
        {decay: 0.999, warmup_gamma: 10, warmup_power: 0.75, every: 10, evaluate: raw}

        {warmup: false}
    """

    decay: Annotated[float, Field(gt=0, lt=1)] = 0.9999
    warmup: bool = True
    warmup_gamma: PositiveFloat = 1.0
    warmup_power: PositiveFloat = 2 / 3
    every: PositiveInt = 1
    evaluate: Literal["ema", "raw"] | None = None

    @property
    def chosen(self) -> Literal["ema", "raw"]:
        """The weights that are evaluated and kept as the stage's network."""
        return self.evaluate or "ema"

    def for_batch(self, factor: Fraction) -> Self:
        """These settings for a global batch of ``factor`` times the one that they are written for.

        The average then reaches back over as many images: decay^factor (Busbridge et al., "How to
        Scale Your EMA", NeurIPS 2023).

        Raises:
            ValidationError: of pydantic; that is no decay any more.
        """
        if factor == 1:
            return self
        return type(self)(**{**dict(self), "decay": self.decay ** float(factor)})
