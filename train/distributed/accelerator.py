"""Devices and ranks from Accelerate, and the engine on top of them."""

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedType,
    DynamoBackend,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.optim import Optimizer

from tpp.common.errors import UserError
from train.config.sections import TrainingSection
from train.distributed.deepspeed_engine import DeepSpeedEngine
from train.distributed.engine import Engine
from train.distributed.meeting import meet
from train.distributed.rendezvous import keep_to_loopback, meet_anew_after_restart
from train.distributed.watchdog import group_timeout

if TYPE_CHECKING:
    from accelerate.utils import DeepSpeedPlugin


_MIXED_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


class _DeepSpeedAccelerator(Accelerator):
    """Knows of bf16, which Accelerate leaves to DeepSpeed: the weights stay in float32."""

    in_bf16 = False


def make_accelerator(
    precision: str, rank_timeout: float = 120.0, *, plugin: "DeepSpeedPlugin | None" = None
) -> Accelerator:
    """Start or join the process group and pick this rank's device.

    Where ranks do not come, this process ends, see ``train.distributed.meeting``.

    Args:
        precision: ``fp32``, ``bf16`` or ``fp16``.
        rank_timeout: seconds that the ranks wait for each other, and after which the watchdog
            takes one for lost; the process group's own timeout comes later.
        plugin: DeepSpeed's settings, see ``train.distributed.deepspeed_engine``; None for
            DistributedDataParallel.

    Raises:
        UserError: fp16 without a GPU or with DeepSpeed, an engine that is not supported, or no
            address or port to meet at.
    """
    cpu = not torch.cuda.is_available()
    if cpu and precision == "fp16":
        raise UserError("training.precision: fp16 needs a GPU; use bf16 or fp32 on the CPU")
    if plugin is not None and precision == "fp16":
        raise UserError("training.precision: fp16 is not supported with DeepSpeed; use bf16")
    meet_anew_after_restart()
    keep_to_loopback()
    meet(rank_timeout)
    group = InitProcessGroupKwargs(
        backend="gloo" if cpu and plugin is not None else None,
        timeout=group_timeout(rank_timeout),
    )
    # What is given here, Accelerate does not look up in the environment.
    ours: dict[str, Any] = {
        "gradient_accumulation_plugin": GradientAccumulationPlugin(num_steps=1),
        "dynamo_backend": DynamoBackend.NO,
        "kwargs_handlers": [group],
    }
    if plugin is not None:
        _be_a_group_of_one()
        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        # Told to use the CPU, Accelerate would leave DeepSpeed out.
        accelerator: Accelerator = _DeepSpeedAccelerator(
            deepspeed_plugin=plugin, mixed_precision="no", **ours
        )
        accelerator.in_bf16 = precision == "bf16"
    else:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "false"
        accelerator = Accelerator(cpu=cpu, mixed_precision=_MIXED_PRECISION[precision], **ours)
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


def make_engine(
    accelerator: Accelerator,
    network: nn.Module,
    optimizer: Optimizer,
    *,
    clip: float | None = None,
) -> Engine:
    """The engine that the accelerator was made for."""
    deepspeed = accelerator.distributed_type == DistributedType.DEEPSPEED
    return (DeepSpeedEngine if deepspeed else Engine)(accelerator, network, optimizer, clip=clip)


def zero_stage(accelerator: Accelerator) -> int:
    """DeepSpeed's, or 0 without DeepSpeed."""
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return 0
    return int(accelerator.deepspeed_plugin.zero_stage)


def engine_name(accelerator: Accelerator) -> str:
    """What shares the training among the ranks, for a person."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        return f"DeepSpeed, ZeRO stage {zero_stage(accelerator)}"
    return "DistributedDataParallel" if accelerator.num_processes > 1 else "one process"
