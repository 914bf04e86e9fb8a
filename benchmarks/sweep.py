"""Runs of a sweep side by side beside the same runs one after the other, in one go.

L1 at as many ratios as jobs, of a ResNet-20 on images that it makes; on the GPU, if there is one.
Each command is the whole of train.sweep, start-up included, and one follows the other in turn.
Targets: on two cores, two at once in at most 0.6 of the time; on a GPU, 8 at once at least 3 times
the throughput of one. What it finds goes to benchmarks/results/sweep.json.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import yaml

from tpp.common.command_line import Parser, at_least_one
from tpp.common.errors import UserError, run_command
from tpp.common.options import share

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "sweep.json"


def write_sweep(folder: Path, jobs: int, *, tiny: bool) -> Path:
    """A sweep of ``jobs`` runs from random weights, each some minutes of finetuning."""
    images, epochs = (32, 1) if tiny else (640, 5)
    run: dict[str, Any] = {
        "model": {"name": "cifar_resnet8" if tiny else "cifar_resnet20", "num_classes": 4},
        "data": {
            "root": str(folder / "data"),
            "demo": {"classes": 4, "train_per_class": images, "val_per_class": 16},
            "augmentation": "cifar",
            "image_size": 32,
            "resize": None,
        },
        "training": {"batch_size": 32 if tiny else 128, "evaluate_every": 100},
        "method": {"name": "l1"},
        "stages": {
            "prune": {},
            "finetune": {"epochs": epochs, "optimizer": {"lr": 0.01}},
            "evaluate": {},
        },
    }
    sweep = {
        "name": "sweep",
        "output": "unused",
        "methods": {"l1": "l1.yaml"},
        "ratios": {f"pr{i}": {"layer*.conv1": 0.3 + 0.4 * i / jobs} for i in range(jobs)},
        "finetuning": {"x": {}},
        "seeds": [0],
    }
    for name, content in (("l1.yaml", run), ("sweep.yaml", sweep)):
        (folder / name).write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "sweep.yaml"


def seconds(sweep: Path, output: Path, *options: str) -> float:
    """How long the command takes from its start to its end."""
    command = [sys.executable, "-m", "train.sweep", "--config", str(sweep)]
    began = time.perf_counter()
    done = subprocess.run(
        [*command, "--output", str(output), *options],
        cwd=sweep.parent,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {(done.stdout + done.stderr).strip()[-500:]}")
    return time.perf_counter() - began


def main() -> None:
    """Measure, print and write down."""
    gpu = torch.cuda.is_available()
    parser = Parser.of_script(
        "python -m benchmarks.sweep", __doc__, ["--tiny --output /tmp/sweep.json"]
    )
    share(parser, "--tiny")
    share(parser, "--jobs", default=8 if gpu else 2)
    parser.add_argument(
        "--repeats", type=at_least_one, default=3, metavar="N", help="of each (default: 3)"
    )
    share(parser, "--output", default=RESULTS)
    arguments = parser.parse_args()
    ways = {"one_by_one": (), "at_once": ("--jobs", str(arguments.jobs))}
    found: dict[str, list[float]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sweep = write_sweep(folder, arguments.jobs, tiny=arguments.tiny)
        seconds(sweep, folder / "first", "--only", "1")  # makes the images
        for repeat in range(1 if arguments.tiny else arguments.repeats):
            for way, options in ways.items():
                found[way].append(seconds(sweep, folder / f"{way}{repeat}", *options))
                print(f"{way}: {found[way][-1]:.1f} s", flush=True)
    medians = {way: statistics.median(times) for way, times in found.items()}
    ratio = medians["at_once"] / medians["one_by_one"]
    device = torch.cuda.get_device_name() if gpu else platform.processor() or platform.machine()
    results = {
        "jobs": arguments.jobs,
        "tiny": arguments.tiny,
        "device": device,
        "cores": len(os.sched_getaffinity(0)),
        "torch": torch.__version__,
        "seconds": found,
        "median": medians,
        "time_ratio": ratio,
        "throughput": 1 / ratio,
    }
    print(
        f"{arguments.jobs} runs at once: {ratio:.2f} of the time, {1 / ratio:.2f}x the throughput"
    )
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    run_command(main)
