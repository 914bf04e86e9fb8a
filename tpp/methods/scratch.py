"""Scratch: train the small network from a fresh initialisation (Liu et al. 2019)."""

import torch
from torch import nn

from tpp.methods.base import Method


class Scratch(Method):
    """The widths that L1 leaves, trained anew from random weights (Liu et al., ICLR 2019)."""

    name = "scratch"
    title = "Scratch"

    def after_removal(self, model: nn.Module, seed: int) -> bool:
        """Initialise every layer anew, as its own class does by default, from ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in model.modules():
                reset = getattr(module, "reset_parameters", None)
                if callable(reset):
                    reset()
                if isinstance(module, nn.Conv2d):
                    # The initialisation of the residual networks pruned here (He et al. 2015).
                    nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        return True
