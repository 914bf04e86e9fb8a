"""L1 + OrthP: remove by L1 norm, then orthogonalise what is left of every layer."""

from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import nn

from tpp.methods import base
from tpp.models.layers import prunable_layers
from tpp.regularization.orthogonality import orthogonalize


class Settings(base.Settings):
    """All layers of the pruned network are replaced by orthogonal ones.

    Attributes:
        gain: what all singular values of a layer become. 1 restores the trainability of a linear
            network exactly; the public code of TPP takes sqrt(2) for networks with ReLU, the
            usual gain of orthogonal initialisation (Saxe et al. 2014).

    Example:
        {gain: 1.4142}
    """

    gain: Annotated[float, Field(gt=0)] = 1.0


class L1OrthP(base.Method):
    """The oracle of trainability: isometry restored by hand (Wang & Fu, ICLR 2023, Table 1).

    All Conv2d and Linear layers of the pruned network, those that lost nothing included, are
    replaced by the QR orthogonalisation of their weight matrix, times ``gain``. Biases and
    BatchNorm stay as they are. In a linear network every singular value of the input-output
    Jacobian is then the product of the gains; in others the weights' own scale is lost, which
    the paper finds to cost accuracy.
    """

    name = "l1+orthp"
    title = "L1 + OrthP"
    settings_type: ClassVar[type[base.Settings]] = Settings

    @torch.no_grad()
    def after_removal(self, model: nn.Module, seed: int) -> bool:
        """Orthogonalise every layer."""
        for layer in prunable_layers(model).values():
            groups = layer.groups if isinstance(layer, nn.Conv2d) else 1
            layer.weight.copy_(orthogonalize(layer.weight, gain=self.settings.gain, groups=groups))
        return True
