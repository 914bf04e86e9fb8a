"""One optimiser step's gradients, computed as they come or, on a GPU, recorded and replayed."""

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from data_pipelines.images.batch import Batch
from tpp.methods.base import Method
from train.distillation.distillation import Distillation
from train.distributed.engine import Engine
from train.loop.graphs import Recorder
from train.loop.meter import Meter
from train.loop.parts import REPLAY, part
from train.tasks.base import Metric, Task

Batches = Iterator[Batch]

# Steps without a graph before one is recorded: the first ones choose algorithms, and make indices
# and the optimiser's state.
WARM_UP = 3


class Sums(Protocol):
    """What takes up the numbers of a step, as :class:`train.loop.meter.Meter` does."""

    def add(self, name: str, value: Tensor) -> None:
        """Add a scalar."""

    def add_images(self, metric: Metric, value: Tensor) -> None:
        """Add a sum over images."""


def gradients(
    engine: Engine,
    batches: Batches,
    task: Task,
    method: Method,
    sums: Sums,
    *,
    accumulation: int,
    distillation: Distillation | None = None,
) -> tuple[Tensor, Tensor]:
    """Gather the gradients of an optimiser step that the method has been told of.

    The mean over micro-batches of the task's loss and the method's terms of them, plus the
    method's terms of the weights alone. With a teacher the task's loss is weighted, and the
    teacher's term comes to it; what is logged of the task is its loss without that weight.

    Returns:
        the loss, detached, and the gradient's norm, see
        :meth:`train.distributed.engine.Engine.gradient_norm`.
    """
    losses = []
    for micro in range(accumulation):
        batch = next(batches)
        last = micro == accumulation - 1
        with engine.micro_batch(last=last):
            with part("forward"):
                loss, outputs = task.loss(engine.forward, batch)
                if accumulation > 1:
                    loss = loss / accumulation
            with part("log"):
                sums.add("task", loss)
                for metric, over_images in task.training_sums(batch, outputs).items():
                    sums.add_images(metric, over_images)
            with part("penalty"):
                with engine.autocast():
                    terms = method.batch_terms(batch, outputs)
                    if distillation is not None:
                        taught = distillation.term(batch[0], outputs) / accumulation
                        sums.add("distillation", taught)
                        loss = distillation.task_share * loss + taught
                if accumulation > 1:
                    terms = {name: term / accumulation for name, term in terms.items()}
                if last:
                    terms = terms | method.loss_terms()
                for name, term in terms.items():
                    sums.add(name, term)
                    loss = loss + term
            with part("backward"):
                engine.backward(loss, last=last)
        losses.append(loss.detach())
    total = losses[0]
    for one in losses[1:]:
        total = total + one
    sums.add("loss", total)
    with part("optimiser"):
        norm = engine.gradient_norm()
    sums.add("gradient_norm", norm)
    return total, norm


class Stepper:
    """Makes optimiser steps: :meth:`gradients`, then :meth:`step` or :meth:`drop`.

    Args:
        engine: the network and its optimiser, over the ranks.
        compute: :func:`gradients` of this engine; takes ``batches`` and ``sums``.
        batches: ``accumulation`` micro-batches per step.
    """

    def __init__(
        self, engine: Engine, compute: Callable[..., tuple[Tensor, Tensor]], batches: Batches
    ) -> None:
        self._engine, self._compute, self._batches = engine, compute, batches

    def gradients(self, meter: Meter, *, changed: bool) -> tuple[Tensor, Tensor]:
        """Gather the gradients of the next step; returns its loss and the gradient's norm.

        Args:
            meter: takes up the step's numbers.
            changed: what :meth:`tpp.methods.base.Method.before_step` said.
        """
        return self._compute(batches=self._counted(meter), sums=meter)

    def step(self) -> None:
        """Let the optimiser make the step."""
        self._engine.step()

    def drop(self) -> None:
        """Leave the step out."""
        self._engine.drop()

    def _counted(self, meter: Meter) -> Batches:
        """The batches, with the time that each is waited for."""
        while True:
            asked = time.perf_counter()
            with part("load"):
                batch = next(self._batches)
            meter.count(len(batch[0]), time.perf_counter() - asked)
            yield batch


class CapturedStepper(Stepper):
    """Records what a step does on the device, and replays it: one launch instead of thousands.

    Two recordings, of all micro-batches' gradients and of the optimiser's part, so that a step may
    still be judged between them. What changes from step to step is in tensors that stay where they
    are: images and labels are copied into place, lambda and learning rates are written there. Where
    the method's terms change, or the shapes of the images, steps are made one by one again, and
    then recorded anew.

    Args:
        engine, compute, batches: as of :class:`Stepper`.
        recorder: of the device.
        accumulation: micro-batches per step.
    """

    def __init__(
        self,
        engine: Engine,
        compute: Callable[..., tuple[Tensor, Tensor]],
        batches: Batches,
        recorder: Recorder,
        accumulation: int,
    ) -> None:
        super().__init__(engine, compute, batches)
        self._accumulation = accumulation
        engine.keep_rates_in_tensors()
        self._recorder = recorder
        self._places: list[Batch] = []
        self._notes = _Notes()
        self._gradients: Callable[[], Tensor] | None = None
        self._update: Callable[[], None] | None = None
        self._warm = 0
        self._has_state = False

    def gradients(self, meter: Meter, *, changed: bool) -> tuple[Tensor, Tensor]:
        """As :meth:`Stepper.gradients`; the numbers are float64."""
        if self._put(itertools.islice(self._counted(meter), self._accumulation)) or changed:
            self._forget()
        if self._gradients is None and self._warm == WARM_UP:
            self._gradients = self._recorder.record(self._noted)
        if self._gradients is None:
            self._warm += 1
            numbers = self._recorder.warm_up(self._noted)
        else:
            with part(REPLAY):
                numbers = self._gradients()
        # The next step writes its numbers to the same place.
        return self._notes.pass_on(numbers.clone(), meter)

    def step(self) -> None:
        """As :meth:`Stepper.step`."""
        if self._gradients is None:
            self._engine.step()
        elif not self._has_state:  # the steps until now were all left out
            self._engine.update()
        else:
            if self._update is None:
                self._update = self._recorder.record(self._engine.update)
            with part(REPLAY):
                self._update()
        self._has_state = True

    def drop(self) -> None:
        """As :meth:`Stepper.drop`; recorded gradients stay in their place to be written anew."""
        if self._gradients is None:
            self._engine.drop()

    def _noted(self) -> Tensor:
        self._notes = _Notes()
        self._compute(batches=iter(self._places), sums=self._notes)
        return self._notes.numbers()

    def _put(self, batches: Batches) -> bool:
        """Copy micro-batches to where the recording reads them; whether that is a new place."""
        new = False
        for number, batch in enumerate(batches):
            if number < len(self._places) and _alike(self._places[number], batch):
                for place, tensor in zip(self._places[number], batch, strict=True):
                    place.copy_(tensor, non_blocking=True)
                continue
            self._places[number : number + 1] = [(batch[0].clone(), batch[1].clone())]
            new = True
        return new

    def _forget(self) -> None:
        if self._gradients is not None:
            self._engine.drop()  # what the recording has written is gone with it
        self._gradients = self._update = None
        self._warm = 0


def _alike(one: Batch, other: Batch) -> bool:
    return all(
        (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        for a, b in zip(one, other, strict=True)
    )


class _Notes:
    """The numbers of a step, by name, for a meter that is to have them later."""

    def __init__(self) -> None:
        self._names: list[str | Metric] = []
        self._values: list[Tensor] = []

    def add(self, name: str, value: Tensor) -> None:
        self._note(name, value)

    def add_images(self, metric: Metric, value: Tensor) -> None:
        self._note(metric, value)

    def _note(self, name: str | Metric, value: Tensor) -> None:
        self._names.append(name)
        self._values.append(value.detach())

    def numbers(self) -> Tensor:
        """All of them, float64, in the order in which they came."""
        numbers = torch.stack([value.double() for value in self._values])
        self._values = []
        return numbers

    def pass_on(self, numbers: Tensor, meter: Meter) -> tuple[Tensor, Tensor]:
        """Tell a meter the numbers that now stand there; returns loss and gradient's norm."""
        named = dict[str, Tensor]()
        for name, value in zip(self._names, numbers.unbind(), strict=True):
            if isinstance(name, Metric):
                meter.add_images(name, value)
            else:
                meter.add(name, value)
                named[name] = value
        return named["loss"], named["gradient_norm"]
