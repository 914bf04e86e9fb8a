"""How the regularisation grows, and when filters are set to zero (Wang & Fu 2023, sec. 3.2)."""

import math
from dataclasses import dataclass

from tpp.common.errors import UserError


@dataclass(frozen=True)
class GrowthSchedule:
    """Strength lambda of the regularisation as a pure function of the step.

    Every ``update_interval`` steps lambda is set to ``delta * step / update_interval`` until it
    reaches ``tau``. Then the stabilise phase begins, lambda held at ``tau``, in which the layers
    are set to zero one after the other.

    Attributes:
        delta: growth of lambda per update (Delta).
        tau: ceiling of lambda.
        update_interval: steps between updates (K_u).
        stabilize_steps: K_s; the stabilise phase is one step longer, see :attr:`total_steps`.
        zero_out_interval: layer number q (counted over the network's Conv2d and Linear layers)
            is held at zero from ``(q + 1) * zero_out_interval`` steps into the stabilise phase;
            None for never.
    """

    delta: float = 1e-4
    tau: float = 1.0
    update_interval: int = 10
    stabilize_steps: int = 10_000
    zero_out_interval: int | None = 100

    @property
    def growth_steps(self) -> int:
        """Steps until lambda has reached tau."""
        # The tolerance keeps 1.0 / 1e-4 at 10,000 updates whatever the last bit of the quotient.
        return self.update_interval * math.ceil(self.tau / self.delta - 1e-9)

    @property
    def total_steps(self) -> int:
        """Length of the regularised stage in steps: growth, K_s, and one more.

        The authors' stabilise phase counts its steps from 0 and includes its end, so that the
        published stages made 90,001 (ImageNet) and 110,001 steps (CIFAR).
        """
        return self.growth_steps + self.stabilize_steps + 1

    def strength(self, step: int) -> float:
        """Lambda at 0-based ``step``."""
        if step >= self.growth_steps:
            return self.tau
        return min(self.tau, self.delta * (step // self.update_interval))

    def phase(self, step: int) -> str:
        """``grow``, ``stabilize`` or ``finished``, at 0-based ``step``."""
        if step < self.growth_steps:
            return "grow"
        return "stabilize" if step < self.total_steps else "finished"

    def zeroed(self, layer_number: int, step: int) -> bool:
        """Whether layer number ``layer_number`` is held at zero after 0-based ``step``."""
        if self.zero_out_interval is None:
            return False
        return step - self.growth_steps >= (layer_number + 1) * self.zero_out_interval

    def steps_until_zero(self, last_layer_number: int) -> int | None:
        """Steps after which all layers up to that number are held at zero; None: never."""
        if self.zero_out_interval is None:
            return None
        return self.growth_steps + (last_layer_number + 1) * self.zero_out_interval + 1

    def check_zero_out(self, last_layer_number: int) -> None:
        """Check that the last pruned layer is zeroed before the stage ends.

        Raises:
            UserError: ``stabilize_steps`` ends before the last layer's turn.
        """
        if self.zero_out_interval is None:
            return
        needed = (last_layer_number + 1) * self.zero_out_interval + 1
        if self.stabilize_steps < needed:
            raise UserError(
                f"stabilize_steps (K_s) is {self.stabilize_steps}, too short to zero out the last "
                f"pruned layer (number {last_layer_number}, every {self.zero_out_interval} steps): "
                f"it must be at least {needed}, or zero_out_interval smaller"
            )
