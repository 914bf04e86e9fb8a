"""The optimiser, and the learning rate as a pure function of the step."""

import math

from torch import nn
from torch.optim import SGD

from train.config.sections import OptimizerSection


def make_optimizer(model: nn.Module, settings: OptimizerSection) -> SGD:
    """SGD over all parameters, weight decay on every one of them, as in the paper."""
    return SGD(
        model.parameters(),
        lr=settings.lr,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        weight_decay=settings.weight_decay,
    )


def learning_rate(settings: OptimizerSection, epoch: float, total_epochs: float) -> float:
    """Learning rate at the fractional ``epoch`` of a stage of ``total_epochs``.

    Linear warm-up over ``warmup_epochs``, from ``warmup_from`` to 1, scales whatever the schedule
    says at that epoch.
    """
    lr = settings.lr
    if settings.schedule == "step":
        passed = sum(epoch >= milestone for milestone in settings.milestones)
        lr *= settings.gamma**passed
    elif settings.schedule == "cosine":
        lr *= 0.5 * (1.0 + math.cos(math.pi * min(epoch / total_epochs, 1.0)))
    if epoch < settings.warmup_epochs:
        start = settings.warmup_from
        lr *= start + (1.0 - start) * (epoch / settings.warmup_epochs)
    return lr
