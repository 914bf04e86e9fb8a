"""How long commands take to say something, beside `import torch`.

    python -m benchmarks.startup [--parts NAME,NAME] [--rounds N] [--quick] [--output FILE]

first_line  until the first line of output: train/main.py --dry-run on a tiny configuration (its
            output comes before that of a real run), a configuration with a mistake in it, and
            tpp.describe of a network of this project's and of one of torchvision's
help        until the first line of --help, for every command

All commands of a part take turns with `import torch`, and each is ended at its first line. Besides
seconds there are those of the processor: on a machine with neighbours they vary less. Ratios are
of medians, to those of `import torch`; "with its compiler" is `import torch, torch._dynamo`, which
PyTorch imports by itself when a network is run without memory, or torchvision imported. Results go
to benchmarks/results/startup.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from tpp.common.errors import UserError, run_command
from tpp.common.paths import user_path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "startup.json"
PARTS = ("first_line", "help")
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


def main() -> None:
    """Measure the parts and write what came out."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.startup",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--rounds", type=int, default=7, metavar="N", help="default 7")
    parser.add_argument("--quick", action="store_true", help="one round, to try the script")
    parser.add_argument("--output", type=user_path, default=RESULTS)
    arguments = parser.parse_args()
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if arguments.rounds < 1:
        raise UserError(f"--rounds {arguments.rounds}: must be 1 or more")
    rounds = 1 if arguments.quick else arguments.rounds
    output = arguments.output
    results = json.loads(output.read_text()) if output.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for part in chosen:
            commands = help_commands() if part == "help" else first_line_commands(Path(folder))
            print(f"timing {len(commands)} commands, {rounds} times ...", file=sys.stderr)
            results[part] = measured(commands, rounds, warm=not arguments.quick)
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
