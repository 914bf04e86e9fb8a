"""ResNet-56 on CIFAR-10 at pruning ratio 0.9 by the published schedules, on one GPU in minutes.

The network is so small that a GPU waits for its launches; so forward and backward, the penalty
included, are captured once as a CUDA graph and replayed, and the images stay on the GPU. Model,
pruning, penalty and every setting are those that train/main.py uses with the same configurations
(``configs/cifar10/resnet56_*_pr0.9.yaml``); loader and loop are this script's own.

Work is cut into stages that write their network when done, and a state to resume from when the
time is up.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torchvision.transforms.v2.functional import pil_to_tensor

from data_pipelines.images.image_index import ImageIndex, scan_class_folders
from tpp.channels.removal import prune_model
from tpp.common.errors import UserError
from tpp.models.architecture import build_model
from tpp.plan import PruningPlan
from tpp.regularization.regularizer import Regularizer
from tpp.regularization.schedule import GrowthSchedule
from tpp.selection.selection import select_filters
from train.config.config import Config, load_config
from train.config.optimizer import OptimizerSection
from train.loop.optim import learning_rate, make_optimizer

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
    """One network in training, as a CUDA graph where there is CUDA.

    Args:
        model: on its device.
        optim: of the configuration's stage.
        data: the images.
        config: mean, deviation, batch and seed.
        penalty: added to the loss; called once for the graph.
    """

    def __init__(
        self,
        model: nn.Module,
        optim: OptimizerSection,
        data: Images,
        config: Config,
        penalty: Callable[[], Tensor] | None,
    ) -> None:
        self.model, self.data, self.config, self.penalty = model, data, config, penalty
        self.optimizer = make_optimizer(model, optim)
        device = data.train.device
        batch = config.training.batch_size
        self._scale = torch.tensor([[config.data.mean], [config.data.std]], device=device)
        self._images = torch.zeros(batch, 3, 32, 32, device=device).contiguous(
            memory_format=torch.channels_last
        )
        self._labels = torch.zeros(batch, dtype=torch.int64, device=device)
        self._graph = self._capture() if device.type == "cuda" else None

    def step(self, step: int, lr: float) -> None:
        """Optimiser step number ``step``, on a batch that is a function of it."""
        self._next_batch(step)
        if self._graph is not None:
            self._graph.replay()
        else:
            self._forward_backward()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        """Top-1 on the test images, in per cent."""
        self.model.eval()
        correct = 0
        for start in range(0, len(self.data.test), 1000):
            images = self._normalise(self.data.test[start : start + 1000])
            with self._autocast():
                predicted = self.model(images).argmax(1)
            correct += int((predicted == self.data.test_labels[start : start + 1000]).sum())
        self.model.train()
        return 100.0 * correct / len(self.data.test)

    def _autocast(self) -> torch.autocast:
        kind = self.data.train.device.type
        return torch.autocast(kind, dtype=torch.bfloat16, enabled=kind == "cuda")

    def _normalise(self, images: Tensor) -> Tensor:
        mean, std = self._scale.view(2, 1, 3, 1, 1)
        images = (images.float() / 255 - mean) / std
        return images.contiguous(memory_format=torch.channels_last)

    def _next_batch(self, step: int) -> None:
        """Random crop of the image padded with black, and flip, seeded by seed and step."""
        data, size = self.data, len(self.data.train)
        device = data.train.device
        batch = len(self._labels)
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
        self._images.copy_(self._normalise(crops.permute(0, 3, 1, 2)))
        self._labels.copy_(data.train_labels[chosen])

    def _forward_backward(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        with self._autocast():
            logits = self.model(self._images)
        loss = F.cross_entropy(logits.float(), self._labels)
        if self.penalty is not None:
            loss = loss + self.penalty()
        loss.backward()

    def _capture(self) -> torch.cuda.CUDAGraph:
        before = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # lets cuDNN choose and the indices reach the device
                self._forward_backward()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            self._forward_backward()
        self.model.load_state_dict(before)  # the BatchNorms have seen the warm-up
        return graph


def run(data: Images, folder: Path, *, minutes: float, steps_limit: int | None = None) -> Result:
    """Do what is not done yet of dense training, TPP, L1 and GReg-1, until the time is up.

    Args:
        data: CIFAR-10.
        folder: where networks and states are kept between calls.
        minutes: stop and save after so many.
        steps_limit: at most so many steps per stage, to try the script.

    Returns:
        Per stage its steps and top-1; ``complete`` says whether all are done.
    """
    deadline = time.monotonic() + 60 * minutes
    folder.mkdir(parents=True, exist_ok=True)
    result: Result = {}
    stages: list[tuple[str, str, str, str | None]] = [
        ("dense", "dense", "resnet56_dense.yaml", None)
    ]
    for method in METHODS:
        config_file, before = f"resnet56_{method}_pr0.9.yaml", "dense"
        if method != "l1":
            stages.append((f"{method}_regularize", "regularize", config_file, before))
            before = f"{method}_regularize"
        stages.append((f"{method}_finetune", "finetune", config_file, before))
    for name, kind, config_file, source in stages:
        stage = _Stage(name, kind, load_config(CONFIGS / config_file), source, data, folder)
        found = stage.run(deadline, steps_limit)
        result[name] = found
        if not found["done"]:
            break
    complete = len(result) == len(stages) and all(found["done"] for found in result.values())
    return {"complete": complete, "stages": result}


class _Stage:
    """One stage: from the network of the stage before to its own."""

    def __init__(
        self, name: str, kind: str, config: Config, before: str | None, data: Images, folder: Path
    ) -> None:
        self.name, self.kind, self.config, self.data = name, kind, config, data
        self.path, self.state_path = folder / f"{name}.pt", folder / f"{name}.state.pt"
        self.before = folder / f"{before}.pt" if before else None

    def run(self, deadline: float, steps_limit: int | None) -> Result:
        """Train until done or until the time is up."""
        if self.path.exists():
            return {"done": True, **torch.load(self.path, weights_only=True)["result"]}
        device = self.data.train.device
        model, plan = self._network()
        model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        optim = self.config.stages[self.kind].optimizer
        assert optim is not None
        strength = torch.zeros((), device=device)
        regularizer, steps = None, self._epoch_steps()
        if self.kind == "regularize":
            settings: Any = self.config.stage_method("regularize").settings
            growth: GrowthSchedule = settings.growth
            regularizer = Regularizer(
                model, plan, gram_weight=getattr(settings, "gram_weight", 0.0), growth=growth
            )
            steps = growth.total_steps

        def penalty() -> Tensor:
            assert regularizer is not None
            terms = regularizer.penalty_terms_at(strength)
            return terms["gram"] + terms["decay"]

        extra = penalty if regularizer is not None else None
        trainer = Trainer(model, optim, self.data, self.config, extra)
        start = trainer.accuracy()
        step, seconds = 0, 0.0
        if self.state_path.exists():
            state = torch.load(self.state_path, weights_only=True)
            step, start, seconds = state["step"], state["start"], state["seconds"]
            model.load_state_dict(state["model"])
            trainer.optimizer.load_state_dict(state["optimizer"])
        last = min(steps, steps_limit or steps)
        total_epochs = self.config.stages[self.kind].epochs or 1.0
        epochs_per_step = self.config.training.batch_size / len(self.data.train)
        began = time.monotonic()
        while step < last:
            if step % 200 == 0 and time.monotonic() > deadline:
                break
            if regularizer is not None:
                strength.fill_(regularizer.growth.strength(step))
            trainer.step(step, learning_rate(optim, step * epochs_per_step, total_epochs))
            if regularizer is not None:
                regularizer.after_step(step)
            step += 1
        top1 = trainer.accuracy()
        seconds += time.monotonic() - began
        result = {"steps": step, "start_top1": start, "top1": top1, "seconds": seconds}
        if step < last:
            state = {"step": step, "start": start, "seconds": seconds, "model": model.state_dict()}
            _save({**state, "optimizer": trainer.optimizer.state_dict()}, self.state_path)
            return {"done": False, **result}
        _save({"model": model.state_dict(), "plan": plan.pruned, "result": result}, self.path)
        self.state_path.unlink(missing_ok=True)
        return {"done": True, **result}

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
