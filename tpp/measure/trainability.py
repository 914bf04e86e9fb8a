"""Trainability of a network, read off the singular values of its input-output Jacobian.

A network is easy to train where its Jacobian d logits / d image has singular values near one
(dynamical isometry; Saxe et al., "Exact solutions to the nonlinear dynamics of learning in deep
linear neural networks", ICLR 2014). Wang & Fu (ICLR 2023) take the mean of these Jacobian singular
values (JSV) as the measure of what pruning leaves of it.
"""

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from tpp.common.errors import UserError


@dataclass(frozen=True)
class Trainability:
    """What the Jacobian singular values of a network are like over some images.

    Attributes:
        mean: over the singular values of an image, then over the images: the paper's mean JSV.
        std: standard deviation over the singular values of an image, averaged over the images;
            0 where all are alike.
        condition: largest over smallest singular value of an image, median over the images;
            infinite where the smallest is 0.
        min, max: smallest and largest singular value of all.
    """

    mean: float
    std: float
    condition: float
    min: float
    max: float


def measure_trainability(
    model: nn.Module, images: Tensor, *, max_bytes: int = 2**30
) -> Trainability:
    """Summarise the Jacobian singular values of ``model`` at ``images``.

    Arguments and errors are those of :func:`jacobian_singular_values`.
    """
    values = jacobian_singular_values(model, images, max_bytes=max_bytes).double()
    smallest, largest = values[:, -1], values[:, 0]
    # A network whose Jacobian is all zero has 0 / 0; nothing is worse conditioned.
    condition = torch.where(smallest > 0, largest / smallest, torch.inf)
    return Trainability(
        mean=values.mean().item(),
        std=values.std(1, correction=0).mean().item(),
        condition=statistics.median(condition.tolist()),
        min=smallest.min().item(),
        max=largest.max().item(),
    )


def jacobian_singular_values(model: nn.Module, images: Tensor, *, max_bytes: int = 2**30) -> Tensor:
    """Singular values of the Jacobian d logits / d image, for every image on its own.

    One backward pass for each logit gives that row of the Jacobian for all images at once, since
    in evaluation mode no image influences another's logits. It works for every network that can
    be trained, on its device. The model is measured in evaluation mode, outside autocast, and is
    left as it was: gradients, modes, buffers and random states.

    Args:
        model: any classifier whose logits of an image depend on that image alone.
        images: as the network takes them, (batch, ...), on its device.
        max_bytes: memory for the Jacobians of as many images as are done at once, in bytes; one
            image's (ImageNet at 224x224: 0.6 GB) is always held whole.

    Returns:
        Singular values in falling order, (batch, min(outputs, inputs)), in the images' dtype but
        at least float32. Float32 Jacobians are reduced to their gram matrix in float64, which
        resolves values down to about 1e-8 of the largest: below that Jacobian's own rounding. A
        float64 Jacobian's singular values are computed directly. An image at which the Jacobian
        is not finite has NaN throughout.

    Raises:
        UserError: there are no images, or a normalisation without running statistics ties the
            images of a batch to each other.
    """
    if images.dim() < 2 or not len(images):
        raise UserError(
            f"images to measure trainability at must be (batch, ...), not {tuple(images.shape)}"
        )
    _check_independence(model)
    with _measuring(model, images.device):
        images = images.detach().clone()
        with torch.no_grad():
            outputs = model(images[:1]).numel()
        bytes_each = outputs * images[0].numel() * images.element_size()
        at_once = max(1, max_bytes // bytes_each)
        parts = [_singular_values(_jacobians(model, part)) for part in images.split(at_once)]
    return torch.cat(parts)


def _jacobians(model: nn.Module, images: Tensor) -> Tensor:
    """(batch, outputs, inputs)."""
    images.requires_grad_()
    logits = model(images).flatten(1)
    rows = torch.empty(*logits.shape, images[0].numel(), dtype=images.dtype, device=images.device)
    for k in range(logits.shape[1]):
        more = k + 1 < logits.shape[1]
        (row,) = torch.autograd.grad(logits[:, k].sum(), images, retain_graph=more)
        rows[:, k] = row.flatten(1)
    return rows


@torch.no_grad()
def _singular_values(jacobians: Tensor) -> Tensor:
    finite = jacobians.isfinite().flatten(1).all(1)[:, None]
    # LAPACK refuses NaN, and one bad image must not hide the others.
    matrices = jacobians.where(finite[:, :, None], 0)
    if matrices.dtype == torch.float64:
        values = torch.linalg.svdvals(matrices)
    else:
        if matrices.shape[1] > matrices.shape[2]:
            matrices = matrices.mT
        gram = torch.zeros(
            len(matrices), *2 * [matrices.shape[1]], dtype=torch.float64, device=matrices.device
        )
        # Columns bit by bit: a float64 copy of the whole would double the memory and more.
        for columns in matrices.split(4096, dim=2):
            wide = columns.double()
            gram += wide @ wide.mT
        squares = torch.linalg.eigvalsh(gram).flip(1)  # rising
        values = squares.clamp(min=0).sqrt().float()
    return values.where(finite, torch.nan)


def _check_independence(model: nn.Module) -> None:
    for name, module in model.named_modules():
        mixes = isinstance(module, _NormBase) and module.running_mean is None
        if mixes and not isinstance(module, nn.modules.instancenorm._InstanceNorm):
            raise UserError(
                f"{name}: normalises with the statistics of the batch, so that its images have no "
                "Jacobians of their own; trainability needs running statistics there"
            )


@contextmanager
def _measuring(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Evaluation mode with gradients, whatever mode the caller is in, undone afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    devices = [device] if device.type == "cuda" else []
    try:
        for module, _ in modes:
            module.training = False
        with (
            torch.random.fork_rng(devices=devices),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        for module, training in modes:
            module.training = training
