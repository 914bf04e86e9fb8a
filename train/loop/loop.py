"""The training loop: one for every stage, and it knows nothing of pruning."""

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from tpp.methods.base import Method
from train.distillation.distillation import Distillation
from train.distributed.engine import Engine
from train.loop.bad_steps import BadStep, StepCheck
from train.loop.graphs import Recorder
from train.loop.meter import Meter, Report
from train.loop.parts import part
from train.loop.step import Batches, CapturedStepper, Stepper, gradients
from train.tasks.base import Task


@dataclass(frozen=True)
class LoopSettings:
    """How to train.

    Attributes:
        lr: learning rate of a 0-based step.
        finished: whether so many steps are enough.
        accumulation: micro-batches per optimiser step.
        log_every: steps over which a report is averaged.
        seed: of this rank's dropout and the like.
        first_step: 0-based; those before it are left out: only the method's schedule goes on.
        recorder: records steps and replays them; None to compute each one.
    """

    lr: Callable[[int], float]
    finished: Callable[[int], bool]
    accumulation: int = 1
    log_every: int = 50
    seed: int = 0
    first_step: int = 0
    recorder: Recorder | None = None


def train(
    engine: Engine,
    batches: Batches,
    task: Task,
    method: Method,
    settings: LoopSettings,
    *,
    check: StepCheck,
    distillation: Distillation | None = None,
    start_step: int = 0,
    on_bad_step: Callable[[BadStep], None],
    on_report: Callable[[int, Report], None],
    on_step: Callable[[int], bool],
) -> int:
    """Train until ``settings.finished``.

    Args:
        engine: the network and its optimiser, over the ranks.
        batches: ``accumulation`` micro-batches per step, from the first step that is not left out.
        task: what the network is trained for.
        method: told before and after every optimiser step, and asked for its terms of the loss.
        settings: how to train.
        check: looks at every step.
        distillation: a teacher's term of the loss; None for none.
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
    stepper = _stepper(engine, batches, task, method, settings, distillation)
    step = start_step
    while step < settings.first_step:
        engine.take_over(method.after_step(step))
        step += 1
        if settings.finished(step):
            on_step(step)
            return step
    model.train()
    while not settings.finished(step):
        # Seeded by the step, so that a resumed run draws the same dropout masks and nothing about
        # random states has to be saved.
        seed(engine.accelerator.device, settings.seed + step)
        lr = settings.lr(step)
        engine.set_learning_rate(lr)
        check.begin()
        before = meter.copy() if check.at_once else meter
        task.before_step(step, engine.accelerator.device)
        loss, norm = stepper.gradients(meter, changed=method.before_step(step))
        check(step, loss, norm)
        bad = check.first_bad() if check.at_once else None
        if bad is None:
            with part("optimiser"):
                stepper.step()
            meter.step()
        else:
            stepper.drop()
            on_bad_step(bad)
            check.undo()
            meter = before
        engine.take_over(method.after_step(step))
        step += 1
        if meter.steps and (step % settings.log_every == 0 or settings.finished(step)):
            if not check.at_once and (bad := check.first_bad()) is not None:
                on_bad_step(bad)
            with part("log"):
                on_report(step, meter.report(lr))
        stopped = time.perf_counter()
        if on_step(step):
            model.train()
            meter.pause(time.perf_counter() - stopped)
    return step


def _stepper(
    engine: Engine,
    batches: Batches,
    task: Task,
    method: Method,
    settings: LoopSettings,
    distillation: Distillation | None,
) -> Stepper:
    compute = functools.partial(
        gradients,
        engine,
        task=task,
        method=method,
        accumulation=settings.accumulation,
        distillation=distillation,
    )
    if settings.recorder is None:
        return Stepper(engine, compute, batches)
    return CapturedStepper(engine, compute, batches, settings.recorder, settings.accumulation)


def seed_of_rank(run: int, rank: int) -> int:
    """The seed of a rank's dropout and the like in the first step.

    Far apart, so that neighbouring ranks do not share dropout masks some steps later.
    """
    return (run * 1_000_003 + rank * 2**40) % 2**62


def seed(device: torch.device, number: int) -> None:
    """``torch.manual_seed`` of the processor and of the device that computes.

    Without all the other devices: torch queues what they are to be told, with a traceback each
    time, as long as nobody uses them.
    """
    torch.default_generator.manual_seed(number)
    if device.type == "cuda":
        place = torch.cuda.current_device() if device.index is None else device.index
        torch.cuda.default_generators[place].manual_seed(number)
