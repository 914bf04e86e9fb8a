"""Telling images apart: cross entropy, top-1 and top-5."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from train.distributed.collectives import sum_over_ranks


@dataclass(frozen=True)
class Accuracy:
    """What an evaluation found.

    Attributes:
        top1, top5: per cent of the images.
        loss: mean cross entropy per image.
        images: how many were counted, over all ranks.
    """

    top1: float
    top5: float
    loss: float
    images: int

    def to_dict(self) -> dict[str, float]:
        """As plain data."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    accelerator: Accelerator,
) -> Accuracy:
    """Evaluate ``model`` on the batches of all ranks.

    Args:
        model: the unwrapped network; ranks may hold different numbers of batches, so nothing in
            its forward pass may communicate. Left in evaluation mode.
        batches: this rank's images (b, c, h, w) and labels (b,), on its device.
        accelerator: for autocast and the sum over ranks.
    """
    model.eval()
    sums = torch.zeros(4, dtype=torch.float64, device=accelerator.device)
    for images, labels in batches:
        with accelerator.autocast():
            logits = model(images)
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]
        sums[0] += best[:, 0].sum()
        sums[1] += best.sum()
        sums[2] += F.cross_entropy(logits, labels, reduction="sum").double()
        sums[3] += len(labels)
    top1, top5, loss, count = sum_over_ranks(sums).tolist()
    return Accuracy(100 * top1 / count, 100 * top5 / count, loss / count, int(count))
