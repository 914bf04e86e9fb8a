"""How long commands take to say something, beside `import torch`.

first_line  until the first line of output: train/main.py --dry-run on a tiny configuration (its
            output comes before that of a real run), a configuration with a mistake in it, and
            tpp.describe of a network of this project's and of one of torchvision's
help        until the first line of --help, for every command
first_step  train/main.py until its first step is done (ResNet-50, TPP; one image of 64 pixels per
            rank), on one rank and on 16 under torchrun, of a data set of 1,281,167 and 50,000
            images in an index made here; beside what no run can do without: the same number of
            processes that import PyTorch, open the index and load the first batch. Where there
            are fewer processors than ranks, both wait for these

All commands of the first two parts take turns with `import torch`, and each is ended at its first
line. Besides seconds there are those of the processor: on a machine with neighbours they vary less.
Ratios are of medians, to those of `import torch`; "with its compiler" is `import torch,
torch._dynamo`, which PyTorch imports by itself when a network is run without memory, or torchvision
imported. first_step goes by the clock, takes three rounds at most, and counts what is above the
loaders alone. Results go to benchmarks/results/startup.json.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.json"
PARTS = ("first_line", "help", "first_step")
TORCH = "import torch"
CODE = {TORCH: "import torch", "with its compiler": "import torch, torch._dynamo"}
MODULES = (
    *(f"tpp.{name}" for name in ("prune", "describe", "latency", "export")),
    *(f"train.{name}" for name in ("evaluate", "report", "sweep")),
    *(f"data_pipelines.{name}" for name in ("prepare", "index", "shards", "demo")),
    "launch.check",
)
NETWORKS = ("cifar_resnet56", "resnet50")
TINY = {
    "name": "tiny",
    "model": {"name": "cifar_resnet8", "num_classes": 4},
    "data": {"root": "nowhere", "augmentation": "cifar", "image_size": 32, "resize": None},
    "pruning": {"ratios": {"layer*.conv1": 0.5}},
    "method": {"name": "tpp", "zero_out_interval": 1},
    "stages": {"regularize": {"optimizer": {"lr": 0.01}}, "prune": {}},
}

IMAGES = {"train": 1_281_167, "val": 50_000}
CLASSES = 1000
STAGE = "regularize"
# What a run does before its first step, were there nothing but PyTorch and the loader.
LOADER = """
import os, sys, torch
from pathlib import Path
from data_pipelines.images.batch import LoaderSettings
from data_pipelines.images.image_index import open_images
from data_pipelines.images.order import Steps
from data_pipelines.loaders import resolve_loader, train_batches, training_order
from data_pipelines.loading.augment import ImageTransform
rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
index = open_images(Path(sys.argv[1], "train"))
transform = ImageTransform(
    image_size=64, resize=72, augmentation="imagenet", mean=(0.5,) * 3, std=(0.25,) * 3
)
settings = LoaderSettings(
    resolve_loader("auto"), 1, torch.device("cpu"), rank=rank, world_size=ranks
)
next(train_batches(index, transform, training_order(index, 0), Steps(ranks, 1, 0, 1), settings))
Path(sys.argv[2], f"{rank}").touch()
"""
_LONGEST = 600.0  # seconds that ranks may take

Result = dict[str, Any]
Commands = Mapping[str, Sequence[str]]


def first_line(arguments: Sequence[str]) -> tuple[str, float, float]:
    """Run Python until it has written a line, to stdout or to stderr, and end it.

    Returns:
        the line, and the seconds until then, of the clock and of the processor.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        seconds = time.perf_counter() - started
        with suppress(ProcessLookupError):
            os.kill(process.pid, 9)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return line, seconds, usage.ru_utime + usage.ru_stime


def _code(text: str) -> list[str]:
    return ["-c", f"{text}; print('here', flush=True)"]


def help_commands() -> Commands:
    """``--help`` of every command."""
    return {
        TORCH: _code(CODE[TORCH]),
        "train/main.py": ["train/main.py", "--help"],
        "tpp": ["-m", "tpp", "--help"],
        **{module: ["-m", module, "--help"] for module in MODULES},
    }


def first_line_commands(folder: Path) -> Commands:
    """What people wait for; the files that it needs are made in ``folder``."""
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "output": str(folder / "run")}))
    # In a process of its own: this one is to stay without PyTorch.
    make = (
        "import sys; from tpp import save_model; from tpp.models.architecture import build_model\n"
        "for name in sys.argv[2:]: save_model(f'{sys.argv[1]}/{name}', build_model(name, 10))"
    )
    subprocess.run([sys.executable, "-c", make, str(folder), *NETWORKS], cwd=ROOT, check=True)
    main = ["train/main.py", "--config", str(config)]
    return {
        **{name: _code(text) for name, text in CODE.items()},
        "train/main.py --dry-run": [*main, "--dry-run"],
        "train/main.py, a wrong key": [*main, "--dry-run", "trainin.seed=1"],
        **{
            f"tpp.describe, {name}": ["-m", "tpp.describe", str(folder / name)] for name in NETWORKS
        },
    }


def make_data(folder: Path, images: int, classes: int = CLASSES) -> None:
    """An index of a shard in which all images are the same photo; its bytes are there."""
    import io

    import numpy as np
    from PIL import Image

    from data_pipelines.images.image_index import INDEX_FILE, ImageIndex, save_index

    folder.mkdir(parents=True)
    noise = np.random.default_rng(0).integers(0, 256, (94, 125, 3), dtype=np.uint8)
    photo = io.BytesIO()
    Image.fromarray(noise).resize((500, 375)).save(photo, "JPEG", quality=90)
    shard = folder / "0.tar"
    shard.write_bytes(photo.getvalue())
    size, labels = shard.stat().st_size, np.arange(images) * classes // images
    names = [f"n{label:08d}/n{label:08d}_{number}.JPEG" for number, label in enumerate(labels)]
    index = ImageIndex.of(
        folder,
        names,
        labels,
        [f"n{label:08d}" for label in range(classes)],
        byte_sizes=np.full(images, size),
        sizes=np.tile(np.array([375, 500], np.int32), (images, 1)),
        containers=[shard.name],
        container=np.zeros(images, np.int32),
        offsets=np.zeros(images, np.int64),
        marks=np.array([size]),
    )
    save_index(index, folder / INDEX_FILE)


def _until(arguments: Sequence[str], ranks: int, there: Callable[[], bool]) -> float:
    """Start Python, on several ranks under torchrun, until something is there; the seconds."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            [sys.executable, *(launcher if ranks > 1 else []), *arguments],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            while not there():
                failed = process.poll() is not None and not there()
                if failed or time.perf_counter() - started > _LONGEST:
                    output.seek(0)
                    told = output.read().decode(errors="replace")[-2000:]
                    raise UserError(f"{' '.join(arguments)} on {ranks} ranks: {told}")
                time.sleep(0.005)
            return time.perf_counter() - started
        finally:
            process.terminate()  # the ranks are told by torchrun, and a run saves what it has
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def first_step(data: Path, folder: Path, ranks: int) -> tuple[float, float]:
    """Seconds until the first step of a run, and until the first batches of loaders alone.

    Args:
        data: see :func:`make_data`, with its parts.
        folder: a new one.
        ranks: processes.
    """
    arrived, run, code = folder / "arrived", folder / "run", folder / "loader.py"
    arrived.mkdir(parents=True)
    code.write_text(LOADER)
    config = {
        **TINY,
        "output": str(run),
        "model": {"name": "resnet50"},
        "data": {"root": str(data), "threads": 1, "image_size": 64, "resize": 72},
        "training": {"batch_size": ranks, "log_every": 1},
        "pruning": {"ratios": {"layer[1-3]*conv[1-2]": 0.5}},
        "method": {"name": "tpp"},
        "stages": {STAGE: {"optimizer": {"lr": 0.01}}, "prune": {}},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def logged() -> bool:
        with suppress(OSError):
            return any('"step": 1' in line for line in (run / "log.jsonl").open())
        return False

    loader = _until(
        [str(code), str(data), str(arrived)], ranks, lambda: len(list(arrived.iterdir())) == ranks
    )
    return _until(["train/main.py", "--config", str(folder / "run.yaml")], ranks, logged), loader


def first_steps(
    folder: Path, ranks: Sequence[int], rounds: int, images: Mapping[str, int], *, warm: bool
) -> Result:
    """A row for each number of ranks; runs and loaders take turns."""
    data = folder / "data"
    for part, number in images.items():
        make_data(data / part, number, min(CLASSES, *images.values()))
    rows: Result = {}
    for number in ranks:
        found = [
            first_step(data, folder / f"{number}-{turn}", number) for turn in range(-warm, rounds)
        ][warm:]
        steps, loaders = zip(*found, strict=True)
        rows[f"{number} rank{'s' if number > 1 else ''}"] = {
            "seconds": median(steps),
            "low": min(steps),
            "high": max(steps),
            "loader_seconds": median(loaders),
            "loader_low": min(loaders),
            "loader_high": max(loaders),
            "above": median(steps) - median(loaders),
        }
    return rows


def measured(commands: Commands, rounds: int, *, warm: bool = True) -> Result:
    """A row for each command; they take turns, first to bring files into memory if ``warm``."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    processor: dict[str, list[float]] = {name: [] for name in commands}
    lines = {}
    for number in range(-warm, rounds):
        for name, arguments in commands.items():
            lines[name], clock, used = first_line(arguments)
            if number >= 0:
                seconds[name].append(clock)
                processor[name].append(used)
    return {
        name: {
            "line": lines[name].rstrip(),
            "seconds": median(seconds[name]),
            "low": min(seconds[name]),
            "high": max(seconds[name]),
            "ratio": median(seconds[name]) / median(seconds[TORCH]),
            "processor_seconds": median(processor[name]),
            "processor_low": min(processor[name]),
            "processor_high": max(processor[name]),
            "processor_ratio": median(processor[name]) / median(processor[TORCH]),
        }
        for name in commands
    }


def _show(results: Mapping[str, Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    for part, rows in results.items():
        if part == "first_step":
            _show_first_steps(rows, console)
            continue
        table = Table(title=part, title_justify="left", box=None, pad_edge=False)
        table.add_column("")
        for heading in ("seconds", "lowest - highest", "ratio", "of the processor", "ratio"):
            table.add_column(heading, justify="right")
        for name, row in rows.items():
            table.add_row(
                name,
                f"{row['seconds']:.2f}",
                f"{row['low']:.2f} - {row['high']:.2f}",
                f"{row['ratio']:.2f}x",
                f"{row['processor_seconds']:.2f}",
                f"{row['processor_ratio']:.2f}x",
            )
        console.print(table)
        console.print()


def _show_first_steps(rows: Result, console: Console) -> None:
    table = Table(title="first_step", title_justify="left", box=None, pad_edge=False)
    table.add_column("")
    for heading in ("seconds", "lowest - highest", "loaders alone", "above"):
        table.add_column(heading, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            f"{row['seconds']:.2f}",
            f"{row['low']:.2f} - {row['high']:.2f}",
            f"{row['loader_seconds']:.2f}",
            f"{row['above']:.2f}",
        )
    console.print(table)


def main() -> None:
    """Measure the parts and write what came out."""
    parser = Parser.of_script(
        "python -m benchmarks.startup", __doc__, ["--tiny --parts help --output /tmp/startup.json"]
    )
    share(parser, "--parts", default=",".join(PARTS))
    share(parser, "--rounds", default=7)
    parser.add_argument(
        "--ranks", default="1,16", metavar="N,N", help="of first_step (default: %(default)s)"
    )
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--quick", "--tiny")
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    quick = arguments.tiny
    rounds = 1 if quick else arguments.rounds
    numbers = arguments.ranks.split(",")
    if not all(number.isdecimal() and 0 < int(number) <= 256 for number in numbers):
        raise UserError(f"--ranks {arguments.ranks}: must be numbers of ranks, such as 1,16")
    output = arguments.output
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            if part == "first_step":
                print(f"starting runs on {arguments.ranks} ranks ...", file=sys.stderr)
                results[part] = first_steps(
                    Path(folder),
                    [int(number) for number in numbers],
                    min(rounds, 3),
                    {"train": 100, "val": 50} if quick else IMAGES,
                    warm=not quick,
                )
                continue
            commands = help_commands() if part == "help" else first_line_commands(Path(folder))
            print(f"timing {len(commands)} commands, {rounds} times ...", file=sys.stderr)
            results[part] = measured(commands, rounds, warm=not quick)
            for row in results[part].values():  # where it was made is no result
                row["line"] = row["line"].replace(f"{folder}/", "")
    results["on"] = {
        "machine": platform.machine(),
        "processors": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": version("torch"),
        "torchvision": version("torchvision"),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(results, indent=1) + "\n")
    _show({part: results[part] for part in chosen})


if __name__ == "__main__":
    run_command(main)
