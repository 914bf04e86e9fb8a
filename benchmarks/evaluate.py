"""An evaluation as `tpp evaluate` does it, beside timm's validation.

ours   images from files through the loader (DALI, or torchvision where that is not installed or
       asked for), the network, and top-1, top-5 and loss summed up
timm   the loop of timm's validate.py, which is not in its package, of the parts that are: its data
       set, its loader (with its prefetcher on a GPU), its accuracy and AverageMeter

Both have one network with random weights, the same files, batches, precision, threads or workers,
and resize, crop, interpolation, mean and standard deviation. An evaluation is timed from opening
the files' list to the last figure, so it counts the start of workers. Both take turns; a figure is
the ratio of medians of images per second, ours over timm's, so that 1.0 is as fast; and seconds of
the processor, with those of workers that have ended. The figures that both find are compared:
decoders differ in single pixels. A small network shows the loader, a large one on a CPU itself.
Without --data, photos of 500 x 375 pixels are made here. Results go to
benchmarks/results/evaluate.json.
"""

import contextlib
import gc
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.step import make_photos
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.loaders import LOADERS, eval_batches, resolve_loader
from data_pipelines.loading.augment import ImageTransform
from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.models.architecture import build_model
from train.tasks.classification import Classification

RESULTS = Path(__file__).parent / "results" / "evaluate.json"
SIDES = ("ours", "timm")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Result = dict[str, Any]
# Top-1 and top-5 in percent, mean loss, images.
Figures = tuple[float, float, float, int]


@dataclass(frozen=True)
class Setup:
    """What both sides are given.

    Attributes:
        batch: images at once.
        threads: decoding threads (DALI) or workers (torchvision, timm).
        side, resize: of the crop, and of the shorter side before it, in pixels.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16`` autocast.
        loader: ours, resolved.
    """

    batch: int
    threads: int
    side: int
    resize: int
    device: str
    precision: str
    loader: str

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """In which the network runs."""
        lower = self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if lower else contextlib.nullcontext()


def ours(network: nn.Module, folder: Path, setup: Setup) -> Figures:
    """Evaluate as :mod:`train.evaluate` does."""
    device = torch.device(setup.device)
    transform = ImageTransform(
        image_size=setup.side, resize=setup.resize, augmentation="none", mean=MEAN, std=STD
    )
    batches = eval_batches(
        scan_class_folders(folder),
        transform,
        setup.batch,
        LoaderSettings(loader=setup.loader, threads=setup.threads, device=device),
    )

    def forward(images: Tensor) -> Tensor:
        with setup.autocast():
            outputs: Tensor = network(images)
        return outputs.float()

    task = Classification(Classification.settings_type())
    scores = task.evaluate(forward, batches, device=device)
    first, fifth, loss = (scores.values[metric.name] for metric in task.metrics)
    return first, fifth, loss, scores.images


def timms(network: nn.Module, folder: Path, setup: Setup) -> Figures:
    """Evaluate as timm's validate.py does."""
    from timm.data import create_dataset, create_loader
    from timm.utils import AverageMeter, accuracy

    on_gpu = setup.device == "cuda"
    batches = create_loader(
        create_dataset("", root=str(folder)),
        input_size=(3, setup.side, setup.side),
        batch_size=setup.batch,
        use_prefetcher=on_gpu,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        num_workers=setup.threads,
        crop_pct=setup.side / setup.resize,
        crop_mode="center",
        device=torch.device(setup.device),
    )
    criterion = nn.CrossEntropyLoss().to(setup.device)
    losses, top1, top5 = AverageMeter(), AverageMeter(), AverageMeter()
    with torch.inference_mode():
        for images, labels in batches:
            if not on_gpu:
                images, labels = images.to(setup.device), labels.to(setup.device)
            with setup.autocast():
                outputs = network(images)
                loss = criterion(outputs, labels)
            first, fifth = accuracy(outputs.detach(), labels, topk=(1, 5))
            losses.update(loss.item(), images.size(0))
            top1.update(first.item(), images.size(0))
            top5.update(fifth.item(), images.size(0))
    return top1.avg, top5.avg, losses.avg, top1.count


_RUN: dict[str, Callable[[nn.Module, Path, Setup], Figures]] = {"ours": ours, "timm": timms}


def measure(name: str, folder: Path, setup: Setup, rounds: int) -> Result:
    """Evaluate with both, in turn, after a round that is not counted.

    Returns:
        Of each side medians of images per second and of the processor's seconds, and its figures;
        and the ratio of the former.
    """
    torch.manual_seed(0)
    network = build_model(name, 1000).eval().to(setup.device)
    rates: dict[str, list[float]] = {side: [] for side in SIDES}
    processor: dict[str, list[float]] = {side: [] for side in SIDES}
    figures: dict[str, Figures] = {}
    for turn in range(rounds + 1):
        for side in SIDES:
            before, started = _processor_seconds(), time.perf_counter()
            figures[side] = _RUN[side](network, folder, setup)
            seconds = time.perf_counter() - started
            gc.collect()  # timm's workers end with its loader
            if turn:
                rates[side].append(figures[side][-1] / seconds)
                processor[side].append(_processor_seconds() - before)
    found: Result = {
        side: {
            "images_per_second": statistics.median(rates[side]),
            "low": min(rates[side]),
            "high": max(rates[side]),
            "processor_seconds": statistics.median(processor[side]),
            **dict(zip(("top1", "top5", "loss", "images"), figures[side], strict=True)),
        }
        for side in SIDES
    }
    return found | {
        "ratio": found["ours"]["images_per_second"] / found["timm"]["images_per_second"],
        "processor_ratio": found["timm"]["processor_seconds"] / found["ours"]["processor_seconds"],
    }


def _processor_seconds() -> float:
    """Of this process and of its children that have ended."""
    spent = os.times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def _show(results: Mapping[str, Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for heading in ("ours, images/s", "timm, images/s", "ratio", "of processor time", "loss"):
        table.add_column(heading, justify="right")
    for name, found in results.items():
        table.add_row(
            name,
            *(
                f"{found[side]['images_per_second']:,.1f} "
                f"({found[side]['low']:,.1f} - {found[side]['high']:,.1f})"
                for side in SIDES
            ),
            f"{found['ratio']:.3f}",
            f"{found['processor_ratio']:.3f}",
            " / ".join(f"{found[side]['loss']:.4f}" for side in SIDES),
        )
    console.print(table)


def main() -> None:
    """Measure each network and write what came out."""
    parser = Parser.of_script(
        "python -m benchmarks.evaluate",
        __doc__,
        [
            "--tiny --output /tmp/evaluate.json",
            "--device cuda --data /data/imagenet/val --batch-size 256",
        ],
    )
    add = parser.add_argument
    add(
        "--models",
        default="resnet50,timm:test_resnet",
        metavar="NAME,NAME",
        help="networks (default: %(default)s)",
    )
    share(parser, "--device", default="cpu")
    share(parser, "--precision", choices=("fp32", "bf16"), default="fp32")
    add(
        "--images",
        type=at_least_one,
        default=512,
        metavar="N",
        help="to make (default: %(default)s)",
    )
    share(parser, "--data", ", to take instead")
    share(parser, "--batch-size", default=64)
    share(parser, "--threads", ", or workers", default=2)
    share(parser, "--loader", ", ours", choices=LOADERS, default="auto")
    share(parser, "--rounds", default=5)
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    parser.renamed("--folder", "--data")
    parser.renamed("--networks", "--models")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
    if arguments.data is not None and not arguments.data.is_dir():
        raise UserError(f"--data {arguments.data}: no such folder")
    tiny = arguments.tiny
    setup = Setup(
        batch=4 if tiny else arguments.batch_size,
        threads=1 if tiny else arguments.threads,
        side=64 if tiny else 224,
        resize=72 if tiny else 256,
        device=arguments.device,
        precision=arguments.precision,
        loader=resolve_loader(arguments.loader),
    )
    networks = ["resnet18"] if tiny else arguments.models.split(",")
    rounds = 1 if tiny else arguments.rounds
    output = arguments.output
    results: dict[str, Result] = {}
    with tempfile.TemporaryDirectory() as made:
        folder = arguments.data or Path(made)
        if arguments.data is None:
            make_photos(folder, 10 if tiny else arguments.images)
        for name in networks:
            print(f"measuring {name} ...", file=sys.stderr)
            results[name] = measure(name, folder, setup, rounds)
    on = {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "gpu": torch.cuda.get_device_name() if arguments.device == "cuda" else None,
        "torch": torch.__version__,
        **asdict(setup),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({**results, "on": on}, indent=1) + "\n")
    _show(results)


if __name__ == "__main__":
    run_command(main)
