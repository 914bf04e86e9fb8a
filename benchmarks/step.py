"""What a training step costs: our loop beside others, and each part of the recipe.

small   ResNet-20 on 32 x 32 images, batch 128, 10 classes
large   ResNet-50 on 224 x 224 images, batch 16 (on a GPU: 128), 1000 classes
loops   images per second of our loop beside a bare loop, torchvision's reference step and timm's
        (what a step does in each: benchmarks/loops.py): ResNet-56 on 32 x 32 images, ResNet-34 and
        ResNet-50 on 224 x 224, in fp32 and bf16, eager and compiled. On a GPU with 128, 256 and
        256 images, and ResNet-56 also with our steps captured; on the CPU with 64, 32 and 32.
        --batch-size says another number for ResNet-50.
        Targets: 0.98 of the bare loop, 1.0 of the two others, and compiling gains as much as in
        the bare loop
loader  images per second, not steps: the ImageNet augmentation at 224 pixels with TrivialAugment,
        with RandAugment, and at 176 pixels, beside the same without them, on photos made here

In "small" and "large" a plain step is forward and backward of cross entropy, and SGD with momentum,
on a batch that is there. The others have one thing more or another thing each: distillation (the
teacher is the same network), the weights' moving average, BCE, AdamW, LAMB, no weight decay of
norms and biases; and "recipe" has logits, average and groups at once.

All take turns, step by step, each with a network of its own; a figure is the median time of a plain
step over that of the other one, so that 0.8 is a fifth less throughput. In "loops" the figures are
ratios of medians over turns too. Nothing else should run meanwhile. --only NAME keeps to those
settings of "loops" that have it in their names, such as "resnet56, bf16". Results go to
benchmarks/results/step.json.
"""

import contextlib
import copy
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.loops import Setting, gains_of_compiling, measure
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import scan_class_folders
from data_pipelines.images.order import Steps
from data_pipelines.loaders import resolve_loader, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
from data_pipelines.settings import AugmentSection, RandAugment
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.models.architecture import build_model, example_input_for
from train.config.ema import EmaSection
from train.config.optimizer import OptimizerSection
from train.distillation.distillation import Distillation
from train.distillation.settings import DistillSection
from train.loop.average import WeightAverage
from train.loop.optim import make_optimizer
from train.tasks.classification import Classification

RESULTS = Path(__file__).parent / "results" / "step.json"
PARTS = ("small", "large", "loops", "loader")
PLAIN = "plain"
# That of public networks; how it is done costs the same whatever it is.
PREPROCESSING = {"channels": 3, "mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}

Result = dict[str, Any]


@dataclass(frozen=True)
class Kind:
    """A kind of step.

    Attributes:
        loss: of the task.
        optimizer: its settings.
        distill, ema: as in a stage.
    """

    loss: str = "cross_entropy"
    optimizer: OptimizerSection = field(default_factory=lambda: OptimizerSection(lr=1e-4))
    distill: DistillSection | None = None
    ema: EmaSection | None = None


_UNDECAYED = OptimizerSection(lr=1e-4, decay_norms_and_biases=False)
KINDS = {
    PLAIN: Kind(),
    "distillation, logits": Kind(distill=DistillSection()),
    "distillation, features": Kind(distill=DistillSection(kind="features")),
    "EMA": Kind(ema=EmaSection()),
    "BCE": Kind(loss="bce"),
    "AdamW": Kind(optimizer=OptimizerSection(name="adamw", lr=1e-4)),
    "LAMB": Kind(optimizer=OptimizerSection(name="lamb", lr=1e-4)),
    "no decay of norms": Kind(optimizer=_UNDECAYED),
    "recipe": Kind(optimizer=_UNDECAYED, distill=DistillSection(), ema=EmaSection()),
}


@dataclass(frozen=True)
class Setup:
    """What is measured and where.

    Attributes:
        network: its name.
        classes: of it.
        side: of the images, in pixels.
        batch: images per step.
        rounds: timed steps of each kind.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16`` autocast.
    """

    network: str
    classes: int
    side: int
    batch: int
    rounds: int
    device: str
    precision: str


def make_step(
    kind: Kind, student: nn.Module, teacher: nn.Module, setup: Setup
) -> Callable[[], Any]:
    """What makes one step of a kind with a network; the teacher may get hooks."""
    student.train()
    task = Classification(Classification.settings_type()).with_loss(kind.loss)
    optimizer = make_optimizer(student, kind.optimizer)
    average = WeightAverage(student, kind.ema) if kind.ema is not None else None
    distillation = None
    if kind.distill is not None:
        distillation = Distillation(
            kind.distill,
            student,
            teacher.eval().requires_grad_(False),
            example=example_input_for(student, side=setup.side),
            preprocessing=PREPROCESSING,
            key="distill",
        )
    shape = setup.batch, 3, setup.side, setup.side
    images = torch.randn(shape).to(setup.device, memory_format=torch.channels_last)
    labels = torch.randint(0, setup.classes, (setup.batch,)).to(setup.device)
    steps = 0

    def autocast() -> contextlib.AbstractContextManager[Any]:
        lower = setup.precision == "bf16"
        return torch.autocast(setup.device, torch.bfloat16) if lower else contextlib.nullcontext()

    def forward(inputs: Tensor) -> Tensor:
        with autocast():
            outputs: Tensor = student(inputs)
        return outputs.float()

    def step() -> None:
        nonlocal steps
        loss, outputs = task.loss(forward, (images, labels))
        if distillation is not None:
            with autocast():
                loss = distillation.task_share * loss + distillation.term(images, outputs)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps += 1
        if average is not None:
            average.update(steps)

    return step


def seconds_of(step: Callable[[], Any], device: str) -> float:
    """From an idle device to an idle device."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - started


def steps(setup: Setup, kinds: Mapping[str, Kind] = KINDS) -> Result:
    """Time steps of all kinds in turn."""
    torch.manual_seed(0)
    network = build_model(setup.network, setup.classes)
    network.to(setup.device)
    network.to(memory_format=torch.channels_last)
    made = {
        name: make_step(kind, copy.deepcopy(network), copy.deepcopy(network), setup)
        for name, kind in kinds.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(setup.rounds + 2):
        for name, step in made.items():
            seconds = seconds_of(step, setup.device)
            if turn > 1:  # the first ones make the optimiser's state and the first average
                taken[name].append(seconds)
    return _beside_plain({name: statistics.median(times) for name, times in taken.items()}, "step")


def _beside_plain(medians: Mapping[str, float], what: str) -> Result:
    return {
        name: {f"{what}_ms": 1e3 * seconds, "throughput": medians[PLAIN] / seconds}
        for name, seconds in medians.items()
    }


def loader(images: int, threads: int, rounds: int, batch: int) -> Result:
    """Time batches of training images in turn, of each way to augment them."""
    plain = AugmentSection()
    ways = {
        PLAIN: (224, plain),
        "TrivialAugment": (224, AugmentSection(trivial_augment=True)),
        "RandAugment": (224, AugmentSection(rand_augment=RandAugment())),
        "176 pixels": (176, plain),
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as open_loaders:
        make_photos(Path(folder), images)
        index = scan_class_folders(Path(folder))
        settings = LoaderSettings(resolve_loader("auto"), threads, torch.device("cpu"))
        transform = ImageTransform(
            image_size=224, resize=None, augmentation="imagenet", mean=(0.5,) * 3, std=(0.25,) * 3
        )
        per_round = max(1, images // batch)
        # What was made while the others had their turn is not timed; torchvision's workers each
        # make batches ahead.
        ahead = settings.prefetch * threads + 1
        streams = {
            name: open_loaders.enter_context(
                contextlib.closing(
                    train_batches(
                        index,
                        replace(transform, image_size=side, augment=augment),
                        training_order(index, 0),
                        Steps(batch, 1, 0, (rounds + 1) * (per_round + ahead)),
                        settings,
                    )
                )
            )
            for name, (side, augment) in ways.items()
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, stream in streams.items():
                for _ in range(ahead):
                    next(stream)
                started = time.perf_counter()
                for _ in range(per_round):
                    next(stream)
                each = (time.perf_counter() - started) / per_round
                time.sleep(2 * ahead * each)  # it goes on making batches until it is that far ahead
                if turn:
                    taken[name].append(each)
    return _beside_plain({name: statistics.median(times) for name, times in taken.items()}, "batch")


def make_photos(folder: Path, images: int) -> None:
    """Class folders of JPEG files of 500 x 375 pixels, smooth noise."""
    numbers = np.random.default_rng(0)
    for number in range(images):
        coarse = Image.fromarray(numbers.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        place = folder / f"class{number % 2}"
        place.mkdir(exist_ok=True)
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(
            place / f"{number}.jpg", quality=90
        )


def loop_settings(device: str, batch: int | None, *, tiny: bool = False) -> list[Setting]:
    """What the part "loops" measures, from the quickest on; ``batch`` is ResNet-50's."""
    on_gpu = device == "cuda"
    if tiny:
        networks = [Setting("cifar_resnet8", 10, 32, 2, 1, 1, device)]
    elif on_gpu:
        networks = [
            Setting("cifar_resnet56", 10, 32, 128, 50, 7, device),
            Setting("resnet34", 1000, 224, 256, 10, 7, device),
            Setting("resnet50", 1000, 224, batch or 256, 10, 7, device),
        ]
    else:
        networks = [
            Setting("cifar_resnet56", 10, 32, 64, 2, 7, device),
            Setting("resnet34", 1000, 224, 32, 1, 5, device),
            Setting("resnet50", 1000, 224, batch or 32, 1, 5, device),
        ]
    return [
        replace(network, precision=precision, compiled=compiled, captured=captured)
        for network in networks
        for precision in (("fp32",) if tiny else ("fp32", "bf16"))
        for compiled in (False, True)
        for captured in ((False, True) if on_gpu and network.side == 32 else (False,))
    ]


def loops(settings: list[Setting]) -> Result:
    """Measure each setting, and what compiling gains."""
    rows = {}
    for setting in settings:
        print(f"  {setting.name} ...", file=sys.stderr)
        rows[setting.name] = measure(setting)
    return {"settings": rows, "compiling": gains_of_compiling(rows)}


def _show_loops(results: Result, console: Console) -> None:
    table = Table(title="loops", title_justify="left", box=None, pad_edge=False)
    table.add_column("images/s")
    names = ("ours", "bare", "torchvision", "timm")
    for heading in (*names, *(f"ours / {name}" for name in names[1:])):
        table.add_column(heading, justify="right")
    for name, row in results["settings"].items():
        rates, ratios = row["images_per_second"], row["ours_beside"]
        figures = [f"{rates[loop]:,.1f}" for loop in names]
        table.add_row(name, *figures, *(f"{ratios[loop]:.3f}" for loop in names[1:]))
    console.print(table)
    for name, gains in results["compiling"].items():
        told = ", ".join(f"{loop} {gains[loop]:.2f}" for loop in names)
        console.print(f"compiled beside eager, {name}: {told}")
    console.print()


def _show(results: Mapping[str, Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for part, rows in results.items():
        if part == "loops":
            _show_loops(rows, console)
            continue
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for heading in ("ms", "throughput beside plain"):
            table.add_column(heading, justify="right")
        for name, row in rows.items():
            milliseconds = next(value for key, value in row.items() if key.endswith("_ms"))
            table.add_row(name, f"{milliseconds:,.1f}", f"{row['throughput']:.3f}")
        console.print(table)
        console.print()


def main() -> None:
    """Run the parts and write what they measured."""
    parser = Parser.of_script(
        "python -m benchmarks.step", __doc__, ["--tiny --parts small --output /tmp/step.json"]
    )
    share(parser, "--parts", default=",".join(PARTS))
    share(parser, "--device", default="cpu")
    share(parser, "--precision", choices=("fp32", "bf16"), default="bf16")
    share(parser, "--batch-size", ", in the part loops, of ResNet-50")
    parser.add_argument("--only", default="", metavar="NAME", help="settings of the part 'loops'")
    share(parser, "--threads", ", of PyTorch", default=torch.get_num_threads())
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    arguments = parser.parse_args()
    device, tiny = arguments.device, arguments.tiny
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
    torch.set_num_threads(arguments.threads)
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    on_gpu = device == "cuda"
    where = {"device": device, "precision": arguments.precision}
    small = Setup("cifar_resnet20", 10, 32, 128, 50 if on_gpu else 9, **where)
    large = Setup("resnet50", 1000, 224, 128 if on_gpu else 16, 30 if on_gpu else 3, **where)
    large = replace(large, batch=arguments.batch_size or large.batch)
    if tiny:
        small = replace(small, network="cifar_resnet8", batch=2, rounds=1)
        large = replace(large, network="resnet18", side=64, batch=2, rounds=1)
    settings = loop_settings(device, arguments.batch_size, tiny=tiny)
    settings = [setting for setting in settings if arguments.only in setting.name]
    if not settings:
        raise UserError(
            f"--only: no setting of the part 'loops' has {arguments.only!r} in its name"
        )
    if on_gpu:
        torch.backends.cudnn.benchmark = True
    todo: dict[str, Callable[[], Result]] = {
        "small": lambda: steps(small),
        "large": lambda: steps(large),
        "loops": lambda: loops(settings),
        "loader": lambda: (
            loader(8, 1, 1, 4) if tiny else loader(256, arguments.threads, rounds=9, batch=32)
        ),
    }
    output = arguments.output
    results = json.loads(output.read_text()) if output.exists() else {}
    for part in chosen:
        print(f"measuring {part} ...", file=sys.stderr)
        results[part] = todo[part]()
        results["on"] = {
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if on_gpu else None,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": arguments.precision,
            "batch": {"small": small.batch, "large": large.batch}
            | {setting.network: setting.batch for setting in settings},
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show({part: results[part] for part in chosen})


if __name__ == "__main__":
    run_command(main)
