"""ResNet-56 on CIFAR-10 at pruning ratio 0.9 by the published schedules, on one GPU in minutes.

Model, pruning, method, loop and every setting are those of train/main.py with the same
configurations (``configs/cifar10/resnet56_*_pr0.9.yaml``). The network is so small that a GPU waits
for its launches, so steps are captured (``training.capture``), and the images stay on the GPU: the
loader is this script's own.

Work is cut into stages that write their network when done, and a state to resume from when the
time is up.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from benchmarks.loops import make_accelerator, refuse
from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.methods.base import Method, Settings, TrainingContext
from tpp.models.architecture import build_model, example_input_for
from tpp.plan import PruningPlan
from tpp.selection.selection import select_filters
from train.config.config import Config, load_config
from train.config.optimizer import OptimizerSection
from train.distributed.accelerator import make_engine
from train.loop.bad_steps import StepCheck
from train.loop.graphs import CudaGraphs
from train.loop.loop import LoopSettings, train
from train.loop.optim import learning_rate, make_optimizer
from train.tasks.classification import Classification

CONFIGS = Path(__file__).resolve().parents[1] / "configs" / "cifar10"
METHODS = ("tpp", "l1", "greg1")
PADDING = 4  # pixels, of the random crop

Result = dict[str, Any]


@dataclass(frozen=True)
class Images:
    """A whole data set on the device.

    Attributes:
        train, test: (N, 3, 32, 32) uint8.
        train_labels, test_labels: (N,) int64.
    """

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def load_images(root: Path, device: torch.device) -> Images:
    """Decode the class folders below ``root/train`` and ``root/test``."""
    parts = []
    for split in ("train", "test"):
        index = scan_class_folders(root / split)
        with ThreadPoolExecutor(16) as pool:
            images = torch.stack(list(pool.map(_decode, _paths(index))))
        parts += [images.to(device), torch.as_tensor(index.labels).to(device)]
    return Images(*parts)


def _paths(index: ImageIndex) -> list[Path]:
    return [index.root / file for file in index.files]


def _decode(path: Path) -> Tensor:
    with Image.open(path) as image:
        return pil_to_tensor(image.convert("RGB"))


def random_images(count: int, device: torch.device) -> Images:
    """Noise in the place of images, to try the script."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    images, labels = images.to(device), labels.to(device)
    return Images(images, labels, images[:16], labels[:16])


class Trainer:
    """One network in training, by the loop of a run, with images that are on the device already.

    Args:
        model: on its device.
        method: of the stage, prepared.
        optim: of the configuration's stage.
        data: the images.
        config: mean, deviation, batch and seed.
        length: of the stage, in steps, for the learning rate.
    """

    def __init__(
        self,
        model: nn.Module,
        method: Method,
        optim: OptimizerSection,
        data: Images,
        config: Config,
        length: int,
    ) -> None:
        self.model, self.method, self.data, self.config = model, method, data, config
        self._device = data.train.device
        on_gpu = self._device.type == "cuda"
        accelerator = make_accelerator(self._device.type, "bf16" if on_gpu else "fp32")
        self.engine = make_engine(accelerator, model, make_optimizer(model, optim))
        self._recorder = CudaGraphs(self._device) if on_gpu else None
        self._optim, self._length = optim, length
        self._scale = torch.tensor([[config.data.mean], [config.data.std]], device=self._device)

    def train(self, start: int, last: int, deadline: float) -> int:
        """Train from step ``start`` to ``last``, or until the time is up; returns that step."""
        if time.monotonic() > deadline:
            return start
        late = False
        epochs_per_step = self.config.training.batch_size / len(self.data.train)
        epochs = self._length * epochs_per_step

        def on_step(step: int) -> bool:
            nonlocal late
            late = step % 200 == 0 and time.monotonic() > deadline
            return False

        return train(
            self.engine,
            self._batches(start),
            Classification(Classification.settings_type()),
            self.method,
            LoopSettings(
                lr=lambda step: learning_rate(self._optim, step * epochs_per_step, epochs),
                finished=lambda step: late or step >= last,
                seed=self.config.seed,
                recorder=self._recorder,
            ),
            check=StepCheck(self.model, max_norm=None, at_once=False),
            start_step=start,
            on_bad_step=refuse,
            on_report=lambda step, report: None,
            on_step=on_step,
        )

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top-1 on the test images, in per cent."""
        self.model.eval()
        correct = 0
        for start in range(0, len(self.data.test), 1000):
            images = self._normalise(self.data.test[start : start + 1000])
            predicted = self.engine.forward(images).argmax(1)
            correct += int((predicted == self.data.test_labels[start : start + 1000]).sum())
        return 100.0 * correct / len(self.data.test)

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._scale.view(2, 1, 3, 1, 1)
        images = (images.float() / 255 - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    def _batches(self, step: int) -> Iterator[tuple[Tensor, Tensor]]:
        """From a 0-based step on; each is a function of its step."""
        for number in itertools.count(step):
            yield self._batch(number)

    def _batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Random crops of the images padded with black, and flips, seeded by seed and step."""
        data, size, device = self.data, len(self.data.train), self._device
        batch = self.config.training.batch_size
        epoch, first = divmod(step * batch, size)
        order = torch.Generator(device).manual_seed(self.config.seed * 1_000_003 + epoch)
        permutation = torch.randperm(size, generator=order, device=device)
        chosen = permutation[torch.arange(first, first + batch, device=device) % size]
        random = torch.Generator(device).manual_seed(self.config.seed * 1_000_003 + step + 10**9)
        draw = torch.rand(3, batch, 1, generator=random, device=device)
        offsets = (draw[:2] * (2 * PADDING + 1)).long()
        pixels = torch.arange(32, device=device)
        rows, columns = offsets[0] + pixels, offsets[1] + pixels
        columns = torch.where(draw[2] < 0.5, columns.flip(1), columns)
        padded = F.pad(data.train[chosen], [PADDING] * 4)
        each = torch.arange(batch, device=device)[:, None, None]
        crops = padded.permute(0, 2, 3, 1)[each, rows[:, :, None], columns[:, None, :]]
        return self._normalise(crops.permute(0, 3, 1, 2)), data.train_labels[chosen]


def run(
    data: Images,
    folder: Path,
    *,
    minutes: float,
    seeds: Sequence[int] = (0,),
    steps_limit: int | None = None,
) -> Result:
    """Do what is not done yet of dense training, TPP, L1 and GReg-1, until the time is up.

    Args:
        data: CIFAR-10.
        folder: where networks and states are kept between calls.
        minutes: stop and save after so many.
        seeds: of the runs of each method, all from one dense network, as in table1.yaml.
        steps_limit: at most so many steps per stage, to try the script.

    Returns:
        By run its steps and top-1; ``complete`` says whether all are done, and ``top1`` is then
        mean and deviation over the seeds, by stage.
    """
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    runs: Result = {}
    todo = _stages(data, folder, seeds)
    for stage in todo:
        runs[stage.path.stem] = found = stage.run(deadline, steps_limit)
        if not found["done"]:
            return {"complete": False, "runs": runs}
    top1: dict[str, list[float]] = {}
    for stage in todo:
        top1.setdefault(stage.name, []).append(runs[stage.path.stem]["top1"])
    scores = {
        name: {"mean": statistics.mean(found), "std": statistics.pstdev(found)}
        for name, found in top1.items()
    }
    return {"complete": True, "runs": runs, "top1": scores}


def _stages(data: Images, folder: Path, seeds: Sequence[int]) -> list["_Stage"]:
    def stage(name: str, kind: str, seed: int, before: Path | None, file: str) -> _Stage:
        config = load_config(CONFIGS / file, [f"seed={seed}"])
        path = folder / (f"{name}_seed{seed}.pt" if before else f"{name}.pt")
        return _Stage(name, kind, config, before, data, path)

    dense = stage("dense", "dense", 0, None, "resnet56_dense.yaml")
    stages = [dense]
    for seed in seeds:
        for method in METHODS:
            file, before = f"resnet56_{method}_pr0.9.yaml", dense.path
            if method != "l1":
                stages.append(stage(f"{method}_regularize", "regularize", seed, before, file))
                before = stages[-1].path
            stages.append(stage(f"{method}_finetune", "finetune", seed, before, file))
    return stages


class _Stage:
    """One stage: from the network of the stage before to its own."""

    def __init__(
        self,
        name: str,
        kind: str,
        config: Config,
        before: Path | None,
        data: Images,
        path: Path,
    ) -> None:
        self.name, self.kind, self.config, self.data = name, kind, config, data
        self.before, self.path, self.state_path = before, path, path.with_suffix(".state.pt")

    def run(self, deadline: float, steps_limit: int | None) -> Result:
        """Train until done or until the time is up."""
        if self.path.exists():
            return {"done": True, **torch.load(self.path, weights_only=True)["result"]}
        device = self.data.train.device
        model, plan = self._network()
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optim = self.config.stages[self.kind].optimizer
        assert optim is not None
        method, steps = Method(Settings()), self._epoch_steps()
        if self.kind == "regularize":
            method = self.config.stage_method(self.kind)
            method.prepare(model, self._context(plan, example_input_for(model)))
            steps = method.steps() or 0
        trainer = Trainer(model, method, optim, self.data, self.config, steps)
        start = trainer.accuracy()
        step, seconds = 0, 0.0
        if self.state_path.exists():
            state = torch.load(self.state_path, weights_only=True)
            step, start, seconds = state["step"], state["start"], state["seconds"]
            model.load_state_dict(state["model"])
            trainer.engine.load_state_dict(state["optimizer"])
        last = min(steps, steps_limit or steps)
        began = time.monotonic()
        step = trainer.train(step, last, deadline)
        top1 = trainer.accuracy()
        seconds += time.monotonic() - began
        result = {"steps": step, "start_top1": start, "top1": top1, "seconds": seconds}
        if step < last:
            state = {"step": step, "start": start, "seconds": seconds, "model": model.state_dict()}
            _save({**state, "optimizer": trainer.engine.state_dict()}, self.state_path)
            return {"done": False, **result}
        _save({"model": model.state_dict(), "plan": plan.pruned, "result": result}, self.path)
        self.state_path.unlink(missing_ok=True)
        return {"done": True, **result}

    def _context(self, plan: PruningPlan, example: Tensor) -> TrainingContext:
        return TrainingContext(
            stage=self.kind,
            plan=plan,
            selection=self.config.selection(self.kind),
            rank=0,
            world_size=1,
            example_input=example,
        )

    def _epoch_steps(self) -> int:
        epochs = self.config.stages[self.kind].epochs or 0.0
        return -(-int(epochs * len(self.data.train)) // self.config.training.batch_size)

    def _network(self) -> tuple[nn.Module, PruningPlan]:
        torch.manual_seed(self.config.seed)
        model = build_model(self.config.model.name, 10)
        regularized_for = None
        if self.before is not None:
            found = torch.load(self.before, weights_only=True)
            model.load_state_dict(found["model"])
            regularized_for = found["plan"]
        plan = select_filters(model, self.config.pruning.ratios)
        if regularized_for:
            plan = PruningPlan(plan.filters, regularized_for)
        return (prune_model(model, plan) if self.kind == "finetune" else model), plan


def _save(state: dict[str, Any], path: Path) -> None:
    aside = path.with_suffix(".new")
    torch.save(state, aside)
    aside.replace(path)


def load_or_refuse(root: Path | None, device: torch.device) -> Images:
    """The images below ``--data``.

    Raises:
        UserError: none was given, or there are no class folders.
    """
    if root is None:
        raise UserError("resnet56: needs --data, a folder with CIFAR-10 as train/ and test/")
    return load_images(root, device)
