"""train/main.py with a method that ruins steps, as bad images would, or is sent signals."""

import os
import signal
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tpp import methods
from tpp.common.errors import run_command
from tpp.methods import base, l1
from train.main import main


class Settings(base.Settings):
    """Which 0-based steps are ruined, on which rank, and how.

    Attributes:
        steps: ruined every time.
        inputs: the images are this number in all of their pixels.
        slope: times the sum of the first layer's weights is added to the loss.
        signal: sent during the first of these steps, to the whole process group with ``group``.
        rank: the others meet it in the averaged gradients only.
    """

    steps: list[int]
    inputs: str | None = None
    slope: str | None = None
    signal: str | None = None
    group: bool = False
    rank: int = 0


class Poison(l1.L1):
    """L1 with ruined steps in its training stages."""

    name = "poison"
    title = "poison"
    settings_type = Settings

    def prepare(self, model: nn.Module, context: base.TrainingContext) -> None:
        super().prepare(model, context)
        self._step = 0
        self._mine = context.rank == self.settings.rank
        self._weight = next(model.parameters())
        if self.settings.inputs is not None:
            model.register_forward_pre_hook(self._replace)

    def _replace(self, model: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor] | None:
        if model.training and self._mine and self._step in self.settings.steps:
            return (torch.full_like(inputs[0], float(self.settings.inputs)),)
        return None

    def loss_terms(self) -> dict[str, Tensor]:
        terms = super().loss_terms()
        if self.settings.slope is not None:
            ruined = self._mine and self._step in self.settings.steps
            terms["poison"] = (float(self.settings.slope) if ruined else 0) * self._weight.sum()
        return terms

    def after_step(self, step: int) -> None:
        super().after_step(step)
        self._step = step + 1
        if self.settings.signal is not None and self._mine and step in self.settings.steps[:1]:
            target = 0 if self.settings.group else os.getpid()
            os.kill(target, signal.Signals[self.settings.signal])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self._step = state["step"]

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "step": self._step}


if __name__ == "__main__":
    methods.available_methods()["poison"] = Poison
    run_command(main)
