"""How long a network takes for a batch."""

import functools
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from tpp.common.errors import UserError
from tpp.common.settings import NaturalNumber, OneOf, PositiveInt, check_values
from tpp.measure.onnx_runtime import Runtime, session_of
from tpp.models.architecture import Architecture, example_input_for, plain_copy

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
BACKENDS = ("torch", "onnxruntime", "tensorrt")
# What networks raise for an input, a dtype or a device that they do not run with; whatever
# torch.compile raises is a RuntimeError.
_RUN_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


@dataclass(frozen=True)
class LatencySettings:
    """Under which conditions networks are timed.

    Attributes:
        batch (images): number of images per forward pass.
        threads: number of threads of PyTorch on the CPU; None leaves it as it is.
        dtype: type of weights and images, which are converted; there is no autocast.
        channels_last: whether weights and images are in channels-last memory order.
        compile: whether the network is compiled by ``torch.compile``.
        device: where the networks run.
        backend: what runs them: ``torch``; ``onnxruntime``, which takes a network as ONNX (the
            extra ``export``); or ``tensorrt``, by onnxruntime too, on a GPU alone. Both take
            float32, and on a GPU float16.
        repeats: number of timed runs of each network.
        warmup: number of rounds before them that are not timed, after a first run that never is.

    Raises:
        UserError: a value is none of these.
    """

    batch: PositiveInt = 1
    threads: PositiveInt | None = None
    dtype: Annotated[str, OneOf(tuple(DTYPES))] = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: Annotated[str, OneOf(DEVICES)] = "cpu"
    backend: Annotated[str, OneOf(BACKENDS)] = "torch"
    repeats: PositiveInt = 30
    warmup: NaturalNumber = 5

    def __post_init__(self) -> None:
        check_values(self)
        if self.backend == "torch":
            return
        for name in ("channels_last", "compile"):
            if getattr(self, name):
                raise UserError(
                    f"backend {self.backend}: networks run as they are; leave {name} out"
                )
        if self.backend == "tensorrt" and self.device == "cpu":
            raise UserError("backend tensorrt: runs on a GPU alone: device cuda")
        allowed = ("fp32", "fp16") if self.device == "cuda" else ("fp32",)
        if self.dtype not in allowed:
            raise UserError(
                f"backend {self.backend} on {self.device}: precision must be "
                f"{' or '.join(allowed)}, not {self.dtype}"
            )

    def check_here(self) -> None:
        """Check that this machine has what it takes.

        Raises:
            UserError: no such device, or a package is missing.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
        if self.runtime is not None:
            self.runtime.check_packages()

    @property
    def runtime(self) -> Runtime | None:
        """Where the backend is not PyTorch: what runs networks in its place."""
        if self.backend == "torch":
            return None
        return Runtime(self.backend, self.device, self.threads)


@dataclass(frozen=True)
class Timing:
    """How long forward passes of one network took.

    Attributes:
        seconds: of every timed pass over a batch, in the order they ran.
    """

    seconds: list[float]

    @property
    def median(self) -> float:
        """Median, in seconds per batch."""
        return statistics.median(self.seconds)

    @property
    def low(self) -> float:
        """Lower quartile, in seconds per batch."""
        return self._quantile(0.25)

    @property
    def high(self) -> float:
        """Upper quartile, in seconds per batch."""
        return self._quantile(0.75)

    def _quantile(self, share: float) -> float:
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(share).item()


def measure(
    networks: Mapping[str, nn.Module],
    settings: LatencySettings,
    *,
    example_input: Tensor | None = None,
) -> dict[str, Timing]:
    """Time forward passes of several networks that take turns.

    In every round each network runs once, in the given order, so that whatever else the machine
    does hits all of them alike. What is timed are copies in evaluation mode, under
    ``torch.inference_mode``; on a GPU a pass ends when its last kernel has. The first pass of
    each network, which with ``settings.compile`` compiles it, is not timed.

    Args:
        networks: networks by name, any device and dtype; left alone.
        settings: the conditions.
        example_input: images (N, channels, height, width) for all networks, repeated or cut to
            the batch; by default random ones of the shape of
            :func:`tpp.models.architecture.image_shape_for`.

    Returns:
        For every name its times, in seconds per batch.

    Raises:
        UserError: there is no such device, or a network does not run under these conditions.
    """
    settings.check_here()
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with threads_of(settings.threads), _room_to_compile(settings):
        runs = {
            name: _first_run(name, network, settings, example_input)
            for name, network in networks.items()
        }
        for turn in range(settings.warmup + settings.repeats):
            for name, run in runs.items():
                taken = run()
                if turn >= settings.warmup:
                    seconds[name].append(taken)
    return {name: Timing(taken) for name, taken in seconds.items()}


@contextmanager
def threads_of(number: int | None) -> Iterator[None]:
    """Let PyTorch have so many threads on the CPU; None for those that it has."""
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _room_to_compile(settings: LatencySettings) -> Iterator[None]:
    """Let any number of networks be compiled side by side.

    Networks of one class share their code, and beyond 8 versions of it torch.compile would run
    the others uncompiled.
    """
    with ExitStack() as stack:
        if settings.compile:
            import torch._dynamo

            limits: dict[str, Any] = {
                "recompile_limit": 2**16,
                "accumulated_recompile_limit": 2**16,
            }
            stack.enter_context(torch._dynamo.config.patch(limits))
        yield


def _first_run(
    name: str, network: nn.Module, settings: LatencySettings, example_input: Tensor | None
) -> Callable[[], float]:
    """Run a copy of a network once; what runs it again and returns the seconds it took."""
    images = _images(network, settings, example_input)
    try:
        timed = _timed(network, settings, images)
        run = functools.partial(_seconds, timed, gpu=settings.device == "cuda")
        run()
    except _RUN_ERRORS as error:
        shape = "x".join(map(str, images.shape))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        how = f"{settings.dtype}{', compiled,' if settings.compile else ''} on {settings.device}"
        if settings.backend != "torch":
            how = f"{settings.backend}, {how}"
        raise UserError(f"{name}: does not run in {how} on images of {shape}: {reason}") from None
    return run


def _images(network: nn.Module, settings: LatencySettings, example_input: Tensor | None) -> Tensor:
    if example_input is None:
        shape = settings.batch, *example_input_for(network).shape[1:]
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    else:
        images = example_input[torch.arange(settings.batch) % len(example_input)]
    images = images.detach().to(settings.device, DTYPES[settings.dtype])
    return images.contiguous(memory_format=memory_format(settings))


def _timed(network: nn.Module, settings: LatencySettings, images: Tensor) -> Callable[[], Any]:
    """What is timed."""
    if settings.runtime is None:
        return functools.partial(_timed_copy(network, settings), images)
    copied = plain_copy(network).eval().to("cpu", DTYPES[settings.dtype])
    return session_of(copied, images.cpu(), settings.runtime)


def _timed_copy(network: nn.Module, settings: LatencySettings) -> Callable[[Tensor], Any]:
    timed = plain_copy(network).eval().to(settings.device, DTYPES[settings.dtype])
    timed = timed.to(memory_format=memory_format(settings))
    # Without dynamic=False a second batch size would be compiled for any batch, not its own.
    return torch.compile(timed, dynamic=False) if settings.compile else timed


def memory_format(settings: LatencySettings) -> torch.memory_format:
    """Of weights and images with channels."""
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def _seconds(run: Callable[[], Any], gpu: bool) -> float:
    """Time one pass from an idle device to an idle device."""
    with torch.inference_mode():
        _wait_for(gpu)
        started = time.perf_counter()
        run()
        _wait_for(gpu)
        return time.perf_counter() - started


def _wait_for(gpu: bool) -> None:
    if gpu:
        torch.cuda.synchronize()


def in_words(architecture: Architecture) -> str:
    """A network in one line: name, what comes out, and arguments."""
    args = "".join(f", {key}={value}" for key, value in architecture.args.items())
    return f"{architecture.name}, {architecture.output}{args}"


def machine_of(settings: LatencySettings) -> dict[str, Any]:
    """What the times depend on besides the settings, ready for JSON."""
    runtime = {} if settings.runtime is None else settings.runtime.versions()
    return {
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": settings.threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "torch": torch.__version__,
        **runtime,
    }


def _processor() -> str:
    """The processor's name as Linux has it, such as ``AMD EPYC 9654 96-Core Processor``."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    said = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(said, None) or platform.machine()
