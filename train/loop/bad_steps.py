"""Steps that would ruin a network: a loss or gradient that is not finite, or one that explodes."""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.distributed.collectives import world_size

_NONE = torch.iinfo(torch.int64).max
_MOST_KEPT = 256  # steps whose numbers are kept one by one


@dataclass(frozen=True)
class BadStep:
    """A step that was found bad.

    Attributes:
        step: as logs count it: 1 is the first.
        loss: of the main rank's images, with the method's terms.
        gradient_norm: L2 norm over all parameters, averaged over the ranks as the optimiser gets
            it.
    """

    step: int
    loss: float
    gradient_norm: float

    def reason(self, max_norm: float | None) -> str:
        """What is wrong with it."""
        if not (math.isfinite(self.loss) and math.isfinite(self.gradient_norm)):
            return f"the loss is {self.loss:g} and the gradient's norm {self.gradient_norm:g}"
        return f"the gradient's norm is {self.gradient_norm:.4g}, above {max_norm:g}"


class StepCheck:
    """Looks at the loss and the gradient of every step, between backward and optimiser.

    Without ``at_once`` nothing waits for the device: losses and norms are kept there until
    :meth:`first_bad` asks. Its number is enough to name its images, as the order of the data is a
    function of it. With ``at_once``, which leaving a step out takes, every step costs one small
    reduction over the ranks.

    Args:
        model: the network whose steps are looked at.
        max_norm: largest norm allowed; None for any that is finite.
        at_once: whether to judge each step before the optimiser makes it.
        scaled: whether a loss scaler is at work, which meets infinite gradients every now and
            then, and leaves these steps out by itself: then only the loss has to be finite.
    """

    def __init__(
        self, model: nn.Module, *, max_norm: float | None, at_once: bool, scaled: bool = False
    ) -> None:
        self._buffers = list(model.buffers()) if at_once else []
        self._kept: list[Tensor] = []
        self._max_norm, self._scaled = max_norm, scaled
        self.at_once = at_once
        device = next(model.parameters()).device
        self._first = torch.tensor(_NONE, device=device)
        self._values = torch.zeros(2, dtype=torch.float64, device=device)
        self._steps: list[int] = []
        self._losses: list[Tensor] = []
        self._norms: list[Tensor] = []

    def begin(self) -> None:
        """Before the forward pass: keep what it changes, BatchNorm's statistics."""
        self._kept = [buffer.clone() for buffer in self._buffers]

    def __call__(self, step: int, loss: Tensor, norm: Tensor) -> None:
        """Take up ``loss`` and the L2 ``norm`` of the gradient of ``step``, the next one."""
        self._steps.append(step)
        self._losses.append(loss.detach())
        self._norms.append(norm)
        if len(self._steps) == _MOST_KEPT:
            self._judge()

    def _judge(self) -> None:
        """Judge the steps since the last time, all at once, still without waiting for them."""
        if not self._steps:
            return
        loss, norm = torch.stack(self._losses), torch.stack(self._norms)
        bad = ~torch.isfinite(loss)
        if not self._scaled:
            bad |= ~torch.isfinite(norm)
        if self._max_norm is not None:
            bad |= torch.isfinite(norm) & (norm > self._max_norm)
        place = bad.to(torch.uint8).argmax()  # of the first one
        new = bad.any() & (self._first == _NONE)
        values = torch.stack([loss[place].double(), norm[place].double()])
        self._values = torch.where(new, values, self._values)
        self._first = torch.where(new, self._steps[0] + place, self._first)
        self._steps, self._losses, self._norms = [], [], []

    def seen_here(self) -> bool:
        """Whether a bad step was seen on this rank; waits for the device, not for other ranks."""
        self._judge()
        return bool(self._first != _NONE)

    def first_bad(self) -> BadStep | None:
        """The first bad step on any rank since the start; all ranks have to ask together."""
        self._judge()
        first, values = self._first.clone(), self._values
        if world_size() > 1:
            dist.all_reduce(first, op=dist.ReduceOp.MIN)
        if first == _NONE:
            return None
        if self._first != first:
            values = torch.full_like(values, torch.nan)  # another rank's loss, not this one's
        return BadStep(int(first) + 1, *values.tolist())

    def undo(self) -> None:
        """Forget a step that is left out: its gradients, and what its forward pass changed."""
        for buffer, kept in zip(self._buffers, self._kept, strict=True):
            buffer.copy_(kept)
        self._first = torch.full_like(self._first, _NONE)
