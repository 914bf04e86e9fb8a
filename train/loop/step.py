"""One optimiser step's gradients."""

import time
from collections.abc import Iterator

from torch import Tensor

from data_pipelines.images.batch import Batch
from tpp.methods.base import Method
from train.distillation.distillation import Distillation
from train.distributed.engine import Engine
from train.loop.meter import Meter
from train.loop.parts import part
from train.tasks.base import Task

Batches = Iterator[Batch]


def gradients(
    engine: Engine,
    batches: Batches,
    task: Task,
    method: Method,
    meter: Meter,
    step: int,
    *,
    accumulation: int,
    distillation: Distillation | None = None,
) -> Tensor:
    """Gather the gradients of 0-based optimiser step ``step``; returns the loss, detached.

    The mean over micro-batches of the task's loss and the method's terms of them, plus the
    method's terms of the weights alone. With a teacher the task's loss is weighted, and the
    teacher's term comes to it; what is logged of the task is its loss without that weight.
    """
    method.before_step(step)
    losses = []
    for micro in range(accumulation):
        asked = time.perf_counter()
        with part("load"):
            batch = next(batches)
        meter.count(len(batch[0]), time.perf_counter() - asked)
        last = micro == accumulation - 1
        with engine.micro_batch(last=last):
            with part("forward"):
                loss, outputs = task.loss(engine.forward, batch)
                if accumulation > 1:
                    loss = loss / accumulation
            with part("log"):
                meter.add("task", loss)
                for metric, over_images in task.training_sums(batch, outputs).items():
                    meter.add_images(metric, over_images)
            with part("penalty"):
                with engine.autocast():
                    terms = method.batch_terms(batch, outputs)
                    if distillation is not None:
                        taught = distillation.term(batch[0], outputs) / accumulation
                        meter.add("distillation", taught)
                        loss = distillation.task_share * loss + taught
                if accumulation > 1:
                    terms = {name: term / accumulation for name, term in terms.items()}
                if last:
                    terms = terms | method.loss_terms()
                for name, term in terms.items():
                    meter.add(name, term)
                    loss = loss + term
            with part("backward"):
                engine.backward(loss, last=last)
        losses.append(loss.detach())
    total = losses[0]
    for one in losses[1:]:
        total = total + one
    meter.add("loss", total)
    return total
