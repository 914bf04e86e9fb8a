"""What a network in training makes of its device: arithmetic per second, and memory.

A multiply-accumulate is two operations, and a training step takes three times the forward pass's:
the backward pass has one for the layer's input and one for its weights. That is what the network
asks for ("model FLOPs" of PaLM, Chowdhery et al. 2022, appendix B): what a method's penalty or a
teacher computes besides is not counted.
"""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from tpp.measure.counts import count
from tpp.models.architecture import example_input_for, set_preprocessing
from tpp.models.fitting import fitted
from train.run import Run
from train.run_folder.networks import Shapes


class Peak(NamedTuple):
    """Dense peak of a GPU in TFLOP/s, without sparsity; None where it has no such units.

    Attributes:
        half: float16 or bfloat16, summed in float32, by tensor cores.
        tf32: by tensor cores.
        fp32: without them.
        bf16: whether ``half`` holds for bfloat16 too.
    """

    half: float
    tf32: float | None
    fp32: float
    bf16: bool = True


# NVIDIA's data sheets and architecture white papers; figures there "with sparsity" are halved.
# What stands first and is found in the name that PyTorch says holds.
_PEAKS = {
    # Blackwell data sheet, HGX B200: an eighth of 36 and 18 PFLOP/s with sparsity, and of 600.
    r"\bB200\b": Peak(2250, 1125, 75),
    # H200 data sheet; NVL: 1671 and 835 with sparsity.
    r"\bH200 NVL\b": Peak(835.5, 417.5, 60),
    r"\bG?H200\b": Peak(989.4, 494.7, 66.9),
    # H100 data sheet, and "NVIDIA H100 Tensor Core GPU Architecture", table 2: PCIe, SXM5.
    r"\bH100 NVL\b": Peak(835.5, 417.5, 60),
    r"\bH100 PCIe\b": Peak(756, 378, 51.2),
    r"\bH100\b": Peak(989.4, 494.7, 66.9),
    # "NVIDIA A100 Tensor Core GPU Architecture", table 2, and the data sheets of the others.
    r"\bA[18]00\b": Peak(312, 156, 19.5),
    r"\bA40\b": Peak(149.7, 74.8, 37.4),
    r"\bA30\b": Peak(165, 82, 10.3),
    r"\bA10\b": Peak(125, 62.5, 31.2),
    r"\bL40S\b": Peak(362, 183, 91.6),
    r"\bL4\b": Peak(121, 60, 30.3),
    # "NVIDIA Ada GPU Architecture", appendix A; "NVIDIA Ampere GA102", appendix A.
    r"\bRTX 4090$": Peak(165.2, 82.6, 82.6),
    r"\bRTX 3090$": Peak(71, 35.6, 35.6),
    # V100 and T4 data sheets.
    r"\bV100-SXM": Peak(125, None, 15.7, bf16=False),
    r"\bV100-PCIE": Peak(112, None, 14, bf16=False),
    r"\bT4\b": Peak(65, None, 8.1, bf16=False),
}


def peak_tflops(name: str, precision: str, *, tf32: bool) -> float | None:
    """What a GPU can do at most in dense convolutions and products, in TFLOP/s.

    Args:
        name: as PyTorch says it.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        tf32: whether ``fp32`` may use TF32.

    Returns:
        the figure, or None of a GPU that is not known, of a part of one (MIG), and of a precision
        that it has no units for.
    """
    if "MIG" in name:
        return None
    peak = next((peak for part, peak in _PEAKS.items() if re.search(part, name)), None)
    if peak is None:
        return None
    if precision == "fp32":
        return (peak.tf32 if tf32 else None) or peak.fp32
    return peak.half if precision == "fp16" or peak.bf16 else None


class Throughput:
    """Figures of a network in training, to be logged beside its images per second.

    Args:
        macs: multiply-accumulates of a forward pass of one training image; asked once, at the
            first figures.
        device: of this rank; all are taken to be alike.
        ranks: how many.
        precision: ``fp32``, ``bf16`` or ``fp16``.
        peak: of a device in TFLOP/s; None to look the GPU's up.
    """

    def __init__(
        self,
        macs: Callable[[], int],
        device: torch.device,
        ranks: int,
        precision: str,
        peak: float | None,
    ) -> None:
        self._ask, self._macs = macs, 0
        self._device, self._ranks = device, ranks
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            if peak is None:
                # TF32 of convolutions, which are what networks for images compute.
                tf32 = cast(Any, torch.backends.cudnn).conv.fp32_precision == "tf32"
                peak = peak_tflops(torch.cuda.get_device_name(device), precision, tf32=tf32)
        self._peak = peak

    def figures(self, images_per_second: float) -> dict[str, float]:
        """The figures at a rate over all ranks.

        Returns:
            ``tflops``, per device; ``mfu``, the share of its peak, where that is known; and
            ``peak_memory_gib``, see :func:`peak_memory`.
        """
        self._macs = self._macs or self._ask()
        tflops = 3 * 2 * self._macs * images_per_second / self._ranks / 1e12
        found = {"tflops": tflops}
        if self._peak is not None:
            found["mfu"] = tflops / self._peak
        memory = peak_memory(self._device)
        if memory is not None:
            found["peak_memory_gib"] = memory / 2**30
        return found


def macs_in_training(run: Run, shapes: Shapes) -> int:
    """Multiply-accumulates of one training image, of a run's network with tensors of these shapes.

    Raises:
        UserError: they are no shapes of such a network.
    """
    network = fitted(run.architecture, shapes)
    set_preprocessing(network, run.config.data.preprocessing())
    side = run.config.data.train_size
    return count(network, example_input=example_input_for(network, "meta", side=side)).macs


def peak_memory(device: torch.device) -> int | None:
    """Most bytes that were in use: on a GPU by tensors, since the network was made; else resident
    in memory, of the process; None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    # Not getrusage: what it says, a process inherits from the one that started it.
    found = re.search(r"^VmHWM:\s+([0-9]+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else None
