"""Learning rates of a network that lost weights, by name, as pure functions of the step.

From Zimmer, Spiegel, Pokutta, "How I Learned to Stop Worrying and Love Retraining" (ICLR 2023,
arXiv:2111.00843), and read off the authors' code; the older ones are named as there.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

Rate = Callable[[int], float]


@dataclass(frozen=True)
class Dense:
    """The learning rates by which the dense network was trained.

    Attributes:
        rate: of a 0-based step.
        steps: how many there were.
        warmup: how many of them were a warm-up.
    """

    rate: Rate
    steps: int
    warmup: int = 0

    @property
    def highest(self) -> float:
        """The highest one."""
        return max(self.rate(step) for step in range(self.steps))

    @property
    def lowest(self) -> float:
        """The lowest one after the warm-up."""
        return min(self.rate(step) for step in range(min(self.warmup, self.steps - 1), self.steps))


def llr(highest: float, steps: int) -> Rate:
    """Linear learning rate restarting: to zero within ``steps``, after a warm-up of a tenth."""
    return _after_warmup(highest, steps, lambda done: highest * (1 - done))


def allr(highest: float, steps: int, *, damage: float, share: float) -> Rate:
    """Adaptive LLR: it starts the lower the less was lost and the shorter the retraining is.

    Args:
        highest: of the dense network's training.
        steps: of the retraining.
        damage: d1, see :func:`relative_damage`.
        share: d2, epochs of the retraining over those of the dense network.
    """
    return llr(highest * min(1.0, max(damage, share)), steps)


def clr(highest: float, lowest: float, steps: int) -> Rate:
    """Cyclical learning rate restarting: half a cosine from the highest to the lowest."""
    return _after_warmup(
        highest,
        steps,
        lambda done: lowest + (highest - lowest) * (1 + math.cos(math.pi * done)) / 2,
    )


def slr(dense: Dense, steps: int) -> Rate:
    """Scaled learning rate restarting: the dense network's schedule in as many steps."""
    highest, warmup = dense.highest, _warmup(steps)

    def rate(step: int) -> float:
        if step <= warmup and warmup:
            return _rising(highest, step, warmup)
        place = (step - warmup) * dense.steps // (steps - warmup)
        return highest if place < dense.warmup else dense.rate(place)

    return rate


def lrw(dense: Dense, steps: int) -> Rate:
    """Learning rate rewinding: the dense network's last ``steps`` (Renda et al. 2020)."""
    return lambda step: dense.rate(dense.steps - steps + step)


def ft(dense: Dense) -> Rate:
    """Finetuning: the dense network's lowest learning rate all the way (Han et al. 2015)."""
    lowest = dense.lowest
    return lambda step: lowest


def relative_damage(norm_before: float, norm_after: float, share: float) -> float:
    """d1 of ALLR: how far the weights are from what they were, beside how many are gone.

    .. math:: d_1 = \\|\\theta - \\theta_p\\|_2 / (\\|\\theta\\|_2 \\sqrt{p})

    At most 1 where the smallest of all weights go, and 1 where all are of one magnitude.

    Args:
        norm_before, norm_after: L2 norm of all trained values before and after.
        share: p, of the weights that were not gone yet the share that went; of none it is 0.
    """
    if not share or not norm_before:
        return 0.0
    lost = math.sqrt(abs(norm_before**2 - norm_after**2))
    return lost / (norm_before * math.sqrt(share))


def _warmup(steps: int) -> int:
    return int(0.1 * steps)


def _rising(highest: float, step: int, warmup: int) -> float:
    return highest * (1 - math.cos(math.pi * step / warmup)) / 2


def _after_warmup(highest: float, steps: int, falling: Callable[[float], float]) -> Rate:
    """Half a cosine from zero up within a tenth of the steps, then ``falling`` of what is done."""
    warmup = _warmup(steps)

    def rate(step: int) -> float:
        if step <= warmup and warmup:
            return _rising(highest, step, warmup)
        return falling((step - warmup) / (steps - warmup))

    return rate
