"""How fast networks run: ``python -m tpp.latency CHECKPOINT [CHECKPOINT ...]``.

Counted multiply-accumulates say how much less there is to do; this says how much less time it
takes. Every pruned network is measured beside the dense one that it came from.
"""

import argparse
import copy
import functools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import Tensor, nn

from tpp.checkpoint import load_model
from tpp.describe import Counts, count, make_console
from tpp.errors import UserError, run_command
from tpp.files import write_whole
from tpp.models import Architecture, architecture_of, build_model, example_input_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DEVICES = ("cpu", "cuda")
# What networks raise for an input, a dtype or a device that they do not run with; whatever
# torch.compile raises is a RuntimeError.
_RUN_ERRORS = (RuntimeError, ValueError, TypeError, AssertionError, IndexError)


@dataclass(frozen=True)
class LatencySettings:
    """Under which conditions networks are timed.

    Attributes:
        batch: images per forward pass.
        threads: threads of PyTorch on the CPU; None leaves the number as it is.
        dtype: ``fp32``, ``bf16`` or ``fp16``; weights and images are converted, there is no
            autocast.
        channels_last: weights and images in channels-last memory order, else contiguous.
        compile: whether to run through ``torch.compile``.
        device: ``cpu`` or ``cuda``.
        repeats: timed runs of every network.
        warmup: rounds before them that are not timed, after a first run that never is.

    Raises:
        UserError: a value is none of these.
    """

    batch: int = 1
    threads: int | None = None
    dtype: str = "fp32"
    channels_last: bool = False
    compile: bool = False
    device: str = "cpu"
    repeats: int = 30
    warmup: int = 5

    def __post_init__(self) -> None:
        least = {"batch": 1, "threads": 1, "repeats": 1, "warmup": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is not None and value < lowest:
                raise UserError(f"{name} must be {lowest} or more, not {value}")
        for name, known in (("dtype", tuple(DTYPES)), ("device", DEVICES)):
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")


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
            the batch; by default random ones of the shape that each one's architecture expects.

    Returns:
        For every name its times, in seconds per batch.

    Raises:
        UserError: there is no such device, or a network does not run under these conditions.
    """
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    with _threads(settings.threads), _room_to_compile(settings):
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


def arriving_share(counted: float, real: float) -> float | None:
    """How much of a counted speedup arrives as a real one: (real - 1) / (counted - 1).

    1 where all of it does, negative where the smaller network is slower; None where nothing was
    to be expected, at a counted speedup of 1.
    """
    return None if counted == 1 else (real - 1) / (counted - 1)


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
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
        run = functools.partial(_seconds, _timed_copy(network, settings), images)
        run()
    except _RUN_ERRORS as error:
        shape = "x".join(map(str, images.shape))
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        how = f"{settings.dtype}{', compiled,' if settings.compile else ''} on {settings.device}"
        raise UserError(f"{name}: does not run in {how} on images of {shape}: {reason}") from None
    return run


def _images(network: nn.Module, settings: LatencySettings, example_input: Tensor | None) -> Tensor:
    if example_input is None:
        shape = settings.batch, *example_input_for(network).shape[1:]
        images = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    else:
        images = example_input[torch.arange(settings.batch) % len(example_input)]
    images = images.detach().to(settings.device, DTYPES[settings.dtype])
    return images.contiguous(memory_format=_memory_format(settings))


def _timed_copy(network: nn.Module, settings: LatencySettings) -> Callable[[Tensor], Any]:
    timed = copy.deepcopy(network).eval().to(settings.device, DTYPES[settings.dtype])
    timed = timed.to(memory_format=_memory_format(settings))
    # Without dynamic=False a second batch size would be compiled for any batch, not its own.
    return torch.compile(timed, dynamic=False) if settings.compile else timed


def _memory_format(settings: LatencySettings) -> torch.memory_format:
    return torch.channels_last if settings.channels_last else torch.contiguous_format


def _seconds(network: Callable[[Tensor], Any], images: Tensor) -> float:
    """Time one pass from an idle device to an idle device."""
    with torch.inference_mode():
        _wait_for(images.device)
        started = time.perf_counter()
        network(images)
        _wait_for(images.device)
        return time.perf_counter() - started


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True)
class _Network:
    """A network to measure, and the name of the dense one that it came from."""

    model: nn.Module
    counts: Counts
    dense: str


def _read_networks(paths: list[str]) -> dict[str, _Network]:
    """The networks of the checkpoints by row name, each architecture's dense one before them."""
    models = {path: load_model(path) for path in paths}
    architectures: dict[str, Architecture] = {}
    of_path: dict[str, list[str]] = {}
    for path, model in models.items():
        architecture = architecture_of(model)
        assert architecture is not None
        key = json.dumps(architecture.to_dict(), sort_keys=True)
        architectures[key] = architecture
        of_path.setdefault(key, []).append(path)
    networks = {}
    for key, architecture in architectures.items():
        dense = f"dense {_in_words(architecture) if len(architectures) > 1 else architecture.name}"
        model = build_model(architecture.name, architecture.num_classes, **architecture.args)
        networks[dense] = _Network(model, count(model), dense)
        for path in of_path[key]:
            networks[_row_name(path, paths)] = _Network(models[path], count(models[path]), dense)
    return networks


def _row_name(path: str, paths: list[str]) -> str:
    """A checkpoint's file name; its whole path where another has the same name."""
    name = Path(path).name
    taken = [Path(other).name for other in paths if other != path]
    return path if name in taken else name


def _in_words(architecture: Architecture) -> str:
    args = "".join(f", {key}={value}" for key, value in architecture.args.items())
    return f"{architecture.name}, {architecture.num_classes} classes{args}"


def _measure_rows(
    networks: Mapping[str, _Network], settings: LatencySettings
) -> list[dict[str, Any]]:
    """One row per network at one batch size, as it is written to JSON."""
    timings = measure({name: network.model for name, network in networks.items()}, settings)
    rows = []
    for name, network in networks.items():
        timing, dense = timings[name], networks[network.dense].counts
        counted = dense.macs / network.counts.macs
        real = timings[network.dense].median / timing.median
        rows.append(
            {
                "network": name,
                "dense": network.dense,
                "batch": settings.batch,
                "image": list(example_input_for(network.model).shape[1:]),
                "parameters": network.counts.parameters,
                "macs": network.counts.macs,
                "counted_speedup": counted,
                "median_ms": 1e3 * timing.median,
                "low_ms": 1e3 * timing.low,
                "high_ms": 1e3 * timing.high,
                "images_per_second": settings.batch / timing.median,
                "real_speedup": real,
                "arrives": arriving_share(counted, real),
                "seconds": timing.seconds,
            }
        )
    return rows


def _table(rows: list[dict[str, Any]], settings: LatencySettings) -> Table:
    title = f"batch {settings.batch}, {_conditions(settings)}, median of {settings.repeats}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left", title_style="bold")
    table.add_column("network", overflow="fold")
    headings = ("parameters", "MACs", "counted", "ms/batch", "quartiles", "images/s", "real")
    for heading in (*headings, "arrives"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            escape(row["network"]),
            f"{row['parameters']:,}",
            f"{row['macs'] / 1e6:,.1f} M",
            f"{row['counted_speedup']:.2f}x",
            _short(row["median_ms"]),
            f"{_short(row['low_ms'])} - {_short(row['high_ms'])}",
            _short(row["images_per_second"]),
            f"{row['real_speedup']:.2f}x",
            "" if row["arrives"] is None else f"{row['arrives']:.0%}",
            style=None if row["network"] == row["dense"] else "cyan",
        )
    return table


def _short(number: float) -> str:
    return f"{number:.3f}" if number < 10 else f"{number:,.1f}"


def _conditions(settings: LatencySettings) -> str:
    threads = settings.threads or torch.get_num_threads()
    where = f"{threads} thread{'s' if threads > 1 else ''}"
    if settings.device == "cuda":
        where = torch.cuda.get_device_name()
    order = "channels last" if settings.channels_last else "contiguous"
    return ", ".join([settings.dtype, order, "compiled" if settings.compile else "eager", where])


def machine_of(settings: LatencySettings) -> dict[str, Any]:
    """What the times depend on besides the settings, ready for JSON."""
    return {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": settings.threads or torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if settings.device == "cuda" else None,
        "torch": torch.__version__,
    }


def _batches(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--batch {text}: must be numbers of images, such as 1 or 1,16") from None


def _parse_arguments() -> argparse.Namespace:
    default = LatencySettings()
    parser = argparse.ArgumentParser(
        prog="python -m tpp.latency",
        description="Time pruned networks beside the dense ones that they came from, in turn, so "
        "that noise of the machine hits all alike. 'arrives' is how much of the speedup in "
        "multiply-accumulates is one in time: (real - 1) / (counted - 1).",
    )
    parser.add_argument(
        "checkpoints", nargs="+", metavar="CHECKPOINT", help="a file that tpp wrote"
    )
    parser.add_argument(
        "--batch", default=str(default.batch), metavar="N[,N]", help="images per pass (default 1)"
    )
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="threads of PyTorch on the CPU; where other work keeps a core busy, threads wait for "
        "each other, and one fewer than there are cores says more",
    )
    parser.add_argument(
        "--dtype",
        choices=list(DTYPES),
        default=default.dtype,
        help="what weights and images are converted to (no autocast; default fp32)",
    )
    parser.add_argument(
        "--channels-last", action="store_true", help="channels-last memory order, else contiguous"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="run through torch.compile; compiling can take minutes for each network and batch",
    )
    parser.add_argument("--device", choices=DEVICES, default=default.device, help="default cpu")
    parser.add_argument(
        "--repeats", type=int, default=default.repeats, metavar="N", help="timed passes of each"
    )
    parser.add_argument(
        "--warmup", type=int, default=default.warmup, metavar="N", help="untimed rounds before them"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results here as well")
    return parser.parse_args()


def main() -> None:
    """Command-line entry point."""
    arguments = _parse_arguments()
    options = dict(vars(arguments))
    paths, file, batches = options.pop("checkpoints"), options.pop("json"), options.pop("batch")
    each = [LatencySettings(**options, batch=batch) for batch in _batches(batches)]
    if file:
        _check_place(file)
    networks = _read_networks(paths)
    console = make_console()
    rows = []
    for settings in each:
        print(f"timing {len(networks)} networks at batch {settings.batch} ...", file=sys.stderr)
        of_batch = _measure_rows(networks, settings)
        console.print(_table(of_batch, settings), highlight=False)
        console.print()
        rows += of_batch
    if file:
        _write_json(file, rows, each[0])


def _check_place(path: Path) -> None:
    """Find out before the minutes of measuring that a file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--json {path}: cannot make the folder: {error.strerror}") from None
    if path.is_dir():
        raise UserError(f"--json {path}: is a folder; name a file")


def _write_json(path: Path, rows: list[dict[str, Any]], settings: LatencySettings) -> None:
    conditions = asdict(settings)
    del conditions["batch"]  # each row has its own
    content = {"settings": conditions, "on": machine_of(settings), "results": rows}
    try:
        write_whole(path, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"--json {path}: cannot write it: {error.strerror}") from None


if __name__ == "__main__":
    run_command(main)
