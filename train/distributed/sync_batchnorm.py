"""BatchNorm over the images of all ranks."""

import sys
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm

from train.distributed.collectives import EveryRankError, world_size


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm use the statistics of all ranks.

    The libraries' SyncBatchNorm on GPUs, where it is fused; it refuses CPU tensors, so there a
    plain equivalent with the same parameters and buffers. One rank needs no synchronisation.

    Raises:
        EveryRankError: a BatchNorm of a class whose forward pass is its own; names it.
    """
    if world_size() == 1:
        return model
    check_batchnorms(model)
    if next(model.parameters()).is_cuda:
        return convert_for_gpus(model)
    for module in model.modules():
        if isinstance(module, _with_activation()):
            module.__class__ = _cpu_with_activation()
        elif isinstance(module, _BatchNorm):
            module.__class__ = _CpuSyncBatchNorm
    return model


def check_batchnorms(model: nn.Module) -> None:
    """Refuse what a synchronised BatchNorm would compute otherwise; one on every rank.

    Raises:
        EveryRankError: see :func:`convert_sync_batchnorm`.
    """
    for name, module in model.named_modules():
        if not isinstance(module, _BatchNorm) or type(module).forward in _known_forwards():
            continue
        if not isinstance(module, nn.SyncBatchNorm):
            raise EveryRankError(
                f"training.sync_batchnorm: {name} is a {type(module).__name__}, a BatchNorm with a "
                "forward pass of its own, which would be lost; use sync_batchnorm: false"
            )


def convert_for_gpus(model: nn.Module) -> nn.Module:
    """A network with SyncBatchNorm in the place of BatchNorm, and timm's where timm's classes are.

    Torch's own conversion would leave out the activation that those keep inside.
    """
    if any(isinstance(module, _with_activation()) for module in model.modules()):
        from timm.layers import convert_sync_batchnorm as convert
    else:
        convert = nn.SyncBatchNorm.convert_sync_batchnorm
    return cast(nn.Module, convert(model))


def _known_forwards() -> tuple[object, ...]:
    return _BatchNorm.forward, *(of.forward for of in _with_activation())


def _with_activation() -> tuple[type[nn.Module], ...]:
    """timm's BatchNorm with an activation; nothing where no network of timm's was built."""
    timm = sys.modules.get("timm.layers")
    return () if timm is None else (timm.BatchNormAct2d,)


@cache
def _cpu_with_activation() -> type[nn.Module]:
    from timm.layers import BatchNormAct2d

    class CpuSyncBatchNormAct(BatchNormAct2d):
        def forward(self, input: Tensor) -> Tensor:
            if not self.training:
                return cast(Tensor, super().forward(input))
            return cast(Tensor, self.act(self.drop(_over_all_ranks(self, input))))

    return CpuSyncBatchNormAct


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the equal batches of all ranks, for CPU tensors of 2 dimensions or more."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input, got {input.dim()}D")

    def forward(self, input: Tensor) -> Tensor:
        return _over_all_ranks(self, input) if self.training else super().forward(input)


def _over_all_ranks(norm: _BatchNorm, input: Tensor) -> Tensor:
    """What BatchNorm computes in training, from the statistics of all ranks' batches."""
    ranks = world_size()
    axes = [axis for axis in range(input.dim()) if axis != 1]
    shape = [1, -1] + [1] * (input.dim() - 2)
    x = input.float()
    mean = all_reduce(x.mean(axes)) / ranks
    centred = x - mean.view(shape)
    var = all_reduce(centred.square().mean(axes)) / ranks
    if norm.track_running_stats and norm.running_mean is not None:
        with torch.no_grad():
            count = ranks * x.numel() / x.shape[1]
            assert norm.num_batches_tracked is not None and norm.running_var is not None
            norm.num_batches_tracked += 1
            momentum = norm.momentum
            if momentum is None:  # the plain mean of all batches
                momentum = 1.0 / float(norm.num_batches_tracked)
            norm.running_mean.lerp_(mean, momentum)
            norm.running_var.lerp_(var * (count / (count - 1)), momentum)
    out = centred * (var + norm.eps).rsqrt().view(shape)
    if norm.affine:
        out = out * norm.weight.view(shape) + norm.bias.view(shape)
    return out.to(input.dtype)
