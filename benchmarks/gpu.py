"""What only a GPU can show, in parts that resume where they stopped.

    python -m benchmarks.gpu [--parts NAME,NAME] [--again] [--output FILE]

trajectory  the regularised stage on the CPU and on the GPU from the same weights and batches, in
            float32: how far losses and weights are apart after each step
penalty     a training step of ResNet-50 at 2.31x, batch 256, bf16, with and without the penalty,
            in turn: the penalty's share of the step

Each part's result is written to benchmarks/results/gpu.json as soon as it is there, and a part
that has one is skipped. ``--device cpu --tiny`` tries the script where there is no GPU.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpp.errors import UserError, run_command
from tpp.models import build_model, example_input_for
from tpp.plan import PruningPlan
from tpp.regularizer import Regularizer
from tpp.schedule import GrowthSchedule
from tpp.selection import select_filters

RESULTS = Path(__file__).parent / "results" / "gpu.json"
RATIOS_2_31X = {"layer[1-3]*conv[1-2]": 0.60, "layer4*conv[1-2]": 0.21}

Result = dict[str, Any]


def trajectory(device: torch.device, tiny: bool) -> Result:
    """Compare the CPU's and the device's trajectory over a regularised stage in float32."""
    steps, batch = (4, 8) if tiny else (20, 128)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    dense = build_model("cifar_resnet20", 10)
    plan = select_filters(dense, {"layer*.conv1": 0.5})
    batches = [
        (torch.randn(batch, 3, 32, 32), torch.randint(0, 10, (batch,))) for _ in range(steps)
    ]
    growth = GrowthSchedule(0.05, 1.0, 1, stabilize_steps=2000)
    runs = [
        _regularize(copy.deepcopy(dense), plan, growth, batches, torch.device(where))
        for where in ("cpu", device)
    ]
    (cpu_losses, cpu_weights), (losses, weights) = runs
    apart = [abs(a - b) / abs(a) for a, b in zip(cpu_losses, losses, strict=True)]
    difference = torch.cat([(a - b).flatten() for a, b in zip(cpu_weights, weights, strict=True)])
    length = torch.cat([weight.flatten() for weight in cpu_weights]).norm()
    return {
        "steps": steps,
        "loss_relative_difference_first": apart[0],
        "loss_relative_difference_last": apart[-1],
        "weights_relative_difference": (difference.norm() / length).item(),
    }


def _regularize(
    model: nn.Module,
    plan: PruningPlan,
    growth: GrowthSchedule,
    batches: list[tuple[Tensor, Tensor]],
    device: torch.device,
) -> tuple[list[float], list[Tensor]]:
    model.to(device)
    regularizer = Regularizer(model, plan, growth=growth)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9, weight_decay=5e-4)
    losses = []
    for step, (images, labels) in enumerate(batches):
        loss = F.cross_entropy(model(images.to(device)), labels.to(device))
        loss = loss + regularizer.penalty(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        regularizer.after_step(step)
        losses.append(loss.item())
    return losses, [parameter.detach().cpu() for parameter in model.parameters()]


def penalty(device: torch.device, tiny: bool) -> Result:
    """Time a training step with and without the penalty, in turn."""
    batch, side, pairs = (2, 64, 2) if tiny else (256, 224, 30)
    torch.manual_seed(0)
    model = build_model("resnet50", 1000).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = select_filters(model, RATIOS_2_31X, example_input=example_input_for(model))
    regularizer = Regularizer(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step(with_penalty: bool) -> float:
        started = _now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = F.cross_entropy(model(images), labels)
        if with_penalty:
            loss = loss + regularizer.penalty(10_000)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return _now(device) - started

    for _ in range(3 if not tiny else 1):
        step(True), step(False)
    pairs_of_times = [(step(True), step(False)) for _ in range(pairs)]
    return {
        "batch": batch,
        "step_ms": 1e3 * statistics.median(without for _, without in pairs_of_times),
        "step_with_penalty_ms": 1e3 * statistics.median(full for full, _ in pairs_of_times),
        "ratio": statistics.median(full / without for full, without in pairs_of_times),
    }


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS: dict[str, Callable[[torch.device, bool], Result]] = {
    "trajectory": trajectory,
    "penalty": penalty,
}


def main() -> None:
    """Run the parts that have no result yet."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {', '.join(PARTS)}")
    parser.add_argument("--again", action="store_true", help="run parts that have a result")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to try the script")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts.split(",") if name not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise UserError("no GPU here; to try the script: --device cpu --tiny --output FILE")
    device = torch.device(arguments.device)
    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.parts.split(","):
        if name in done and not arguments.again:
            print(f"{name}: done before")
            continue
        done[name] = {**PARTS[name](device, arguments.tiny), "on": _machine(device)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {json.dumps(done[name])}")


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__}


if __name__ == "__main__":
    run_command(main)
