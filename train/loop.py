"""The training loop: one for every stage, and it knows nothing of pruning."""

import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from tpp.methods.base import Method
from train.bad_steps import BadStep, StepCheck
from train.distributed import sum_over_ranks
from train.engine import Engine

Batches = Iterator[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    Attributes:
        lr: learning rate of a 0-based step.
        finished: whether so many steps are enough.
        accumulation: micro-batches per optimiser step.
        label_smoothing: of the cross entropy.
        log_every: steps over which a report is averaged.
        seed: of this rank's dropout and the like.
        first_step: 0-based; those before it are left out: only the method's schedule goes on.
    """

    lr: Callable[[int], float]
    finished: Callable[[int], bool]
    accumulation: int = 1
    label_smoothing: float = 0.0
    log_every: int = 50
    seed: int = 0
    first_step: int = 0


@dataclass(frozen=True)
class Report:
    """Means over the steps since the last report, over all ranks.

    Attributes:
        loss_terms: task loss, and each term that the method added.
        gradient_norm: L2 norm over all parameters, as the optimiser gets it.
        top1: per cent of the training images, as augmented (mixed ones: of their larger shares).
        lr: learning rate of the last step.
        images_per_second: over all ranks.
        step_time: seconds per optimiser step.
        data_wait: share of that time spent waiting for the loader.
    """

    loss_terms: dict[str, float]
    gradient_norm: float
    top1: float
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
        self.steps = self._images = 0
        self._waited = 0.0
        self._started = time.perf_counter()

    def copy(self) -> "Meter":
        """A meter that goes on from the same sums, to return to when a step is left out."""
        meter = copy.copy(self)
        meter._sums = dict(self._sums)
        return meter

    def pause(self, seconds: float) -> None:
        """Leave out time spent on something else, such as an evaluation."""
        self._started += seconds

    def add(self, name: str, value: Tensor) -> None:
        """Add a detached scalar."""
        value = value.detach().double()
        self._sums[name] = self._sums[name] + value if name in self._sums else value

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
        local = torch.stack([self._sums[name] for name in names])
        ranks = self._accelerator.num_processes
        means = (sum_over_ranks(local) / ranks / self.steps).tolist()
        elapsed = time.perf_counter() - self._started
        terms = dict(zip(names, means, strict=True))
        report = Report(
            top1=100 * terms.pop("correct") * self.steps / self._images,
            gradient_norm=terms.pop("gradient_norm"),
            loss_terms=terms,
            lr=lr,
            images_per_second=self._images * ranks / elapsed,
            step_time=elapsed / self.steps,
            data_wait=self._waited / elapsed,
        )
        self.reset()
        return report


def train(
    engine: Engine,
    batches: Batches,
    method: Method,
    settings: LoopSettings,
    *,
    check: StepCheck,
    start_step: int = 0,
    on_bad_step: Callable[[BadStep], None],
    on_report: Callable[[int, Report], None],
    on_step: Callable[[int], bool],
) -> int:
    """Train until ``settings.finished``.

    Args:
        engine: the network and its optimiser, over the ranks.
        batches: ``accumulation`` micro-batches per step, from the first step that is not left out.
        method: asked for its loss terms before, and told after, every optimiser step.
        settings: how to train.
        check: looks at every step.
        start_step: optimiser steps already done.
        on_bad_step: called on all ranks with a step that was found bad; raises, or returns for it
            to be left out.
        on_report: called with the number of steps done and the means since the last report.
        on_step: called after every step with the number of steps done; may evaluate or save, in
            which case it returns True: that time is not counted as training time.

    Returns:
        The number of steps done.
    """
    model, meter = engine.model, Meter(engine.accelerator)
    step = start_step
    while step < settings.first_step:
        method.after_step(step)
        step += 1
        if settings.finished(step):
            on_step(step)
            return step
    model.train()
    while not settings.finished(step):
        # Seeded by the step, so that a resumed run draws the same dropout masks and nothing about
        # random states has to be saved.
        torch.manual_seed(settings.seed + step)
        lr = settings.lr(step)
        engine.set_learning_rate(lr)
        check.begin()
        before = meter.copy()
        loss = _accumulate(engine, batches, method, settings, meter, step)
        norm = engine.gradient_norm()
        meter.add("gradient_norm", norm)
        check(step, loss, norm)
        bad = check.first_bad() if check.at_once else None
        if bad is None:
            engine.step()
            meter.step()
        else:
            engine.drop()
            on_bad_step(bad)
            check.undo()
            meter = before
        method.after_step(step)
        step += 1
        if meter.steps and (step % settings.log_every == 0 or settings.finished(step)):
            if not check.at_once and (bad := check.first_bad()) is not None:
                on_bad_step(bad)
            on_report(step, meter.report(lr))
        stopped = time.perf_counter()
        if on_step(step):
            model.train()
            meter.pause(time.perf_counter() - stopped)
    return step


def _accumulate(
    engine: Engine,
    batches: Batches,
    method: Method,
    settings: LoopSettings,
    meter: Meter,
    step: int,
) -> Tensor:
    """Gather one step's gradients over its micro-batches; returns the loss, detached."""
    total = torch.zeros((), device=engine.accelerator.device)
    for micro in range(settings.accumulation):
        asked = time.perf_counter()
        images, labels = next(batches)
        meter.count(len(labels), time.perf_counter() - asked)
        last = micro == settings.accumulation - 1
        with engine.micro_batch(last=last):
            with engine.autocast():
                logits = engine.model(images)
            logits = logits.float()
            loss = F.cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)
            loss = loss / settings.accumulation
            meter.add("task", loss)
            # Of mixed images, the class that has the larger share.
            classes = labels if labels.dim() == 1 else labels.argmax(1)
            meter.add("correct", (logits.argmax(1) == classes).sum())
            if last:
                for name, term in method.loss_terms(step).items():
                    meter.add(name, term)
                    loss = loss + term
            engine.backward(loss, last=last)
        total += loss.detach()
    return total
