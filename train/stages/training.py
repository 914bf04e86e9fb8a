"""A training stage: the loop with everything around it that a run needs.

Dense training, the regularised stage and finetuning differ in their settings and in what their
method does, not in code. A stage begins, goes on from a checkpoint, goes back to one, and goes on
with fewer filters by the same way: :meth:`TrainingStage._build`.
"""

import sys
import time
from collections import OrderedDict
from contextlib import closing
from typing import Any

from torch import Tensor, nn

from tpp.checkpoints.training_state import (
    DamagedState,
    TrainingState,
    read_state,
    state_folder,
)
from tpp.common.errors import UserError
from tpp.masks import COMPANION, share_masked
from tpp.measure.counts import count
from tpp.methods.base import Method, Settings
from tpp.models.architecture import Architecture, architecture_of
from tpp.plan import PruningPlan
from train.config.batch_rule import describe, describe_length
from train.config.config import as_yaml, steps_for
from train.config.intervals import Interval
from train.config.sections import MODEL_FILE
from train.distributed.accelerator import make_engine
from train.distributed.arithmetic import compile_network
from train.distributed.collectives import EveryRankError, from_main_rank, led_by_main_rank
from train.distributed.engine import Engine
from train.distributed.stopping import Reached, Stopped, message_of
from train.distributed.sync_batchnorm import convert_sync_batchnorm
from train.loop.average import WeightAverage
from train.loop.bad_steps import StepCheck
from train.loop.graphs import CudaGraphs
from train.loop.loop import LoopSettings, seed_of_rank, train
from train.loop.meter import Report
from train.loop.optim import make_optimizer
from train.monitor import Monitor
from train.run import Run, say_bad_images
from train.run_folder.carried import fitting, state_to_carry, take_up_carried
from train.run_folder.checkpoints import CHECKPOINTS, CheckpointWriter, newest_state
from train.run_folder.log import say
from train.run_folder.networks import (
    evaluate_network,
    hold_mask_of_input,
    load_input,
    network_of_shapes,
    place,
    save_network,
    shapes_of,
)
from train.run_folder.plans import choose_plan, load_plan, save_plan
from train.run_folder.same_run import check_same_images, check_same_settings, stage_settings
from train.stages.bad_steps import BadSteps, RollBack
from train.stages.context import context_of
from train.stages.observers import JacobianObserver, LayerObserver, ScoreObserver, look
from train.stages.profile import ProfileObserver
from train.stages.progress import Progress
from train.stages.rates import rate_of
from train.stages.shrinking import shrunk, shrunk_shapes
from train.stages.teaching import Teaching
from train.stages.throughput import Throughput, macs_in_training


def clean_up(run: Run, name: str) -> None:
    """Remove the checkpoints of a stage that is done, but for those that are kept for good."""
    folder = run.stage_folder(name) / CHECKPOINTS
    if run.is_main and folder.is_dir():
        writer = CheckpointWriter(folder, run.config.checkpoints, say=say)
        writer.clean_up()
        writer.close()


class _Shrink(Exception):  # noqa: N818 (what it asks for)
    """Go on without the filters of a plan."""

    def __init__(self, step: int, plan: PruningPlan) -> None:
        self.step, self.plan = step, plan


class TrainingStage:
    """One stage that trains, from its input or its newest checkpoint on.

    Args:
        run: the run.
        name: of the stage.
        until: the step after which it is left for another time; None to go on to its end.
    """

    def __init__(self, run: Run, name: str, *, until: int | None = None) -> None:
        self._run, self._name, self._until = run, name, until
        self._stage = run.config.stages[name]
        self._task = run.data.task(name)
        self._training = run.config.training
        self._folder = run.stage_folder(name)
        self._checkpoints = self._folder / CHECKPOINTS
        self._interval = Interval.parse(run.config.checkpoints.every)
        self._method = self._fresh_method()
        self._teaching = Teaching(run, name)

        images, batch = len(run.data.train.index), self._training.batch_size
        epochs = self._stage.epochs
        self._epochs_per_step = batch / images
        self._total = run.config.steps_of(name, images)
        self._length = epochs or (self._total or 0) * self._epochs_per_step
        self._optim = run.config.stage_optimizer(name, self._length)
        assert self._total is not None  # a stage has epochs, or its method knows its steps
        self._rate = rate_of(run, name, self._optim, self._total)

    def train(self) -> dict[str, Any]:
        """Train to the end, save the network, and return the stage's results.

        Raises:
            Stopped: a signal asked for it, or ``until``; all is kept.
        """
        run = self._run
        if run.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
        state, passed_over = self._find_state()
        if state is not None and self._until is not None and state.step >= self._until:
            raise Reached(self._reached(state.step))
        progress = self._build(state)
        step = left_out = state.step if state else 0
        self._open(step, progress)
        try:
            self._announce(step, passed_over)
            self._save_first(state, progress)
            self._profile.begin(step)
            while True:
                self._check = self._make_check()
                try:
                    with closing(self._batches(left_out)) as batches:
                        steps = train(
                            self._engine,
                            batches,
                            self._task,
                            self._method,
                            self._loop_settings(left_out),
                            check=self._check,
                            distillation=self._distillation,
                            start_step=step,
                            on_bad_step=self._bad_steps,
                            on_report=self._on_report,
                            on_step=self._on_step,
                        )
                    break
                except RollBack as request:
                    left_out = request.bad.step
                    step = self._roll_back(left_out)
                except _Shrink as request:
                    step = left_out = request.step
                    self._shrink(request)
            self._report_bad_images(steps)
            self._monitor.event("stage", status="end", step=steps)
            carried = state_to_carry(run.config, self._name, self._network, self._engine)
            if self._writer is not None:
                self._writer.wait()
        finally:
            self._profile.close()
            if self._writer is not None:
                self._writer.close()
            self._monitor.close()
            run.accelerator.free_memory()
        return self._finish(steps, carried)

    # ---- beginning, going on, ending ---------------------------------------------------------

    def _find_state(self) -> tuple[TrainingState | None, list[str]]:
        """The newest whole checkpoint, the same on every rank, and why others were passed over."""

        def find() -> tuple[tuple[int | None, list[str]], TrainingState | None]:
            state, passed_over = newest_state(self._checkpoints)
            return (None if state is None else state.step, passed_over), state

        def read(told: tuple[int | None, list[str]]) -> TrainingState | None:
            step, _ = told
            if step is None:
                return None
            try:
                return read_state(state_folder(self._checkpoints, step))
            except DamagedState as error:
                raise UserError(
                    f"{error}; the main rank reads it well: the run folder must be on a file "
                    "system that all nodes share"
                ) from None

        (_, passed_over), state = led_by_main_rank(self._run.accelerator, find, read)
        return state, passed_over

    def _build(self, state: TrainingState | None) -> Progress:
        """Make network, method and engine: of the input, or as a training state has them."""
        run, name, stage = self._run, self._name, self._stage
        method = self._method = self._fresh_method()
        if state is None:
            progress = Progress(stage_settings(run.config, name), run.data.train.index.fingerprint)
            network = load_input(run, stage.input)
            plan = choose_plan(run, name, network, method)
        else:
            progress = Progress.from_dict(state.extra)
            check_same_settings(run.config, name, progress.settings)
            check_same_images(run, name, progress.images)
            network = self._ordinary_network(state, progress)
            planned = stage.does.regularizes and method.picks == "before"
            plan = load_plan(run, name) if planned else None
        self._shapes = shapes_of(network)
        method.modify(network, stage.kind)
        if state is not None:
            self._load(network, state)
        place(run, network)
        if self._training.sync_batchnorm:
            network = convert_sync_batchnorm(network)
        self._network = network
        self._start = progress.start if state else self._measure_start()
        self._distillation = self._teaching.beside(network, progress.teacher)
        context = context_of(
            run,
            name,
            network,
            plan,
            total_steps=self._total,
            steps_per_epoch=1 / self._epochs_per_step,
        )
        method.prepare(network, context)
        self._mask = hold_mask_of_input(run, name, network)
        self._sparsity = share_masked(self._mask)
        compile_network(network, self._training.compile)
        self._engine: Engine = make_engine(
            run.accelerator,
            network,
            make_optimizer(network, self._optim, scaled=run.accelerator.scaler is not None),
            clip=self._training.clip_gradient_norm,
        )
        self._throughput = Throughput(
            lambda: macs_in_training(run, self._shapes),
            run.accelerator.device,
            run.accelerator.num_processes,
            self._training.precision,
            self._training.peak_tflops,
        )
        if state is None and stage.carry_optimizer:
            take_up_carried(run, name, network, self._engine)
        ema = run.config.stage_ema(name)
        self._average = WeightAverage(network, ema) if ema is not None else None
        if state is not None:
            if self._average is not None:
                self._average.load_state_dict(state.average)
            method.load_state_dict(progress.method)
            self._engine.load_state_dict(state.optimizer)
            if run.accelerator.scaler is not None and progress.scaler is not None:
                run.accelerator.scaler.load_state_dict(progress.scaler)
            run.data.skipped |= progress.skipped_images
        return progress

    def _fresh_method(self) -> Method:
        if not self._run.config.has_method(self._name):
            return Method(Settings())
        images = len(self._run.data.train.index)
        return self._run.config.stage_method(self._name, images=images)

    def _ordinary_network(self, state: TrainingState, progress: Progress) -> nn.Module:
        """The network of a state before the method modified it, without its weights."""
        shapes = progress.shapes or {key: tuple(t.shape) for key, t in state.model.items()}
        try:
            architecture = Architecture.from_dict(state.architecture)
            if architecture.name != self._run.architecture.name:
                raise UserError(f"it is a {architecture.name}")
            return network_of_shapes(self._run, architecture, shapes)
        except UserError as error:
            raise self._other_network(str(error)) from None

    def _load(self, network: nn.Module, state: TrainingState) -> None:
        values = OrderedDict(state.model)
        # Versions of modules' formats, which tensors alone do not carry: these are of today.
        values._metadata = network.state_dict()._metadata  # type: ignore[attr-defined]
        try:
            network.load_state_dict(values)
        except RuntimeError as error:
            raise self._other_network(" ".join(str(error).split())) from None

    def _other_network(self, why: str) -> EveryRankError:
        return EveryRankError(
            f"{self._checkpoints}: holds a checkpoint of another network than the one that "
            f"stage {self._name!r} begins with ({why}); delete the folder to run the stage again"
        )

    def _measure_start(self) -> dict[str, float] | None:
        """Scores before the first step: of the stage before, or measured; None for none."""
        run, task = self._run, self._task
        if self._stage.input is None:
            given = run.config.model.checkpoint is not None
            return evaluate_network(run, self._network).to_dict() if given else None
        before = run.done[self._stage.input]
        if before[task.score.name] is not None:
            return {metric.name: before[metric.name] for metric in task.metrics}
        return evaluate_network(run, self._network).to_dict()  # it was pruned, without data

    def _open(self, start_step: int, progress: Progress) -> None:
        """Open what is written to, and set the observers and the counts up."""
        run, training = self._run, self._training
        monitor = self._monitor = Monitor(
            run.folder,
            self._name,
            self._total,
            start_step,
            before=sum(run.done[name]["steps"] or 0 for name in run.config.inputs_of(self._name)),
            configuration=as_yaml(run.config),
            enabled=run.is_main,
            on_error=run.config.checkpoints.on_error,
        )
        self._writer = None
        if run.is_main:
            run.on_open(self._name)
            self._writer = CheckpointWriter(
                self._checkpoints, run.config.checkpoints, say=monitor.say, copies=run.copies
            )
        self._bad_steps = BadSteps(
            run, self._name, self._rate, monitor, self._writer, progress.bad_steps
        )
        images = len(run.data.train.index)
        evaluate_steps = steps_for(training.evaluate_every, images, training.batch_size)
        self._scores = ScoreObserver(
            run,
            self._name,
            evaluate_steps,
            self._epochs_per_step,
            monitor,
            lambda: self._average,
        )
        self._profile = ProfileObserver(run, self._name, monitor, self._finished)
        self._observers = (
            self._profile,
            LayerObserver(training.statistics_every, lambda: self._method, monitor),
            JacobianObserver(run, monitor),
            self._scores,
        )
        self._best = progress.best_score
        self._stalled, self._elapsed_before = 0.0, progress.elapsed
        self._started = self._saved = time.perf_counter()

    def _announce(self, start_step: int, passed_over: list[str]) -> None:
        for reason in passed_over:
            self._monitor.say(f"{self._name}: passed over a damaged checkpoint: {reason}")
        if start_step:
            self._monitor.say(f"{self._name}: resumed after {start_step} steps")
        else:
            length = (
                "as long as the method takes" if self._total is None else f"{self._total} steps"
            )
            way = f" of {self._method.title}" if self._stage.does.regularizes else ""
            score = self._task.score
            before = f", from {score.say(self._start[score.name])}" if self._start else ""
            self._monitor.say(f"{self._name}: {length}{way}{before}")
            if self._start:
                self._monitor.scalars("evaluate", 0, self._start, prefix="val/")
        images = len(self._run.data.train.index)
        rule = describe(self._run.config, self._name, self._length)
        for line in (rule, describe_length(self._run.config, self._name, images)):
            if line is not None:
                self._monitor.say(f"{self._name}: {line}")
        self._monitor.event("stage", status="start", step=start_step)
        if start_step == 0:
            look(self._observers, 0, self._network, last=False)

    def _save_first(self, state: TrainingState | None, progress: Progress) -> None:
        """Save what there is to go back to, or what was not looked at when the run was stopped."""
        if state is None:
            if self._training.on_bad_step == "rollback":
                self._save(0)
        elif not progress.looked:
            self._look(state.step)
            self._save(state.step)

    def _finish(self, steps: int, carried: dict[str, dict[str, Tensor]]) -> dict[str, Any]:
        """Write the network down; the stage's results."""
        run, scores = self._run, self._scores.scores
        assert scores is not None  # the last step is always evaluated
        networks, chosen = {"raw": self._network}, "raw"
        keeps = {"raw": self._method.keeps(self._network)}
        if self._average is not None:
            networks["ema"], keeps["ema"] = self._averaged_network(self._average)
            chosen = self._average.settings.chosen
        self._method.restore(self._network)
        if self._method.plan is not None:
            save_plan(run, self._name, self._method.plan)
        if run.is_main:
            network = networks.pop(chosen)
            companions = {weights: other.state_dict() for weights, other in networks.items()}
            companions |= {**fitting(carried, self._network), **keeps[chosen]}
            if self._mask:
                companions[COMPANION] = self._mask
            path = self._folder / MODEL_FILE
            save_network(run, self._name, path, network, scores, companions)
        counts = count(network_of_shapes(run, run.architecture, self._shapes))
        return {
            **scores.to_dict(),
            **{weights: found.to_dict() for weights, found in self._scores.others.items()},
            **run.count_fields(counts, self._mask, self._method.left(counts)),
            "start": self._start,
            "steps": steps,
            "epochs": steps * self._epochs_per_step,
            "wall_seconds": self._elapsed(),
        }

    def _averaged_network(self, average: WeightAverage) -> tuple[nn.Module, Any]:
        """An ordinary network of the averages, and what is kept of what the method added."""
        network = network_of_shapes(self._run, self._run.architecture, self._shapes)
        method = self._fresh_method()
        method.modify(network, self._stage.kind)
        network.load_state_dict(average.state_dict())
        keeps = method.keeps(network)
        method.restore(network)
        return network, keeps

    # ---- for the loop ------------------------------------------------------------------------

    def _batches(self, first_step: int) -> Any:
        """This rank's, from ``first_step`` on."""
        left = sys.maxsize if self._total is None else max(self._total - first_step, 0)
        return self._run.data.train_batches(self._name, first_step, left)

    def _loop_settings(self, first_step: int) -> LoopSettings:
        accelerator = self._run.accelerator
        return LoopSettings(
            lr=self._rate,
            finished=self._finished,
            accumulation=self._training.accumulation,
            log_every=self._training.log_every,
            seed=seed_of_rank(self._run.config.seed, accelerator.process_index),
            first_step=first_step,
            recorder=CudaGraphs(accelerator.device) if self._training.capture else None,
        )

    def _make_check(self) -> StepCheck:
        return StepCheck(
            self._network,
            max_norm=self._training.max_gradient_norm,
            at_once=self._training.on_bad_step != "stop",
            scaled=self._run.accelerator.scaler is not None,
        )

    def _finished(self, step: int) -> bool:
        return self._method.finished(step) if self._total is None else step >= self._total

    def _on_report(self, step: int, report: Report) -> None:
        values = {
            "loss": report.loss,
            **{f"loss/{term}": value for term, value in report.loss_terms.items()},
            **{metric.name: value for metric, value in report.metrics.items()},
            "lr": report.lr,
            "gradient_norm": report.gradient_norm,
            **self._method.scalars(step - 1),
            "images_per_second": report.images_per_second,
            "step_time": report.step_time,
            "data_wait": report.data_wait,
            # Seconds that the steps since the last report stood still for checkpoints.
            "checkpoint_stall": self._stalled,
            **({"sparsity": self._sparsity} if self._mask else {}),
            **(self._throughput.figures(report.images_per_second) if self._run.is_main else {}),
        }
        self._stalled = 0.0
        self._monitor.scalars("train", step, values, prefix="train/")
        self._report_bad_images(step)
        told = [f"train {metric.say(value, digits=1)}" for metric, value in report.metrics.items()]
        told.append(f"loss {report.loss_terms['task']:.3f}")
        told.append(f"{report.images_per_second:,.0f} images/s")
        self._monitor.advance(step, "  ".join(told))

    def _on_step(self, step: int) -> bool:
        """Do what is due after ``step`` steps; whether that took time."""
        if self._average is not None:
            self._average.update(step)
        plan = self._method.shrink(step)
        if plan is not None:
            # What has been seen of the steps until now goes with the network.
            if not self._check.at_once and (bad := self._check.first_bad()) is not None:
                self._bad_steps(bad)
            raise _Shrink(step, plan)
        return self._after_step(step)

    def _after_step(self, step: int) -> bool:
        """Measure and save what is due; whether that took time."""
        self._monitor.advance(step)
        self._run.at(f"stage {self._name}", step)
        signal = None if self._finished(step) else self._run.stop.agreed(step)
        if signal is not None:
            self._stop(step, signal)
        if step == self._until and not self._finished(step):
            self._stop(step)
        took_time = self._look(step)
        # Last, so that all that was logged up to this step is on the disk with it.
        saves = self._writer is not None or self._engine.saves_together
        saved = saves and not self._finished(step) and self._saves(step)
        return took_time or saved

    def _look(self, step: int) -> bool:
        return look(self._observers, step, self._network, last=self._finished(step))

    def _stop(self, step: int, signal: str | None = None) -> None:
        """Save, and end the run; what is due at this step is measured when it goes on.

        There are seconds for it, and an evaluation may take a minute.
        """
        if (bad := self._check.first_bad()) is not None:
            self._bad_steps(bad)
        self._save(step, looked=False)
        if self._writer is not None:
            self._writer.wait()
        self._monitor.event("stopped", step=step, signal=signal)
        if signal is None:
            raise Reached(self._reached(step))
        raise Stopped(message_of(signal, f"after step {step} of stage {self._name}"))

    def _reached(self, step: int) -> str:
        return f"stage {self._name} is at step {step}, as far as it was to go"

    def _report_bad_images(self, step: int) -> None:
        """Show the images that were skipped since the last time, each one once."""
        new = self._run.data.take_new_bad()
        for path, reason in new:
            self._monitor.event("skipped", step=step, file=path, reason=reason)
        say_bad_images(new, self._monitor.say)
        if new:
            count = len(self._run.data.skipped)
            self._monitor.scalars("skipped_images", step, {"skipped_images": count}, prefix="data/")

    # ---- other weights, other widths ---------------------------------------------------------

    def _roll_back(self, left_out: int) -> int:
        """Take up the weights of the newest checkpoint; returns its step."""
        if self._writer is not None:
            self._writer.wait()
        state, _ = self._find_state()
        if state is None:
            raise EveryRankError(f"{self._checkpoints}: no whole checkpoint to go back to")
        self._build_again(state)
        self._monitor.say(
            f"{self._name}: back to the weights after {state.step} steps; steps "
            f"{state.step + 1} to {left_out} are left out"
        )
        return state.step

    def _shrink(self, request: _Shrink) -> None:
        """Go on without some filters, and do what is due at that step."""
        state = self._state(request.step)
        ordinary = self._ordinary_network(state, Progress.from_dict(state.extra))
        before = sum(tensor.numel() for tensor in state.model.values())
        shapes = shrunk_shapes(request.plan, ordinary)
        self._fresh_method().modify(ordinary, self._stage.kind)
        state = shrunk(state, request.plan, ordinary)
        modified = {key: tuple(t.shape) for key, t in state.model.items()} != shapes
        state.extra.pop("shapes", None)
        if modified:
            state.extra["shapes"] = {name: list(shape) for name, shape in shapes.items()}
        self._build_again(state)
        after = sum(tensor.numel() for tensor in state.model.values())
        self._monitor.say(
            f"{self._name}: step {request.step}: "
            f"{sum(map(len, request.plan.pruned.values()))} filters removed, {before:,} -> "
            f"{after:,} values"
        )
        self._monitor.event("shrink", step=request.step, pruned=request.plan.pruned)
        self._after_step(request.step)

    def _build_again(self, state: TrainingState) -> None:
        del self._engine
        self._run.accelerator.free_memory()
        self._build(state)

    # ---- checkpoints -------------------------------------------------------------------------

    def _saves(self, step: int) -> bool:
        """Write a checkpoint if one is due and the weights are sound; whether it did."""
        if self._writer is not None:
            self._writer.check()
        evaluated = self._scores.scores if self._scores.at == step else None
        score = evaluated.values[self._task.score.name] if evaluated else None
        is_best = score is not None and (
            self._best is None or self._task.is_better(score, self._best)
        )
        if is_best:
            self._best = score
        best = self._run.config.checkpoints.keep_best and is_best
        # A bad step ends the run at the next report; what came after it is not worth keeping.
        if not (self._is_due(step) or best) or self._is_spoilt():
            return False
        self._save(step, score)
        return True

    def _is_due(self, step: int) -> bool:
        due = self._interval.due(
            step,
            steps_per_epoch=1 / self._epochs_per_step,
            seconds_since=time.perf_counter() - self._saved,
        )
        if self._interval.unit == "minutes" and self._engine.saves_together:
            return from_main_rank(self._run.accelerator, lambda: due)  # by one clock
        return due

    def _is_spoilt(self) -> bool:
        if self._engine.saves_together:
            return self._check.first_bad() is not None
        return self._check.seen_here()

    def _state(self, step: int, *, looked: bool = True) -> TrainingState:
        """All that a stage that goes on takes up; the optimiser's part is of all ranks."""
        scaler = self._run.accelerator.scaler
        model, architecture = self._network.state_dict(), architecture_of(self._network)
        ordinary = {key: tuple(tensor.shape) for key, tensor in model.items()} == self._shapes
        progress = Progress(
            settings=stage_settings(self._run.config, self._name),
            images=self._run.data.train.index.fingerprint,
            method=self._method.state_dict(),
            scaler=scaler.state_dict() if scaler is not None else None,
            start=self._start,
            elapsed=self._elapsed(),
            bad_steps=self._bad_steps.count,
            best_score=self._best,
            looked=looked,
            skipped_images=self._run.data.skipped,
            shapes=None if ordinary else self._shapes,
            teacher=self._teaching.fingerprint,
        )
        return TrainingState(
            step,
            model,
            self._engine.state_dict(),
            progress.to_dict(),
            architecture.to_dict() if architecture else None,
            average=self._average.state_dict() if self._average is not None else {},
        )

    def _save(self, step: int, score: float | None = None, *, looked: bool = True) -> None:
        state = self._state(step, looked=looked)
        if self._writer is None:
            return
        if score is not None and not self._task.higher_is_better:
            score = -score  # the writer keeps the highest
        self._stalled += self._writer.save(state, score=score, also_sync=self._monitor.flush())
        self._saved = time.perf_counter()

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started
