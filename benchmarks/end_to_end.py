"""From photos on the disk to trained steps: what of the slower of loader and step arrives.

loader      batches of training images alone, as the ImageNet recipe augments them
step        our training loop alone, on a batch that is there
end to end  our training loop on the loader's batches

In turn, each for a number of batches; a figure is the median over the turns, and the ratio is that
of end to end over the slower of the two others. Target: 0.95. Batches that a loader has made while
another one had its turn are not timed.

FOLDER has a folder of photos for each class; by default photos of 500 x 375 pixels are made.
Without --network there are two rows: ResNet-50, where the step is the slower one, and a network
that is small enough for the loader to be.

On a GPU the loader has the processor to itself. On the CPU, where both want the same cores, half of
them are for each, alone as well as together: PyTorch's threads (--threads) and the loader's
(--loader-threads). Results go to benchmarks/results/end_to_end.json.
"""

import contextlib
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.loops import OURS, Result, Setting, contestants, our_loop
from benchmarks.step import make_photos
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from data_pipelines.images.order import Steps
from data_pipelines.loaders import resolve_loader, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, run_command
from tpp.common.options import share

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
TARGET = 0.95


def measure(index: ImageIndex, setting: Setting, threads: int) -> Result:
    """Time loader, step and both in turn.

    Args:
        index: the photos.
        setting: what is trained; ``steps`` are timed in a turn.
        threads: of the loader.

    Returns:
        images per second of each, what of the slower one arrives, and the share of the time that
        the loop waits for images.
    """
    on_gpu = setting.device == "cuda"
    settings = LoaderSettings(
        resolve_loader("auto"),
        threads,
        torch.device(setting.device),
        # As in a run, see train.data.
        dtype=torch.float16 if on_gpu and setting.precision != "fp32" else torch.float32,
        channels_last=True,
    )
    transform = ImageTransform(
        image_size=setting.side,
        resize=None,
        augmentation="imagenet",
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )
    # torchvision's workers each make batches ahead.
    ahead = settings.prefetch * threads + 1
    in_turn = ahead + setting.steps
    batches = (setting.turns + 1) * in_turn + ahead
    contestant = contestants(setting, (OURS,))[OURS]
    loop = our_loop(contestant)
    wait: Callable[[], Any] = torch.cuda.synchronize if on_gpu else lambda: None

    with contextlib.ExitStack() as opened:

        def stream() -> Iterator[Any]:
            made = train_batches(
                index,
                transform,
                training_order(index, 0),
                Steps(setting.batch, 1, 0, batches),
                settings,
            )
            return opened.enter_context(contextlib.closing(made))

        alone, fed = stream(), stream()
        same = itertools.repeat((contestant.images, contestant.labels))
        waits = []

        def train_on(source: Iterator[Any]) -> float:
            started = 0.0

            def on_step(step: int) -> bool:
                nonlocal started
                if step == ahead:
                    wait()
                    started = time.perf_counter()
                return False

            report = loop(source, in_turn, on_step)
            wait()
            taken = time.perf_counter() - started
            if source is fed:
                waits.append(report.data_wait)
            return taken

        def load() -> float:
            for _ in range(ahead):
                next(alone)
            wait()
            started = time.perf_counter()
            for _ in range(setting.steps):
                next(alone)
            wait()
            return time.perf_counter() - started

        ways: dict[str, Callable[[], float]] = {
            "loader": load,
            "step": lambda: train_on(same),
            "end_to_end": lambda: train_on(fed),
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(setting.turns + 1):
            for name, way in ways.items():
                taken[name].append(way())
                if name != "step":
                    # The loader goes on until it is as far ahead as it may be.
                    time.sleep(2 * ahead * taken["loader"][-1] / setting.steps)
    images = setting.steps * setting.batch
    # The first turn warms up.
    rates = {name: images / statistics.median(times[1:]) for name, times in taken.items()}
    return {
        "images_per_second": rates,
        "of_the_slower": rates["end_to_end"] / min(rates["loader"], rates["step"]),
        "data_wait": statistics.median(waits[1:]),
    }


def default_settings(device: str, precision: str, turns: int) -> list[Setting]:
    """One where the step is the slower one, and one where the loader is."""
    if device == "cuda":
        of_step = Setting("resnet50", 1000, 224, 256, 20, turns, device, precision)
        return [of_step, replace(of_step, network="resnet18")]
    of_step = Setting("resnet50", 1000, 224, 8, 2, turns, device, precision)
    return [of_step, replace(of_step, network="cifar_resnet8", side=96, batch=64, steps=4)]


def _show(rows: dict[str, Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    table = Table(title="images/s", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("loader", "step", "end to end", f"of the slower (>= {TARGET})", "waits"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        rates = [f"{rate:,.1f}" for rate in row["images_per_second"].values()]
        table.add_row(name, *rates, f"{row['of_the_slower']:.3f}", f"{row['data_wait']:.1%}")
    console.print(table)


def main() -> None:
    """Measure the rows and write them down."""
    cores = len(os.sched_getaffinity(0))
    parser = Parser.of_script(
        "python -m benchmarks.end_to_end",
        __doc__,
        [
            "--tiny --output /tmp/end_to_end.json",
            "--device cuda --precision bf16 --data /data/imagenet/val",
        ],
    )
    share(parser, "--data")
    share(parser, "--device", default="cpu")
    share(parser, "--precision", choices=("fp32", "bf16"), default="bf16")
    share(parser, "--model", " of one row (default: two rows)")
    share(parser, "--image-size", ", of --model", default=224)
    share(parser, "--batch-size", ", of --model", default=16)
    share(parser, "--threads", ", of PyTorch (default: on the CPU half of the cores)")
    add = parser.add_argument
    add(
        "--loader-threads",
        type=at_least_one,
        metavar="N",
        help="of the loader (default: on the CPU the other half, else all)",
    )
    add("--turns", type=at_least_one, default=5, metavar="N", help="of each (default: 5)")
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    parser.renamed("--side", "--image-size")
    parser.renamed("--folder", "--data")
    parser.renamed("--network", "--model")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
    if device == "cuda":
        torch.backends.cudnn.benchmark = True
    half = max(cores // 2, 1)
    torch.set_num_threads(arguments.threads or (half if device == "cpu" else cores))
    loader_threads = arguments.loader_threads or (
        max(cores - half, 1) if device == "cpu" else cores
    )
    settings = default_settings(device, arguments.precision, arguments.turns)
    if arguments.model:
        settings = [
            replace(
                settings[0],
                network=arguments.model,
                side=arguments.image_size,
                batch=arguments.batch_size,
            )
        ]
    if tiny:
        settings = [Setting("cifar_resnet8", 1000, 32, 2, 1, 1, device, arguments.precision)]
    rows = {}
    with tempfile.TemporaryDirectory() as made:
        if arguments.data is None:
            make_photos(Path(made), 8 if tiny else 256)
        index = scan_class_folders(arguments.data or Path(made))
        for setting in settings:
            name = f"{setting.network}, {setting.side} pixels, batch {setting.batch}"
            print(f"measuring {name} ...", file=sys.stderr)
            rows[name] = measure(index, setting, loader_threads)
    results = {
        "rows": rows,
        "on": {
            "machine": platform.machine(),
            "cores": cores,
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "torch": torch.__version__,
            "loader": resolve_loader("auto"),
            "threads": torch.get_num_threads(),
            "loader_threads": loader_threads,
            "precision": arguments.precision,
            "photos": len(index),
            "made": arguments.data is None,
        },
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")
    _show(rows)


if __name__ == "__main__":
    run_command(main)
