"""What only a GPU can show, in parts that resume where they stopped.

    python -m benchmarks.gpu --data CIFAR10 [--parts NAME,NAME] [--again] [--output FILE]

trajectory  the regularised stage on the CPU and on the GPU from the same weights and batches, in
            float32: how far losses and weights are apart after each step
graph       the penalty replayed from a CUDA graph while weights and lambda change, against eager
penalty     a training step of ResNet-50 at 2.31x, batch 256, bf16, with and without the penalty,
            in turn: the penalty's share of the step and of its memory; and the textbook way
latency     ResNet-50 at 2.31x and 3.06x, and with filters kept in multiples of 32, beside
            the dense network: batch 1 and 64, bf16 and fp32, channels last; how much of the
            counted speedup arrives
resnet56    the PR 0.9 column of the paper's Table 1: dense, TPP, L1 and GReg-1 by the published
            schedules in full, on the folder ``--data`` with CIFAR-10's train/ and test/

Each part's result is written to benchmarks/results/gpu.json as soon as it is there, and a part
that has one is skipped. After ``--minutes`` resnet56 saves what it has in ``--work`` and stops;
the next call goes on. ``--device cpu --tiny`` tries the script where there is no GPU.
"""

import argparse
import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import resnet56
from benchmarks.penalty import textbook_penalty
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError, run_command
from tpp.common.paths import user_path
from tpp.latency import arriving_share
from tpp.measure.counts import count
from tpp.measure.timing import LatencySettings, measure
from tpp.models.architecture import build_model, example_input_for
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule
from tpp.selection.selection import select_filters

RESULTS = Path(__file__).parent / "results" / "gpu.json"
RATIOS_2_31X = {"layer[1-3]*conv[1-2]": 0.60, "layer4*conv[1-2]": 0.21}
RATIOS_3_06X = {"layer[1-3]*conv[1-2]": 0.68, "layer4*conv[1-2]": 0.50}

Result = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """Where and how the parts run.

    Attributes:
        device: CUDA, or the CPU to try the script.
        tiny: sizes for trying the script.
        data: folder with CIFAR-10.
        work: folder for what is resumed from.
        minutes: when to stop and save.
    """

    device: torch.device
    tiny: bool = False
    data: Path | None = None
    work: Path = Path("runs/gpu")
    minutes: float = 7.0


def trajectory(options: Options) -> Result:
    """Compare the CPU's and the device's trajectory over a regularised stage in float32."""
    device = options.device
    steps, batch = (4, 8) if options.tiny else (20, 128)
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


def graph(options: Options) -> Result:
    """Replay the penalty from a CUDA graph; on the CPU, which has none, call it again."""
    device = options.device
    torch.manual_seed(0)
    model = build_model("cifar_resnet20", 10).to(device)
    regularizer = Regularizer(model, select_filters(model, {"layer*.conv1": 0.5}))
    strength = torch.zeros((), device=device)

    def backward() -> Tensor:
        for parameter in model.parameters():
            parameter.grad = None
        terms = regularizer.penalty_terms_at(strength)
        value = terms["gram"] + terms["decay"]
        value.backward()
        return value

    def gradients() -> Tensor:
        found = [p.grad.flatten().clone() for p in model.parameters() if p.grad is not None]
        return torch.cat(found)

    value, replay = backward(), backward
    if device.type == "cuda":
        captured = torch.cuda.CUDAGraph()
        for parameter in model.parameters():
            parameter.grad = None
        with torch.cuda.graph(captured):
            value = backward()

        def replay() -> Tensor:
            captured.replay()
            return value

    worst = 0.0
    for turn in range(1, 6):
        strength.fill_(0.2 * turn)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        replayed, of_replay = replay().item(), gradients()
        kept = [parameter.grad for parameter in model.parameters()]
        eager, of_eager = backward().item(), gradients()
        for parameter, grad in zip(model.parameters(), kept, strict=True):
            parameter.grad = grad  # the graph writes into these
        worst = max(worst, abs(replayed / eager - 1))
        worst = max(worst, ((of_replay - of_eager).norm() / of_eager.norm()).item())
    return {"relative_difference": worst}


def penalty(options: Options) -> Result:
    """Time a training step with and without the penalty, in turn."""
    device, tiny = options.device, options.tiny
    batch, side, pairs = (2, 64, 2) if tiny else (256, 224, 30)
    torch.manual_seed(0)
    model = build_model("resnet50", 1000).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = select_filters(model, RATIOS_2_31X, example_input=example_input_for(model))
    regularizer = Regularizer(model, plan)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
    images = torch.randn(batch, 3, side, side, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 1000, (batch,), device=device)

    def step(extra: Callable[[], Tensor] | None) -> tuple[float, int]:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        started = _now(device)
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = F.cross_entropy(model(images), labels)
        if extra is not None:
            loss = loss + extra()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        taken = _now(device) - started
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
        return taken, peak

    ways: dict[str, Callable[[], Tensor] | None] = {
        "without": None,
        "ours": lambda: regularizer.penalty(10_000),
        "textbook": lambda: textbook_penalty(model, plan, 1.0),
    }
    found: dict[str, list[tuple[float, int]]] = {name: [] for name in ways}
    warm_up = 1 if tiny else 3
    for turn in range(warm_up + pairs):
        for name, extra in ways.items():
            # The textbook way launches thousands of kernels: a few turns tell.
            if name != "textbook" or turn < warm_up + 5:
                taken = step(extra)
                if turn >= warm_up:
                    found[name].append(taken)
    ratios = [a[0] / b[0] for a, b in zip(found["ours"], found["without"], strict=True)]
    times = {name: statistics.median(t for t, _ in taken) for name, taken in found.items()}
    peaks = {name: max(peak for _, peak in taken) for name, taken in found.items()}
    return {
        "batch": batch,
        "step_ms": 1e3 * times["without"],
        "step_with_penalty_ms": 1e3 * times["ours"],
        "ratio": statistics.median(ratios),
        "step_with_textbook_penalty_ms": 1e3 * times["textbook"],
        "peak_mib": peaks["without"] / 2**20,
        "peak_with_penalty_mib": peaks["ours"] / 2**20,
    }


def latency(options: Options) -> Result:
    """Time forward passes of pruned networks beside their dense one, in turn."""
    tiny = options.tiny
    torch.manual_seed(0)
    dense = build_model("resnet50", 1000)
    networks: dict[str, nn.Module] = {"dense": dense}
    for name, ratios in (("2.31x", RATIOS_2_31X), ("3.06x", RATIOS_3_06X)):
        for multiple in (1, 32):
            plan = select_filters(dense, ratios, round_to=multiple)
            networks[f"{name}, multiples of {multiple}"] = prune_model(dense, plan)
    macs = {name: count(network).macs for name, network in networks.items()}
    side = 64 if tiny else 224
    result: Result = {}
    # A CPU may have to emulate bf16, at a twentieth of its speed.
    dtypes = ("bf16", "fp32") if options.device.type == "cuda" else ("fp32",)
    for batch, dtype in itertools.product((1, 2) if tiny else (1, 64), dtypes):
        settings = LatencySettings(
            batch=batch,
            dtype=dtype,
            channels_last=True,
            device=options.device.type,
            repeats=2 if tiny else 50,
            warmup=1 if tiny else 10,
        )
        timings = measure(networks, settings, example_input=torch.rand(1, 3, side, side))
        for name, timing in timings.items():
            counted, real = macs["dense"] / macs[name], timings["dense"].median / timing.median
            result[f"{name}, batch {batch}, {dtype}"] = {
                "median_ms": 1e3 * timing.median,
                "counted_speedup": counted,
                "real_speedup": real,
                "arrives": arriving_share(counted, real),
            }
    return result


def resnet56_column(options: Options) -> Result:
    """The PR 0.9 column of Table 1, by the published schedules in full."""
    if options.tiny:
        data = resnet56.random_images(128, options.device)
        return resnet56.run(data, options.work, minutes=options.minutes, steps_limit=2)
    data = resnet56.load_or_refuse(options.data, options.device)
    return resnet56.run(data, options.work, minutes=options.minutes)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS: dict[str, Callable[[Options], Result]] = {
    "trajectory": trajectory,
    "graph": graph,
    "penalty": penalty,
    "latency": latency,
    "resnet56": resnet56_column,
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
    parser.add_argument("--output", type=user_path, default=RESULTS)
    parser.add_argument(
        "--data", type=user_path, help="CIFAR-10: train/ and test/ of class folders"
    )
    parser.add_argument("--work", type=user_path, default=Options.work, help="kept between calls")
    parser.add_argument("--minutes", type=float, default=Options.minutes, help="then save and stop")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.parts.split(",") if name not in PARTS]
    if unknown:
        raise UserError(f"--parts: no part {unknown[0]!r}; there are: {', '.join(PARTS)}")
    if arguments.device != "cpu" and not torch.cuda.is_available():
        raise UserError("no GPU here; to try the script: --device cpu --tiny --output FILE")
    options = Options(
        device=torch.device(arguments.device),
        tiny=arguments.tiny,
        data=arguments.data,
        work=arguments.work,
        minutes=arguments.minutes,
    )
    done = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.parts.split(","):
        if done.get(name, {}).get("complete", name in done) and not arguments.again:
            print(f"{name}: done before")
            continue
        done[name] = {**PARTS[name](options), "on": _machine(options.device)}
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {json.dumps(done[name])}")


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__}


if __name__ == "__main__":
    run_command(main)
