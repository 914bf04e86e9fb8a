"""What only a GPU can show, in parts that resume where they stopped.

trajectory  the regularised stage on the CPU and on the GPU from the same weights and batches, in
            float32: how far losses and weights are apart after each step
captured    ResNet-56 in TPP's regularised stage by our loop, each step computed and each replayed
            from a CUDA graph (training.capture), from the same weights and batches: how far the
            weights are apart in the end, and steps per second of both, in turn
step        our training loop beside a bare one, torchvision's and timm's, as in benchmarks.step:
            ResNet-56, ResNet-34 and ResNet-50 (batch 256, channels last), fp32 and bf16, eager,
            compiled and, the small one, captured. Target for ResNet-50 in bf16 on an H100: 2,760
            images/s, which is what NVIDIA publishes for its PyTorch code
penalty     a training step of ResNet-50 at 2.31x, batch 256, bf16, with and without the penalty,
            in turn: the penalty's share of the step (target: 1%) and of its memory; and the
            textbook way
latency     ResNet-50 at 1.49x, 2.31x, 2.56x and 3.06x, and with filters kept in multiples of 8,
            beside the dense network: batch 1 and 64, bf16 and fp32, channels last; how much of the
            counted speedup arrives
resnet56    the PR 0.9 column of the paper's Table 1: dense, TPP, L1 and GReg-1 by the published
            schedules in full, three seeds; ``--data`` is CIFAR-10's train/ and test/

Results are written to benchmarks/results/gpu.json as they come, and what has one is skipped. After
``--minutes`` the parts step and resnet56 stop; the next call goes on (resnet56 with what it has in
``--work``). ``--device cpu --tiny`` tries the script where there is no GPU.
"""

import copy
import itertools
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import loops, resnet56
from benchmarks.penalty import textbook_penalty
from benchmarks.step import loop_settings
from tpp.channels.removal import prune_model
from tpp.common.command_line import Parser
from tpp.common.errors import UserError, run_command
from tpp.common.options import share
from tpp.common.paths import user_path
from tpp.latency import arriving_share
from tpp.measure.counts import count
from tpp.measure.timing import LatencySettings, measure
from tpp.methods.base import TrainingContext
from tpp.methods.tpp import TPP
from tpp.methods.tpp import Settings as TPPSettings
from tpp.models.architecture import build_model, example_input_for
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule
from tpp.selection.selection import Selection, select_filters
from train.config.config import load_config
from train.config.optimizer import OptimizerSection
from train.distributed.accelerator import make_engine
from train.loop.bad_steps import StepCheck
from train.loop.graphs import CudaGraphs, Recorder
from train.loop.loop import LoopSettings, train
from train.loop.optim import make_optimizer
from train.tasks.classification import Classification

RESULTS = Path(__file__).parent / "results" / "gpu.json"
CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "imagenet"
SPEEDUPS = ("1.49x", "2.31x", "2.56x", "3.06x")

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
        before: what the part has found already, where it was not complete.
    """

    device: torch.device
    tiny: bool = False
    data: Path | None = None
    work: Path = Path("runs/gpu")
    minutes: float = 7.0
    before: Result = field(default_factory=dict)


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


def captured(options: Options) -> Result:
    """Replay the steps of a regularised stage, beside computing each; on the CPU both compute."""
    device, tiny = options.device, options.tiny
    name, batch, steps = ("cifar_resnet8", 8, 6) if tiny else ("cifar_resnet56", 128, 300)
    torch.manual_seed(0)
    dense = build_model(name, 10).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(batch, 3, 32, 32, device=device)
    batches = itertools.repeat((images, torch.randint(0, 10, (batch,), device=device)))
    recorders = {
        "computed": None,
        "replayed": CudaGraphs(device) if device.type == "cuda" else None,
    }
    seconds: dict[str, list[float]] = {way: [] for way in recorders}
    weights: dict[str, Tensor] = {}
    for turn in range(1 if tiny else 4):
        for way, recorder in recorders.items():
            model = copy.deepcopy(dense)
            times = _regularized_by_the_loop(model, batches, steps, recorder)
            weights[way] = torch.cat([p.detach().flatten().cpu() for p in model.parameters()])
            if turn or tiny:
                seconds[way].append(times)
    medians = {way: statistics.median(times) for way, times in seconds.items()}
    apart = (weights["computed"] - weights["replayed"]).norm() / weights["computed"].norm()
    return {
        "network": name,
        "batch": batch,
        "weights_relative_difference": apart.item(),
        "images_per_second": {way: batch / each for way, each in medians.items()},
        "ratio": medians["computed"] / medians["replayed"],
    }


def _regularized_by_the_loop(
    model: nn.Module, batches: Iterator[Any], steps: int, recorder: Recorder | None
) -> float:
    """Train; returns the seconds of a step in the second half, by when all is recorded."""
    device = next(model.parameters()).device
    selection = Selection({"layer*.conv1": 0.5})
    plan = selection.select(model, example_input=example_input_for(model))
    method = TPP(TPPSettings(delta=1e-3, update_interval=1))
    method.prepare(
        model, TrainingContext("regularize", plan, selection, 0, 1, example_input_for(model))
    )
    accelerator = loops.make_accelerator(device.type, "bf16" if device.type == "cuda" else "fp32")
    started = 0.0

    def on_step(step: int) -> bool:
        nonlocal started
        if step == steps // 2:
            started = _now(device)
        return False

    train(
        make_engine(accelerator, model, make_optimizer(model, OptimizerSection(lr=1e-3))),
        batches,
        Classification(Classification.settings_type()),
        method,
        LoopSettings(
            lr=lambda step: 1e-3 * (1 - step / steps),
            finished=lambda step: step >= steps,
            recorder=recorder,
        ),
        check=StepCheck(model, max_norm=None, at_once=False),
        on_bad_step=loops.refuse,
        on_report=lambda step, report: None,
        on_step=on_step,
    )
    return (_now(device) - started) / (steps - steps // 2)


def step(options: Options) -> Result:
    """Our loop beside others, in one setting after the other until the time is up."""
    settings = loop_settings(options.device.type, None, tiny=options.tiny)
    if options.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    found: dict[str, Result] = dict(options.before.get("settings", {}))
    deadline = time.monotonic() + 60 * options.minutes
    for setting in settings:
        if setting.name not in found and time.monotonic() < deadline:
            found[setting.name] = loops.measure(setting)
    return {
        "complete": len(found) == len(settings),
        "settings": found,
        "compiling": loops.gains_of_compiling(found),
    }


def penalty(options: Options) -> Result:
    """Time a training step with and without the penalty, in turn."""
    device, tiny = options.device, options.tiny
    batch, side, pairs = (2, 64, 2) if tiny else (256, 224, 30)
    torch.manual_seed(0)
    model = build_model("resnet50", 1000).to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    plan = select_filters(model, _ratios("2.31x"), example_input=example_input_for(model))
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
    for name in SPEEDUPS:
        for multiple in (1, 8):
            plan = select_filters(dense, _ratios(name), round_to=multiple)
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
        return resnet56.run(
            data, options.work, minutes=options.minutes, seeds=(0, 1), steps_limit=2
        )
    data = resnet56.load_or_refuse(options.data, options.device)
    return resnet56.run(data, options.work, minutes=options.minutes, seeds=(0, 1, 2))


def _ratios(speedup: str) -> dict[str, float]:
    """The pruning ratios of a published row of ResNet-50."""
    return load_config(CONFIGS / f"resnet50_tpp_{speedup}.yaml").pruning.ratios


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


PARTS: dict[str, Callable[[Options], Result]] = {
    "trajectory": trajectory,
    "captured": captured,
    "step": step,
    "penalty": penalty,
    "latency": latency,
    "resnet56": resnet56_column,
}


def main() -> None:
    """Run the parts that have no result yet."""
    parser = Parser.of_script(
        "python -m benchmarks.gpu",
        __doc__,
        ["--device cpu --tiny --output /tmp/gpu.json", "--data /data/cifar10"],
    )
    share(parser, "--parts", default=",".join(PARTS))
    parser.add_argument("--again", action="store_true", help="run parts that have a result")
    share(parser, "--device", default="cuda")
    share(parser, "--tiny")
    share(parser, "--output", default=RESULTS)
    share(parser, "--data", ", in train/ and test/ of CIFAR-10")
    parser.add_argument(
        "--work", type=user_path, default=Options.work, metavar="DIR", help="kept between calls"
    )
    parser.add_argument(
        "--minutes", type=float, default=Options.minutes, metavar="N", help="then save and stop"
    )
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
        before = {} if arguments.again else done.get(name, {})
        if before.get("complete", bool(before)):
            print(f"{name}: done before")
            continue
        done[name] = {
            **PARTS[name](replace(options, before=before)),
            "on": _machine(options.device),
        }
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(done, indent=1) + "\n")
        print(f"{name}: {json.dumps(done[name])}")


def _machine(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": name, "torch": torch.__version__}


if __name__ == "__main__":
    run_command(main)
