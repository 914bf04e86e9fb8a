"""What a regularised stage costs that removes its filters as soon as they are all at zero.

counted   multiply-adds of the whole published stage, task and penalty, beside one in which all
          filters stay to its end and the penalty of all layers is computed in every step
measured  the same from the medians of steps: of the dense network with the whole penalty, with
          that of half the layers, without any, and of the pruned network; SGD, all in turn
run       train/main.py's regularised stage of ResNet-20 on images made here, once with
          method.remove_at_zero=false and once as it is by default, in turn; its own wall time, and
          how far the weights of the two are apart

A ratio is that of the stage with removal over the one without; 0.79 is 21% fewer. Results go to
benchmarks/results/stage.json.
"""

import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.penalty import CONFIGS, RUNS
from benchmarks.step import seconds_of
from data_pipelines.demo import generate_demo
from data_pipelines.settings import DemoData
from tpp.channels.removal import prune_model
from tpp.checkpoints.model_file import read_checkpoint
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.measure.counts import count
from tpp.methods.base import Method
from tpp.models.architecture import build_model, build_on_meta
from tpp.models.layers import layer_sizes, prunable_layers
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule
from tpp.regularization.sharding import rank_costs
from tpp.selection.selection import select_filters
from train.config.config import Config, load_config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "stage.json"
PARTS = ("counted", "measured", "run")
# Forward pass, and gradients of activations and of weights.
PASSES = 3

Result = dict[str, Any]


def _stage(run: str) -> tuple[Config, Method, GrowthSchedule]:
    config = load_config(CONFIGS / f"{RUNS[run]}.yaml", ["model.checkpoint=null"])
    method = config.stage_method("regularize")
    return config, method, method.settings.growth


def turns(model: nn.Module, plan: PruningPlan, growth: GrowthSchedule) -> list[tuple[int, str]]:
    """After how many steps each layer of a plan is held at zero, in that order."""
    numbers = {layer: number for number, layer in enumerate(prunable_layers(model))}
    steps = ((growth.steps_until_zero(numbers[layer]), layer) for layer in plan.active_layers)
    return [(step, layer) for step, layer in steps if step is not None]


def counted(runs: list[str]) -> Result:
    """Multiply-adds of a whole stage on one rank, in 1e15."""
    result = {}
    for run in runs:
        config, method, growth = _stage(run)
        dense = _dense_on_meta(config)
        plan = select_filters(build_model(config.model.name, 1000), config.pruning.ratios)
        images = PASSES * config.training.batch_size
        dense_step = images * count(dense).macs
        small_step = images * count(prune_model(dense, plan)).macs
        total = growth.total_steps
        begins = growth.update_interval  # lambda is zero before, and nothing is computed
        before = total * dense_step + (total - begins) * _penalty(dense, plan, set())
        after, at, at_zero = 0, begins, set[str]()
        for step, layer in turns(dense, plan, growth):
            after += (step - at) * _penalty(dense, plan, at_zero)
            at = step
            at_zero.add(layer)
        removal = method.removes_after(dense, plan)
        assert removal == at
        after += removal * dense_step + (total - removal) * small_step
        result[run] = {
            "steps": total,
            "removal_at": removal,
            "before_1e15": before / 1e15,
            "after_1e15": after / 1e15,
            "ratio": after / before,
        }
    return result


def _penalty(model: nn.Module, plan: PruningPlan, at_zero: set[str]) -> int:
    """Multiply-adds per step of all layers but those that are held at zero."""
    left = {layer: [] if layer in at_zero else gone for layer, gone in plan.pruned.items()}
    sizes, groups = layer_sizes(model, plan)
    return sum(rank_costs(PruningPlan(plan.filters, left), sizes, 1, groups=groups))


def _dense_on_meta(config: Config) -> nn.Module:
    """The dense network of a configuration, without memory."""
    architecture = config.make_task().architecture(config.model)
    assert architecture is not None
    return build_on_meta(architecture)


def measured(
    runs: list[str], rounds: int, batch: int, side: int, device: str, precision: str
) -> Result:
    """Time steps in turn and add the stage up from their medians."""
    result = {}
    for run in runs:
        config, _, growth = _stage(run)
        torch.manual_seed(0)
        dense = build_model(config.model.name, 1000)
        plan = select_filters(dense, config.pruning.ratios)
        zeroed = turns(dense, plan, growth)
        with torch.no_grad():
            for layer in plan.active_layers:
                dense.get_parameter(f"{layer}.weight")[plan.pruned[layer]] = (
                    0  # so that no note is due
                )
        small = prune_model(dense, plan)
        images = torch.randn(batch, 3, side, side).to(device, memory_format=torch.channels_last)
        labels = torch.randint(0, 1000, (batch,)).to(device)
        for model in (dense, small):
            model.to(device)
            model.to(memory_format=torch.channels_last)
        regularizer = Regularizer(dense, plan, growth=growth)
        half = zeroed[len(zeroed) // 2][0]
        last = zeroed[-1][0]
        ways: dict[str, tuple[nn.Module, int | None]] = {
            "whole penalty": (dense, growth.growth_steps),
            "half of it": (dense, half),
            "no penalty": (dense, None),
            "pruned": (small, None),
        }
        optimizers = {
            id(model): torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
            for model in (dense, small)
        }
        taken: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, (model, step) in ways.items():
                if step is not None:
                    regularizer.before_step(step)
                penalised = regularizer if step is not None else None
                step_of = _step(model, optimizers[id(model)], images, labels, precision, penalised)
                seconds = seconds_of(step_of, device)
                if turn:
                    taken[name].append(seconds)
        median = {name: statistics.median(times) for name, times in taken.items()}
        begins, first, total = growth.update_interval, zeroed[0][0], growth.total_steps
        before = begins * median["no penalty"] + (total - begins) * median["whole penalty"]
        after = (
            begins * median["no penalty"]
            + (first - begins) * median["whole penalty"]
            + (last - first) * median["half of it"]
            + (total - last) * median["pruned"]
        )
        result[run] = {
            **{f"{name.replace(' ', '_')}_ms": 1e3 * value for name, value in median.items()},
            "ratio": after / before,
        }
    return result


def _step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    precision: str,
    regularizer: Regularizer | None,
) -> Callable[[], None]:
    def step() -> None:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
            outputs = model(images)
        loss = F.cross_entropy(outputs.float(), labels)
        if regularizer is not None:
            loss = loss + sum(regularizer.loss_terms().values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def run(network: str, rounds: int, steps: int) -> Result:
    """A real stage with and without removal, in turn; its wall time is the run's own figure."""
    taken: dict[str, list[float]] = {"stays": [], "removed": []}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        generate_demo(folder / "data", DemoData(classes=4, train_per_class=64, val_per_class=8))
        for turn in range(rounds):
            for name in taken:
                config = _small_run(folder, f"{name}{turn}", network, steps)
                if name == "stays":
                    config["method"]["remove_at_zero"] = False
                path = folder / f"{name}{turn}.yaml"
                path.write_text(yaml.safe_dump(config, sort_keys=False))
                command = [sys.executable, str(ROOT / "train" / "main.py"), "--config", str(path)]
                done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
                if done.returncode:
                    raise UserError(f"train/main.py ended with {done.returncode}: {done.stderr}")
                results = json.loads((folder / f"{name}{turn}" / "results.json").read_text())
                taken[name].append(results["stages"]["regularize"]["wall_seconds"])
        apart = _apart(*(folder / f"{name}0" / "prune" / "model.safetensors" for name in taken))
    stays, removed = (statistics.median(taken[name]) for name in ("stays", "removed"))
    return {
        network: {
            "stays_s": stays,
            "removed_s": removed,
            "ratio": removed / stays,
            "weights_apart": apart,
        }
    }


def _small_run(folder: Path, name: str, network: str, steps: int) -> dict[str, Any]:
    """A stage as the published ones of ImageNet are: 5/9 growth, and 40% after the last turn."""
    return {
        "name": name,
        "output": str(folder / name),
        "model": {"name": network},
        "data": {
            "root": str(folder / "data"),
            "augmentation": "cifar",
            "image_size": 32,
            "resize": None,
        },
        "training": {"batch_size": 64, "evaluate_every": 1000.0},
        "pruning": {"ratios": {"layer*.conv1": 0.7}},
        "method": {
            "delta": 2 / steps,
            "update_interval": 1,
            "stabilize_steps": steps // 2,
            "zero_out_interval": max(1, steps // 200),
        },
        "stages": {"regularize": {"optimizer": {"lr": 0.001}}, "prune": {}},
    }


def _apart(one: Path, other: Path) -> float:
    """Relative distance (L2) of all weights together."""
    mine, theirs = (read_checkpoint(path)[0] for path in (one, other))
    names = [name for name, tensor in mine.items() if tensor.is_floating_point()]
    a, b = (torch.cat([w[name].flatten() for name in names]) for w in (mine, theirs))
    return float((a - b).norm() / b.norm())


def _show(results: Mapping[str, Result]) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for part, rows in results.items():
        columns = list(next(iter(rows.values())))
        table = Table("", *[c.replace("_", " ") for c in columns], title=part, title_justify="left")
        for name, row in rows.items():
            table.add_row(name, *[_cell(column, row[column]) for column in columns])
        console.print(table)
        console.print()


def _cell(column: str, value: float) -> str:
    if column == "weights_apart":
        return f"{value:.1e}"
    if column in ("steps", "removal_at"):
        return f"{value:,}"
    return f"{value:.3f}" if column == "ratio" else f"{value:,.1f}"


def main() -> None:
    """Run the parts and write what they measured."""
    parser = Parser.of_script(
        "python -m benchmarks.stage", __doc__, ["--tiny --output /tmp/stage.json"]
    )
    share(parser, "--parts", default=",".join(PARTS))
    share(parser, "--device", default="cpu")
    share(parser, "--precision", choices=("fp32", "bf16"), default="fp32")
    share(parser, "--batch-size", ", in the part measured")
    share(parser, "--threads", ", of PyTorch", default=torch.get_num_threads())
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    parser.renamed("--batch", "--batch-size")
    arguments = parser.parse_args()
    device, tiny, output = arguments.device, arguments.tiny, arguments.output
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch finds no CUDA GPU on this machine; use cpu")
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    torch.set_num_threads(arguments.threads)
    batch = arguments.batch_size or (2 if tiny else 256 if device == "cuda" else 8)
    smallest = list(RUNS)[-1:]
    todo: dict[str, Callable[[], Result]] = {
        "counted": lambda: counted(smallest if tiny else list(RUNS)),
        "measured": lambda: measured(
            smallest if tiny else list(RUNS)[1:],
            1 if tiny else 30 if device == "cuda" else 5,
            batch,
            64 if tiny else 224,
            device,
            arguments.precision,
        ),
        "run": lambda: run("cifar_resnet8", 1, 20) if tiny else run("cifar_resnet20", 3, 300),
    }
    results = json.loads(output.read_text()) if output.exists() else {}
    for part in chosen:
        print(f"measuring {part} ...", file=sys.stderr)
        results[part] = todo[part]()
        results["on"] = {
            "machine": platform.machine(),
            "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "precision": arguments.precision,
            "batch": batch,
        }
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show({part: results[part] for part in chosen})


if __name__ == "__main__":
    run_command(main)
