"""Means over steps, for a report."""

import copy
import time
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from train.distributed.collectives import sum_over_ranks
from train.tasks.base import Metric


@dataclass(frozen=True)
class Report:
    """Means over the steps since the last report, over all ranks.

    Attributes:
        loss: what is minimised.
        loss_terms: the task's loss, and each term that method and teacher added.
        gradient_norm: L2 norm over all parameters, as the optimiser gets it.
        metrics: of the training images as augmented, those that the task looks at.
        lr: learning rate of the last step.
        images_per_second: over all ranks.
        step_time: seconds per optimiser step.
        data_wait: share of that time spent waiting for the loader.
    """

    loss: float
    loss_terms: dict[str, float]
    gradient_norm: float
    metrics: dict[Metric, float]
    lr: float
    images_per_second: float
    step_time: float
    data_wait: float


class Meter:
    """Sums up steps without making the device wait; one synchronisation per report."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._sums: dict[str, Tensor] = {}
        self._image_sums: dict[Metric, Tensor] = {}
        self.steps = self._images = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def copy(self) -> "Meter":
        """A meter that goes on from the same sums, to return to when a step is left out."""
        meter = copy.copy(self)
        meter._sums, meter._image_sums = dict(self._sums), dict(self._image_sums)
        return meter

    def pause(self, seconds: float) -> None:
        """Leave out time spent on something else, such as an evaluation."""
        self._started += seconds

    def add(self, name: str, value: Tensor) -> None:
        """Add a detached scalar."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

    def add_images(self, metric: Metric, value: Tensor) -> None:
        """Add a sum over images, of which the report has the mean."""
        value, sums = value.detach().double(), self._image_sums
        sums[metric] = sums[metric] + value if metric in sums else value

    def count(self, images: int, waited: float) -> None:
        """Count a micro-batch and the seconds spent waiting for it."""
        self._images += images
        self._waited += waited

    def step(self) -> None:
        """Count an optimiser step."""
        self.steps += 1

    def report(self, lr: float) -> Report:
        """Means over ranks and steps; then start anew."""
        names = sorted(self._sums)
        local = torch.stack([*(self._sums[name] for name in names), *self._image_sums.values()])
        ranks = self._accelerator.num_processes
        means = (sum_over_ranks(local) / ranks / self.steps).tolist()
        elapsed = time.perf_counter() - self._started
        terms = dict(zip(names, means[: len(names)], strict=True))
        of_images = zip(self._image_sums, means[len(names) :], strict=True)
        report = Report(
            metrics={m: m.factor * mean * self.steps / self._images for m, mean in of_images},
            gradient_norm=terms.pop("gradient_norm"),
            loss=terms.pop("loss"),
            loss_terms=terms,
            lr=lr,
            images_per_second=self._images * ranks / elapsed,
            step_time=elapsed / self.steps,
            data_wait=self._waited / elapsed,
        )
        self.reset()
        return report
