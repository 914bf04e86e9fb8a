"""The moving average of a network's weights, beside the weights that are trained."""

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn

from train.config.ema import EmaSection


class WeightAverage:
    """An exponential moving average of all that a network's state holds.

    timm's ``ModelEmaV3`` computes it: floating-point buffers, such as BatchNorm's running
    statistics, are averaged like weights; whole numbers, such as how many batches were tracked, are
    copied. It holds no second network, only the tensors: what a method has put on the network
    (hooks, parametrisations) need not be copied. Every rank keeps its own: of weights, which are
    the same on all of them, and of its own running statistics, of which the main rank's count.

    Args:
        network: as it is when the average begins.
        settings: for the batch there is.

    Attributes:
        settings: as given.
    """

    def __init__(self, network: nn.Module, settings: EmaSection) -> None:
        from timm.utils import ModelEmaV3  # takes as long to import as torch does

        self.settings, self._network = settings, network
        self._average = ModelEmaV3(
            cast(nn.Module, _Tensors(network.state_dict())),
            decay=settings.decay,
            use_warmup=settings.warmup,
            warmup_gamma=settings.warmup_gamma,
            warmup_power=settings.warmup_power,
        )

    def update(self, step: int) -> None:
        """Take up the weights after ``step`` optimiser steps, if it is a step to do so.

        The first update copies them. What else is needed follows from ``step``: a run that goes on
        has only the tensors to take up.
        """
        updates, rest = divmod(step, self.settings.every)
        if not rest:
            self._average.update(self._network, updates)

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by the names of the network's tensors."""
        averages = self._average.module.state_dict().values()
        return dict(zip(self._network.state_dict(), averages, strict=True))

    def load_state_dict(self, tensors: Mapping[str, Tensor]) -> None:
        """Take up what :meth:`state_dict` returned.

        Raises:
            KeyError: it is of another network.
        """
        _copy_into(self.state_dict(), tensors)

    @contextmanager
    def in_place(self) -> Generator[None, None, None]:
        """Give the network the averages, and afterwards its own values back, bit for bit."""
        state = self._network.state_dict()
        own = {name: tensor.clone() for name, tensor in state.items()}
        _copy_into(state, self.state_dict())
        try:
            yield
        finally:
            _copy_into(state, own)


class _Tensors(nn.Module):
    """Tensors without the network around them, in their order."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.each = nn.ModuleList(_One(tensor) for tensor in tensors.values())


class _One(nn.Module):
    def __init__(self, tensor: Tensor) -> None:
        super().__init__()
        if tensor.is_floating_point():
            self.tensor = nn.Parameter(tensor, requires_grad=False)
        else:
            self.register_buffer("tensor", tensor)


@torch.no_grad()
def _copy_into(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor]) -> None:
    for name, target in targets.items():
        target.copy_(sources[name])
