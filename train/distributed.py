"""Devices and ranks: what Accelerate offers, as the training stages need it."""

import contextlib
import logging
import os
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce

from tpp.errors import UserError
from train.config import TrainingSection
from train.watchdog import group_timeout, keep_to_loopback, meet_anew_after_restart

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin

K = TypeVar("K")
T = TypeVar("T")
_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class EveryRankError(UserError):
    """A mistake that every rank raises alike, for one of them to tell."""


class _DeepSpeedAccelerator(Accelerator):
    """With autocast, which Accelerate leaves to DeepSpeed: the weights stay in float32."""

    in_bf16 = False

    def autocast(self, autocast_handler: Any = None) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.in_bf16)


def make_accelerator(
    precision: str, rank_timeout: float = 120.0, *, plugin: "DeepSpeedPlugin | None" = None
) -> Accelerator:
    """Start or join the process group and pick this rank's device.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        rank_timeout: seconds after which the watchdog takes a rank for lost; the process group's
            own timeout comes later.
        plugin: DeepSpeed's settings, see ``train.engine``; None for DistributedDataParallel.

    Raises:
        UserError: fp16 without a GPU or with DeepSpeed, or an engine that is not supported.
    """
    cpu = not torch.cuda.is_available()
    if cpu and precision == "fp16":
        raise UserError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if plugin is not None and precision == "fp16":
        raise UserError("training.precision: fp16 is not supported with DeepSpeed; use bf16")
    meet_anew_after_restart()
    keep_to_loopback()
    group = InitProcessGroupKwargs(
        backend="gloo" if cpu and plugin is not None else None,
        timeout=group_timeout(rank_timeout),
    )
    if plugin is not None:
        _be_a_group_of_one()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Told to use the CPU, Accelerate would leave DeepSpeed out.
        accelerator: Accelerator = _DeepSpeedAccelerator(
            deepspeed_plugin=plugin, kwargs_handlers=[group]
        )
        accelerator.in_bf16 = precision == "bf16"
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=_MIXED_PRECISION[precision], kwargs_handlers=[group]
        )
    if accelerator.distributed_type not in (
        DistributedType.NO,
        DistributedType.MULTI_GPU,
        DistributedType.MULTI_CPU,
        DistributedType.DEEPSPEED,
    ):
        raise UserError(
            f"{accelerator.distributed_type.value} is not supported by this version; use plain "
            "data parallelism or DeepSpeed"
        )
    if cpu and precision == "bf16" and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        accelerator.print(
            "training.precision: this processor has no bf16 arithmetic (AVX-512 or AMX); emulating "
            "it takes about 20 times as long as fp32"
        )
    return accelerator


def _be_a_group_of_one() -> None:
    """Let DeepSpeed, which wants a process group, have one where no launcher has made ranks."""
    if "RANK" in os.environ:
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def check_batch_size(training: TrainingSection, world_size: int) -> None:
    """Check that the global batch splits evenly.

    Raises:
        UserError: ``batch_size`` is no multiple of ranks times micro-batches; names the nearest
            sizes and numbers of ranks that fit.
    """
    batch, accumulation = training.batch_size, training.accumulation
    parts = world_size * accumulation
    if batch % parts == 0:
        return
    below = batch - batch % parts
    sizes = [size for size in (below, below + parts) if size]
    fits = " or ".join(map(str, sizes))
    ranks = _ranks_that_divide(batch, accumulation, world_size)
    if ranks:
        fits += f", or {' or '.join(map(str, ranks))} rank(s)"
    raise UserError(
        f"training.batch_size: {batch} is not divisible by {world_size} rank(s) x accumulation "
        f"{accumulation}; use {fits}"
    )


def _ranks_that_divide(batch: int, accumulation: int, wanted: int) -> list[int]:
    """The nearest numbers of ranks below and above ``wanted`` that share a batch evenly."""
    if batch % accumulation:
        return []
    images = batch // accumulation
    below = next(ranks for ranks in range(min(wanted, images), 0, -1) if images % ranks == 0)
    most = min(images, 2 * wanted)  # further up is no help, and the way there may be endless
    above = next((ranks for ranks in range(wanted + 1, most + 1) if images % ranks == 0), None)
    return [below] if above is None else [below, above]


def on_every_rank(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Do something on this rank that may be a mistake on any; all ranks have to call it.

    Raises:
        EveryRankError: whichever of them met it.
    """
    found, error = _attempt(do)
    errors: list[str | None] = [error]
    if accelerator.num_processes > 1:
        errors = [None] * accelerator.num_processes
        dist.all_gather_object(errors, error)
    for rank, message in enumerate(errors):
        if message is not None:
            raise EveryRankError(f"rank {rank}: {message}" if rank else message)
    return cast(T, found)


def from_main_rank(accelerator: Accelerator, do: Callable[[], T]) -> T:
    """Do something on the main rank and give the others what it returns.

    Raises:
        EveryRankError: the main rank met it.
    """
    told: list[Any] = [_attempt(do)] if accelerator.is_main_process else [None]
    if accelerator.num_processes > 1:
        dist.broadcast_object_list(told, src=0)
    found, error = told[0]
    if error is not None:
        raise EveryRankError(error)
    return cast(T, found)


def led_by_main_rank(
    accelerator: Accelerator, lead: Callable[[], tuple[K, T]], follow: Callable[[K], T]
) -> tuple[K, T]:
    """Let the main rank find something, and the others find the same for themselves.

    Args:
        accelerator: the ranks.
        lead: on the main rank; returns what the others are told, and what was found.
        follow: on the others, given what they were told; returns what they found.

    Raises:
        EveryRankError: any rank met it.
    """
    mine: list[T] = []

    def find() -> K:
        told, found = lead()
        mine.append(found)
        return told

    told = from_main_rank(accelerator, find)
    return told, on_every_rank(accelerator, lambda: mine[0] if mine else follow(told))


def _attempt(do: Callable[[], T]) -> tuple[T | None, str | None]:
    try:
        return do(), None
    except UserError as error:
        return None, str(error)


def world_size() -> int:
    """How many ranks there are; one where there is no process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(values: Tensor) -> Tensor:
    """Sum of a tensor over all ranks, in place where there are several."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def broadcast_buffers(model: nn.Module) -> None:
    """Give every rank the main rank's buffers: the BatchNorm statistics that are saved."""
    if world_size() > 1:
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


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
