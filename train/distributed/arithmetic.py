"""How a device computes: TF32, cuDNN's search for algorithms, compiled networks."""

import contextlib
import os
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from tpp.common.errors import UserError, reason_of
from train.config.sections import OFF, TrainingSection

COMPILED = "compiled"  # in the run folder
_CACHE = "TORCHINDUCTOR_CACHE_DIR"
# Without PyTorch's own CUDA graphs, whose gradients the next micro-batch overwrites.
_MODES = {"default": "default", "max-autotune": "max-autotune-no-cudagraphs"}


def settle_arithmetic(training: TrainingSection, device: torch.device, folder: Path) -> None:
    """Set PyTorch up as a run says.

    Args:
        training: of the run.
        device: of this rank.
        folder: the run folder; what is compiled is kept there, so that a run that goes on, on
            whatever node, does not compile it again. ``TORCHINDUCTOR_CACHE_DIR`` names another.

    Raises:
        UserError: nothing can be compiled here; says what is missing.
    """
    backends = cast(Any, torch.backends)
    if training.tf32 is not None:
        kind = "tf32" if training.tf32 else "ieee"
        backends.cuda.matmul.fp32_precision = kind
        backends.cudnn.conv.fp32_precision = kind
    backends.cudnn.benchmark = training.cudnn_benchmark
    if training.compile != OFF:
        # First: whatever looks for a compiler sets it to a folder of its own.
        os.environ.setdefault(_CACHE, str((folder / COMPILED).absolute()))
        _check_compiler(device)


def check_capture(training: TrainingSection, accelerator: Accelerator) -> None:
    """Refuse ``training.capture`` where no CUDA graph of a step can be made.

    Raises:
        UserError: no GPU, several ranks, or DeepSpeed.
    """
    if not training.capture:
        return
    device, ranks = accelerator.device, accelerator.num_processes
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        found = "this is DeepSpeed"
    elif ranks > 1:
        found = f"these are {ranks} ranks"
    elif device.type != "cuda":
        found = f"this is on the {device.type.upper()}"
    else:
        return
    raise UserError(
        "training.capture: the steps of one rank on a GPU, without DeepSpeed, can be recorded as a "
        f"CUDA graph, and {found}; use capture: false"
    )


def _check_compiler(device: torch.device) -> None:
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise UserError(
                "training.compile: for a GPU PyTorch compiles with Triton, which is not installed "
                "here or does not know this GPU; use off"
            )
        return
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        get_cpp_compiler()
    except Exception as error:  # of the compiler's own kinds
        raise UserError(
            "training.compile: for the CPU PyTorch compiles with a C++ compiler, such as g++, and "
            f"finds none ({reason_of(error)}); install one, or use off"
        ) from None


def compile_network(network: nn.Module, mode: str) -> None:
    """Compile a network's forward pass in place, with what hooks on it do; its names stay.

    It happens at the first step, and anew where shapes or layers are others than before.

    Args:
        network: placed; another one than was compiled before, as after filters went.
        mode: as ``training.compile`` says.
    """
    if mode == OFF:
        return
    # What was compiled for a network that is gone would count against a limit of eight.
    torch._dynamo.reset()
    network.compile(mode=_MODES[mode])


def is_compiled(network: nn.Module) -> bool:
    """Whether :func:`compile_network` has compiled it."""
    return network._compiled_call_impl is not None


def eagerly(network: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Within it a network runs as it was written, compiled or not."""
    if not is_compiled(network):
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")
