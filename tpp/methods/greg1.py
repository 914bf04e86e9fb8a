"""GReg-1: growing L2 decay on the filters that will go (Wang et al., ICLR 2021)."""

from typing import ClassVar

from torch import Tensor, nn

from tpp.methods import base
from tpp.methods.tpp import TPP, GrowthSettings
from tpp.plan import PruningPlan


class Settings(GrowthSettings):
    """The defaults are TPP's for CIFAR, so that the two compare. GReg's own for ImageNet are the
    same as TPP's (delta 1e-4, tau 1, K_u 5, K_s 40,000); for ResNet-56 on CIFAR-10 its public code
    has K_u 5 and K_s 5,000 at a batch of 256.

    Example:
        {delta: 2e-4, tau: 0.5, update_interval: 5, stabilize_steps: 5000}
    """

    @property
    def gram_weight(self) -> float:
        """GReg knows no correlations."""
        return 0.0


class GReg1(TPP):
    """TPP without the gram term.

    Unlike TPP, GReg sets nothing to zero: the filters are removed as small as the decay has made
    them. Here the decay is also on their BatchNorm scale and shift, as in TPP; GReg's own code
    decays convolution weights only, and ends a layer's growth early where the kept filters are
    1000 times larger than the others.
    """

    name = "greg1"
    title = "GReg-1"
    settings_type: ClassVar[type[base.Settings]] = Settings

    @property
    def removes_at_zero(self) -> bool:
        """Nothing is held at zero."""
        return False

    def rank_costs(self, model: nn.Module, plan: PruningPlan, ranks: int) -> None:
        """A decay costs next to nothing, and nothing is multiplied."""

    def loss_terms(self) -> dict[str, Tensor]:
        """The decay, this rank's share."""
        return {name: term for name, term in super().loss_terms().items() if name == "decay"}
