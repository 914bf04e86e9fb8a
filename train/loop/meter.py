"""Means over steps, for a report."""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from train.distributed.collectives import sum_over_ranks
from train.tasks.base import Metric

_MOST_KEPT = 256  # scalars that are kept one by one


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


class _Sum:
    """Adds scalars up in float64, many at a time: one by one is a launch each."""

    def __init__(self, total: Tensor | None = None, new: Sequence[Tensor] = ()) -> None:
        self._total, self._new = total, list(new)

    def copy(self) -> "_Sum":
        return _Sum(self._total, self._new)

    def add(self, value: Tensor) -> None:
        self._new.append(value.detach())
        if len(self._new) == _MOST_KEPT:
            self._total, self._new = self.total(), []

    def total(self) -> Tensor:
        parts = torch.stack(self._new).double() if self._new else None
        if parts is None:
            assert self._total is not None
            return self._total
        return parts.sum() if self._total is None else self._total + parts.sum()


class Meter:
    """Sums up steps without making the device wait; one synchronisation per report."""

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        """Start anew."""
        self._sums: dict[str, _Sum] = {}
        self._image_sums: dict[Metric, _Sum] = {}
        self.steps = self._images = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def copy(self) -> "Meter":
        """A meter that goes on from the same sums, to return to when a step is left out."""
        meter = copy.copy(self)
        meter._sums = {name: values.copy() for name, values in self._sums.items()}
        meter._image_sums = {m: values.copy() for m, values in self._image_sums.items()}
        return meter

    def pause(self, seconds: float) -> None:
        """Leave out time spent on something else, such as an evaluation."""
        self._started += seconds

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar, which keeps its value."""
        if name not in self._sums:
            self._sums[name] = _Sum()
        self._sums[name].add(value)

    def add_images(self, metric: Metric, value: Tensor) -> None:
        """Add a sum over images, of which the report has the mean."""
        if metric not in self._image_sums:
            self._image_sums[metric] = _Sum()
        self._image_sums[metric].add(value)

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
        sums = [*(self._sums[name] for name in names), *self._image_sums.values()]
        local = torch.stack([values.total() for values in sums])
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
