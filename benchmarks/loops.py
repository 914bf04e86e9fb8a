"""Our training loop beside a bare one, and beside torchvision's and timm's, in turn on one batch.

All four train networks of the same weights, in the same precision and memory format, with the same
optimiser; compiled, all have ``torch.compile`` on the network. What differs is what a step does
besides:

ours         ``train.loop`` with engine, meter and check of each step, as in a stage: a seed, the
             learning rate, the gradient's norm, sums of loss and top-1; one report in 50 steps
bare         forward, loss, backward, optimiser
torchvision  the step of references/classification/train.py: top-1 and top-5, and each step reads
             loss and accuracies back from the device, for its metric logger
timm         the step of timm's train.py: each step reads the loss back, for its meters; timm's own
             utilities
"""

import contextlib
import copy
import itertools
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.nn import functional as F

from tpp.methods.base import Method, Settings
from tpp.models.architecture import build_model
from train.config.optimizer import OptimizerSection
from train.distributed.accelerator import make_engine
from train.loop.bad_steps import StepCheck
from train.loop.graphs import CudaGraphs
from train.loop.loop import LoopSettings, train
from train.loop.meter import Report
from train.loop.optim import make_optimizer
from train.tasks.classification import Classification

OURS = "ours"
LEARNING_RATE = 1e-4
Result = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What is trained, and how.

    Attributes:
        network: its name.
        classes: of it.
        side: of the images, in pixels.
        batch: images per step.
        steps: of each loop in a turn.
        turns: that are timed, after a first one.
        device: ``cpu`` or ``cuda``.
        precision: ``fp32`` or ``bf16`` autocast.
        compiled: whether the network is compiled.
        captured: whether our loop replays its steps from a CUDA graph, as no other one does.
    """

    network: str
    classes: int
    side: int
    batch: int
    steps: int
    turns: int
    device: str
    precision: str = "fp32"
    compiled: bool = False
    captured: bool = False

    @property
    def name(self) -> str:
        """As results have it."""
        return f"{self.network}, {self.precision}, {self.way}"

    @property
    def way(self) -> str:
        """How steps are made."""
        compiled = "compiled" if self.compiled else "eager"
        return f"{compiled}, captured" if self.captured else compiled

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """For forward passes."""
        lower = self.precision == "bf16"
        return torch.autocast(self.device, torch.bfloat16) if lower else contextlib.nullcontext()


@dataclass(frozen=True)
class Contestant:
    """A network and the batch that it is trained on, over and over."""

    setting: Setting
    network: nn.Module
    images: Tensor
    labels: Tensor

    def optimizer(self) -> torch.optim.Optimizer:
        """SGD with momentum and weight decay."""
        return make_optimizer(self.network, OptimizerSection(lr=LEARNING_RATE))


Step = Callable[[], None]


def bare(contestant: Contestant) -> Step:
    """Forward, loss, backward, and the optimiser."""
    network, optimizer = contestant.network, contestant.optimizer()

    def step() -> None:
        with contestant.setting.autocast():
            outputs = network(contestant.images)
        F.cross_entropy(outputs.float(), contestant.labels).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class _Smoothed:
    """What the reference's metric logger does with a value: a window, a sum and a count."""

    def __init__(self, window: int = 20) -> None:
        self._window: deque[float] = deque(maxlen=window)
        self._sum, self._count = 0.0, 0

    def update(self, value: float, n: int = 1) -> None:
        self._window.append(value)
        self._sum += value * n
        self._count += n


def torchvision_reference(contestant: Contestant) -> Step:
    """What ``train_one_epoch`` of references/classification/train.py does with a batch.

    Without its data loader, and without the line that it prints every few steps.
    """
    network, optimizer = contestant.network, contestant.optimizer()
    criterion = nn.CrossEntropyLoss()
    device = torch.device(contestant.setting.device)
    meters = {name: _Smoothed() for name in ("loss", "lr", "acc1", "acc5", "img/s")}

    def step() -> None:
        started = time.time()
        images, labels = contestant.images.to(device), contestant.labels.to(device)
        with contestant.setting.autocast():
            outputs = network(images)
            loss = criterion(outputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        top1, top5 = _accuracies(outputs, labels)
        meters["loss"].update(loss.item())
        meters["lr"].update(optimizer.param_groups[0]["lr"])
        meters["acc1"].update(top1.item(), n=len(images))
        meters["acc5"].update(top5.item(), n=len(images))
        meters["img/s"].update(len(images) / (time.time() - started))

    return step


def _accuracies(outputs: Tensor, labels: Tensor) -> list[Tensor]:
    """Top-1 and top-5 in per cent, as the reference finds them."""
    with torch.inference_mode():
        found = outputs.topk(5, dim=1).indices.t() == labels[None]
        share = 100.0 / len(labels)
        return [found[:k].flatten().sum(dtype=torch.float32) * share for k in (1, 5)]


def timm_script(contestant: Contestant) -> Step:
    """What ``train_one_epoch`` of timm's train.py does with a batch.

    Without its data loader, and without the line that it logs every 50 steps.
    """
    from timm.scheduler import CosineLRScheduler
    from timm.utils import AverageMeter

    network, optimizer = contestant.network, contestant.optimizer()
    device, loss_fn = torch.device(contestant.setting.device), nn.CrossEntropyLoss()
    # By epochs, as the script's default is; each step asks it nevertheless.
    scheduler = CosineLRScheduler(optimizer, t_initial=300)
    update_time, data_time, losses = AverageMeter(), AverageMeter(), AverageMeter()
    updates, asked = 0, time.time()

    def step() -> None:
        nonlocal updates, asked
        images, labels = contestant.images.to(device), contestant.labels.to(device)
        images = images.contiguous(memory_format=torch.channels_last)
        data_time.update(time.time() - asked)
        started = time.time()
        with contestant.setting.autocast():
            outputs = network(images)
            loss = loss_fn(outputs, labels)
        loss.backward(create_graph=False)
        optimizer.step()
        losses.update(loss.item(), images.size(0))
        updates += 1
        optimizer.zero_grad()
        update_time.update(time.time() - started)
        scheduler.step_update(num_updates=updates, metric=losses.avg)
        asked = time.time()

    return step


OTHERS: dict[str, Callable[[Contestant], Step]] = {
    "bare": bare,
    "torchvision": torchvision_reference,
    "timm": timm_script,
}


def our_loop(
    contestant: Contestant,
) -> Callable[[Iterator[Any], int, Callable[[int], bool]], Report]:
    """Training with ``train.loop``: call it with batches, a number of steps, and what comes after
    each step, as a stage's ``on_step``; it returns the last report.
    """
    network, setting = contestant.network, contestant.setting
    accelerator = make_accelerator(setting.device, setting.precision)
    engine = make_engine(accelerator, network, contestant.optimizer())
    task, method = Classification(Classification.settings_type()), Method(Settings())
    check = StepCheck(network, max_norm=None, at_once=False)

    def run(batches: Iterator[Any], steps: int, on_step: Callable[[int], bool]) -> Report:
        reports = []
        train(
            engine,
            batches,
            task,
            method,
            LoopSettings(
                lr=lambda step: LEARNING_RATE,
                finished=lambda step: step >= steps,
                recorder=CudaGraphs(torch.device(setting.device)) if setting.captured else None,
            ),
            check=check,
            on_bad_step=refuse,
            on_report=lambda step, report: reports.append(report),
            on_step=on_step,
        )
        return reports[-1]

    return run


def refuse(bad: Any) -> None:
    """No step of a benchmark may be bad."""
    raise RuntimeError(f"a bad step: {bad}")


def make_accelerator(device: str, precision: str) -> Accelerator:
    """A new one: by itself Accelerate keeps to the precision that it was first asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return Accelerator(
        cpu=device == "cpu",
        mixed_precision="bf16" if precision == "bf16" else "no",
        dynamo_backend=DynamoBackend.NO,
    )


def contestants(setting: Setting, names: Iterable[str] = (OURS, *OTHERS)) -> dict[str, Contestant]:
    """One for each loop, all of the same weights and images."""
    torch.manual_seed(0)
    network = build_model(setting.network, setting.classes).to(setting.device).train()
    network.to(memory_format=torch.channels_last)
    shape = setting.batch, 3, setting.side, setting.side
    images = torch.randn(shape).to(setting.device, memory_format=torch.channels_last)
    labels = torch.randint(0, setting.classes, (setting.batch,)).to(setting.device)
    found = {}
    for name in names:
        own = copy.deepcopy(network)
        if setting.compiled:
            own.compile()
        found[name] = Contestant(setting, own, images, labels)
    return found


def measure(setting: Setting) -> Result:
    """Time all loops in turn; ours goes on for the whole time, the others run after its turns.

    Returns:
        images per second of each, by the median of its turns, and how many times as fast as each
        other loop ours is.
    """
    if setting.compiled:
        torch.compiler.reset()  # what was compiled of other networks, and how often
    found = contestants(setting)
    others = {name: loop(found[name]) for name, loop in OTHERS.items()}
    wait = torch.cuda.synchronize if setting.device == "cuda" else lambda: None
    taken: dict[str, list[float]] = {name: [] for name in found}
    started = 0.0

    def on_step(step: int) -> bool:
        nonlocal started
        if step % setting.steps:
            return False
        wait()
        taken[OURS].append(time.perf_counter() - started)
        for name, one_step in others.items():
            started = time.perf_counter()
            for _ in range(setting.steps):
                one_step()
            wait()
            taken[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        return False

    batches = itertools.repeat((found[OURS].images, found[OURS].labels))
    ours = our_loop(found[OURS])
    started = time.perf_counter()
    ours(batches, setting.steps * (setting.turns + 1), on_step)
    # The first turn compiles, and makes the optimiser's state.
    images = setting.steps * setting.batch
    rates = {name: images / statistics.median(times[1:]) for name, times in taken.items()}
    return {
        "images_per_second": rates,
        "ours_beside": {name: rates[OURS] / rates[name] for name in OTHERS},
    }


def gains_of_compiling(results: dict[str, Result]) -> dict[str, Result]:
    """By network and precision, how many times as fast compiled loops are as eager ones."""
    gains = {}
    for name, row in results.items():
        compiled = results.get(name.removesuffix("eager") + "compiled")
        if name.endswith(", eager") and compiled is not None:
            before, after = row["images_per_second"], compiled["images_per_second"]
            gain = {loop: after[loop] / before[loop] for loop in before}
            of = name.removesuffix(", eager")
            gains[of] = {**gain, "ours_beside_bare": gain[OURS] / gain["bare"]}
    return gains
