"""What the penalty costs: beside the textbook way, on several ranks, and as a share of a step.

textbook  per step (forward and backward): the textbook way, ours on one rank, and the slowest
          rank's share of 2 and of 4, for ResNet-50 at its four published speedups and ResNet-34
share     a training step of ResNet-50 (float32, channels last, SGD) at batch 16 and 64, and the
          penalty's share of it on one rank, and on each of two
memory    peak of the tensors' memory in a step at batch 16, on one of two ranks, with and without
          the penalty

The textbook way is the one in the method's public implementations, written plainly: autograd over
the full gram matrix of every layer, and a second one as its target in which the rows and columns of
the pruned filters are set to zero one index at a time.

The ranks take turns in one process, each with the rank's own blocks: nothing is communicated for
the penalty, so what a rank computes is all that there is to measure. Times are medians; all sides
of a comparison take turns, step by step. Results go to benchmarks/results/penalty.json.
"""

import functools
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from tpp.common import options
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.selection.selection import select_filters
from train.config.config import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "imagenet"
RESULTS = Path(__file__).parent / "results" / "penalty.json"
RUNS = {
    "ResNet-50 1.49x": "resnet50_tpp_1.49x",
    "ResNet-50 2.31x": "resnet50_tpp_2.31x",
    "ResNet-50 2.56x": "resnet50_tpp_2.56x",
    "ResNet-50 3.06x": "resnet50_tpp_3.06x",
    "ResNet-34 1.32x": "resnet34_tpp_1.32x",
}
STEP = 10_000  # any step at which lambda is not zero

Result = dict[str, Any]


def textbook_penalty(
    model: nn.Module, plan: PruningPlan, strength: float, gram_weight: float = 1000.0
) -> Tensor:
    """The penalty of all layers the textbook way; the same value and gradient as ours.

    Filter decay and BatchNorm decay are a product with a mask per tensor.
    """
    device = next(model.parameters()).device
    total = torch.zeros((), device=device)
    for layer in plan.active_layers:
        weight = model.get_parameter(f"{layer}.weight")
        rows = weight.flatten(1)
        target = (rows @ rows.T).detach()
        for index in plan.pruned[layer]:
            target[index, :] = 0
            target[:, index] = 0
        total = total + gram_weight * strength * F.mse_loss(rows @ rows.T, target)
        mask = torch.zeros(len(rows), device=device)
        mask[plan.pruned[layer]] = 1
        total = total + strength / 2 * (rows.square().sum(1) * mask).sum()
        prefix, _, conv = layer.rpartition(".")
        norm = f"{prefix}.{conv.replace('conv', 'bn')}"
        for name in ("weight", "bias"):
            total = (
                total + strength / 2 * (model.get_parameter(f"{norm}.{name}").square() * mask).sum()
            )
    return total


def _model_and_plan(run: str) -> tuple[nn.Module, PruningPlan]:
    config = load_config(CONFIGS / f"{RUNS[run]}.yaml", ["model.checkpoint=null"])
    torch.manual_seed(0)
    model = build_model(config.model.name, 1000)
    model.to(memory_format=torch.channels_last)
    return model, select_filters(model, config.pruning.ratios)


def _seconds(model: nn.Module, make_loss: Callable[[], Tensor]) -> float:
    """Forward and backward of a loss, into fresh gradients."""
    model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    make_loss().backward()
    return time.perf_counter() - started


def _ranks(model: nn.Module, plan: PruningPlan, world_size: int) -> list[Regularizer]:
    return [
        Regularizer(model, plan, rank=rank, world_size=world_size) for rank in range(world_size)
    ]


def textbook(rounds: int, runs: list[str]) -> Result:
    """Time the textbook way and ours in turn."""
    result = {}
    for run in runs:
        model, plan = _model_and_plan(run)
        ways: dict[str, list[Callable[[], Tensor]]] = {
            "textbook": [functools.partial(textbook_penalty, model, plan, 1.0)]
        }
        for world_size in (1, 2, 4):
            ways[f"ranks_{world_size}"] = [
                functools.partial(regularizer.penalty, STEP)
                for regularizer in _ranks(model, plan, world_size)
            ]
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds + 1):
            for name, of_ranks in ways.items():
                slowest = max(_seconds(model, make_loss) for make_loss in of_ranks)
                if turn:  # the first one warms up
                    times[name].append(slowest)
        medians = {f"{name}_ms": 1e3 * statistics.median(taken) for name, taken in times.items()}
        faster = [a / b for a, b in zip(times["textbook"], times["ranks_1"], strict=True)]
        result[run] = {**medians, "times_faster": statistics.median(faster)}
    return result


def _training_step(model: nn.Module, batch: int, side: int) -> Callable[[], Tensor]:
    images = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,))
    return lambda: F.cross_entropy(model(images), labels)


def share(rounds: int, batches: list[int], side: int) -> Result:
    """Time steps, and the penalties of one rank and of two where they stand in the step.

    That is between the network's forward and backward pass, when memory is fullest. (The
    difference of two steps of seconds would drown a penalty of milliseconds in noise.)
    """
    model, plan = _model_and_plan("ResNet-50 2.31x")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    one, two = _ranks(model, plan, 1), _ranks(model, plan, 2)
    result = {}
    for batch in batches:
        task = _training_step(model, batch, side)
        steps, alone, halves = [], [], []
        for turn in range(rounds + 1):
            started = time.perf_counter()
            loss = task()
            penalty, *halves_now = (
                _seconds(model, functools.partial(rank.penalty, STEP)) for rank in (*one, *two)
            )
            model.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if turn:
                step_and_penalties = time.perf_counter() - started
                steps.append(step_and_penalties - penalty - sum(halves_now))
                alone.append(penalty)
                halves.append(max(halves_now))
        step = statistics.median(steps)
        result[f"batch {batch}"] = {
            "step_ms": 1e3 * step,
            "penalty_ms": 1e3 * statistics.median(alone),
            "share_of_step": statistics.median(alone) / step,
            "penalty_on_two_ranks_ms": 1e3 * statistics.median(halves),
            "share_of_step_on_two_ranks": statistics.median(halves) / step,
        }
    return result


def memory(batch: int, side: int) -> Result:
    """Peak of the tensors' memory in a step, with and without the penalty of one rank of two.

    Counted allocation by allocation: what the process takes from the system varies by more than
    the penalty from one run to the next.
    """
    model, plan = _model_and_plan("ResNet-50 2.31x")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=1e-4)
    task = _training_step(model, batch, side)
    peaks = []
    for penalties in ([], _ranks(model, plan, 2)[:1]):
        for recorded in (False, True):  # the first step allocates momentum and indices
            with profile(activities=[ProfilerActivity.CPU], profile_memory=recorded) as profiler:
                loss = task()
                for regularizer in penalties:
                    loss = loss + regularizer.penalty(STEP)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
        events = profiler.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        peaks.append(max(itertools.accumulate(change for _, change in changes)))
    kept = [*model.parameters(), *model.buffers()]
    kept += [state["momentum_buffer"] for state in optimizer.state.values()]
    held = sum(tensor.nbytes for tensor in kept)  # before, while and after the step
    without, with_penalty = (float(held + peak) / 2**20 for peak in peaks)
    return {
        f"batch {batch}, each of two ranks": {
            "peak_mib": without,
            "peak_with_penalty_mib": with_penalty,
            "more": with_penalty / without - 1,
        }
    }


def _show(results: Result) -> None:
    console = Console(width=None if sys.stdout.isatty() else 100, highlight=False)
    for part, rows in results.items():
        if part == "on":
            continue
        columns = list(next(iter(rows.values())))
        table = Table("", *[c.replace("_", " ") for c in columns], title=part, title_justify="left")
        for name, row in rows.items():
            table.add_row(name, *[_cell(column, row[column]) for column in columns])
        console.print(table)
        console.print()


def _cell(column: str, value: float) -> str:
    if column.startswith("share") or column == "more":
        return f"{100 * value:.2f} %"
    return f"{value:.1f}x" if column == "times_faster" else f"{value:,.1f}"


def main() -> None:
    """Run the parts and write what they measured."""
    parser = Parser.of_script(
        "python -m benchmarks.penalty", __doc__, ["--tiny --output /tmp/penalty.json"]
    )
    parts = ("textbook", "share", "memory")
    options.share(parser, "--parts", default=",".join(parts))
    options.share(parser, "--threads", ", of PyTorch", default=1)
    options.share(parser, "--tiny")
    options.share(parser, "--output", default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = arguments.parts.split(",")
    unknown = [part for part in chosen if part not in parts]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(parts)}")
    tiny = arguments.tiny
    todo: dict[str, Callable[[], Result]] = {
        "textbook": lambda: textbook(1, list(RUNS)[-1:]) if tiny else textbook(15, list(RUNS)),
        "share": lambda: share(1, [2], 64) if tiny else share(5, [16, 64], 224),
        "memory": lambda: memory(2, 64) if tiny else memory(16, 224),
    }
    output = arguments.output
    results = json.loads(output.read_text()) if output.exists() else {}
    for part in chosen:
        results[part] = todo[part]()
        on = {"machine": platform.machine(), "torch": torch.__version__}
        results["on"] = {**on, "threads": torch.get_num_threads()}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(results, indent=1) + "\n")
    _show({part: results[part] for part in chosen})


if __name__ == "__main__":
    run_command(main)
