"""BatchNorm over the images of all ranks."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from train.distributed.collectives import world_size


def convert_sync_batchnorm(model: nn.Module) -> nn.Module:
    """Let every BatchNorm use the statistics of all ranks.

    PyTorch's SyncBatchNorm on GPUs, where it is fused; it refuses CPU tensors, so there a plain
    equivalent with the same parameters and buffers. One rank needs no synchronisation.
    """
    if world_size() == 1:
        return model
    if next(model.parameters()).is_cuda:
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(model))
    for module in model.modules():
        if type(module) in (nn.BatchNorm1d, nn.BatchNorm2d):
            module.__class__ = _CpuSyncBatchNorm
    return model


class _CpuSyncBatchNorm(nn.BatchNorm2d):
    """BatchNorm over the equal batches of all ranks, for 2D to 4D CPU tensors."""

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input, got {input.dim()}D")

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        ranks = world_size()
        axes = [axis for axis in range(input.dim()) if axis != 1]
        shape = [1, -1] + [1] * (input.dim() - 2)
        x = input.float()
        mean = all_reduce(x.mean(axes)) / ranks
        centred = x - mean.view(shape)
        var = all_reduce(centred.square().mean(axes)) / ranks
        if self.track_running_stats and self.running_mean is not None:
            with torch.no_grad():
                count = ranks * x.numel() / x.shape[1]
                assert self.num_batches_tracked is not None and self.running_var is not None
                self.num_batches_tracked += 1
                momentum = self.momentum or 1.0 / float(self.num_batches_tracked)
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(var * (count / (count - 1)), momentum)
        out = centred * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(input.dtype)
