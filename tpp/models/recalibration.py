"""BatchNorm's running statistics, estimated anew: those of a network change when filters go."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from tpp.common.errors import UserError

# In what a checkpoint says of itself, and in a stage's results: over how many batches.
RECALIBRATED = "recalibrated_batches"
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def norms_with_statistics(model: nn.Module) -> dict[str, _BatchNorm]:
    """The BatchNorms that normalise by running statistics in evaluation, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    }


def statistics_of(model: nn.Module) -> dict[str, Tensor]:
    """All running statistics, by their names in the ``state_dict``."""
    state = model.state_dict()
    return {
        key: state[key]
        for name in norms_with_statistics(model)
        for key in (f"{name}.{kind}".lstrip(".") for kind in _STATISTICS)
        if key in state
    }


def with_statistics(
    tensors: Mapping[str, Tensor], statistics: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """A ``state_dict`` with other running statistics, each in the type that it had."""
    return {
        name: statistics[name].to(tensor.dtype) if name in statistics else tensor
        for name, tensor in tensors.items()
    }


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Estimate the running statistics of every BatchNorm anew, in place.

    The plain mean over the batches of each batch's mean and unbiased variance, where every
    BatchNorm before it normalises by the statistics of the batch, as in training; no weight
    changes, and nothing else is in training mode (no dropout).

    Args:
        model: any network; its training flags are as they were afterwards.
        batches: what the network takes, of more than one value per channel each.

    Returns:
        How many batches there were.

    Raises:
        UserError: there is no BatchNorm with running statistics, there are no batches, or a batch
            is too small.
    """
    norms = norms_with_statistics(model)
    if not norms:
        raise UserError("the network has no BatchNorm whose running statistics could change")
    training = {module: module.training for module in model.modules()}
    momenta = {norm: norm.momentum for norm in norms.values()}
    seen = 0
    model.eval()
    try:
        for norm in norms.values():
            norm.train()
            norm.reset_running_stats()
            norm.momentum = None  # the plain mean of all batches
        for images in batches:
            try:
                model(images)
            except ValueError as error:  # PyTorch's, of a single value
                raise UserError(
                    f"recalibration: a batch of {len(images)} images is too small: {error}"
                ) from None
            seen += 1
    finally:
        for module, flag in training.items():
            module.training = flag
        for norm, momentum in momenta.items():
            norm.momentum = momentum
    if not seen:
        raise UserError("recalibration: there are no images")
    return seen
