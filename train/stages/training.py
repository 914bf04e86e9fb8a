"""A training stage: the loop with everything around it that a run needs.

Dense training, the regularised stage and finetuning differ in their settings and in what their
method does, not in code.
"""

import json
import math
import sys
import time
from typing import Any

from tpp.checkpoints.training_state import (
    DamagedState,
    TrainingState,
    read_state,
    state_folder,
    state_folders,
)
from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.measure.counts import count
from tpp.methods.base import Method, Settings, TrainingContext
from tpp.models.architecture import architecture_of, example_input_for
from train.config.batch_rule import describe
from train.config.config import steps_for
from train.config.intervals import Interval
from train.config.sections import MODEL_FILE, StageSection
from train.data import image_transform
from train.distributed.accelerator import make_engine
from train.distributed.collectives import EveryRankError, from_main_rank, led_by_main_rank
from train.distributed.stopping import Stopped, message_of
from train.distributed.sync_batchnorm import convert_sync_batchnorm
from train.loop.bad_steps import BadStep, StepCheck
from train.loop.loop import LoopSettings, train
from train.loop.meter import Report
from train.loop.optim import learning_rate, make_optimizer
from train.monitor import Monitor
from train.run import Run, say_bad_images
from train.run_folder.checkpoints import CheckpointWriter, newest_state
from train.run_folder.log import say
from train.run_folder.networks import evaluate_network, load_input, place, save_network
from train.run_folder.plans import choose_plan, load_plan, save_plan
from train.run_folder.same_run import check_same_images, check_same_settings, stage_settings
from train.stages.trainability import TrainabilityProbe
from train.tasks.classification import Accuracy

CHECKPOINTS = "checkpoints"


def clean_up(run: Run, name: str) -> None:
    """Remove the checkpoints of a stage that is done, but for those that are kept for good."""
    folder = run.stage_folder(name) / CHECKPOINTS
    if run.is_main and folder.is_dir():
        writer = CheckpointWriter(folder, run.config.checkpoints, say=say)
        writer.clean_up()
        writer.close()


class _BadStepError(Exception):
    """A bad step was met: go back to the newest checkpoint, and on after that step."""

    def __init__(self, bad: BadStep) -> None:
        self.bad = bad


class TrainingStage:
    """One dense, regularize or finetune stage, from its input or its newest checkpoint on."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._stage: StageSection = run.config.stages[name]
        self._training = run.config.training
        self._folder = run.stage_folder(name)
        self._checkpoints = self._folder / CHECKPOINTS
        self._interval = Interval.parse(run.config.checkpoints.every)
        # Dense training is what every method starts from; none has a say in it.
        dense = self._stage.kind == "dense"
        self._method = Method(Settings()) if dense else run.config.stage_method(name)

        images, batch = len(run.data.train.index), self._training.batch_size
        epochs = self._stage.epochs
        self._epochs_per_step = batch / images
        self._evaluate_steps = steps_for(self._training.evaluate_every, images, batch)
        self._total = steps_for(epochs, images, batch) if epochs else self._method.steps()
        self._length = epochs or (self._total or 0) * self._epochs_per_step
        self._optim = run.config.stage_optimizer(name, self._length)
        self._accuracy: Accuracy | None = None
        self._probe = self._make_probe()

    def train(self) -> dict[str, Any]:
        """Train to the end, save the network, and return the stage's results."""
        run, stage = self._run, self._stage
        if run.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._network = load_input(run, stage)
        counts = count(self._network)
        state, passed_over = self._find_state()
        if state is None:
            plan = choose_plan(run, self._name, self._network, self._method)
        else:
            self._check_state(state)
            planned = stage.kind == "regularize" and self._method.picks == "before"
            plan = load_plan(run, self._name) if planned else None
            self._network.load_state_dict(state.model)
        place(run, self._network)
        if self._training.sync_batchnorm:
            self._network = convert_sync_batchnorm(self._network)
        self._start = state.extra["start"] if state else self._measure_start()
        self._method.prepare(
            self._network,
            TrainingContext(
                stage=stage.kind,
                plan=plan,
                selection=run.config.selection(),
                rank=run.accelerator.process_index,
                world_size=run.accelerator.num_processes,
                example_input=example_input_for(self._network),
            ),
        )
        self._engine = make_engine(
            run.accelerator,
            self._network,
            make_optimizer(self._network, self._optim),
            clip=self._training.clip_gradient_norm,
        )
        if state is not None:
            self._take_up(state)
            run.data.skipped |= state.extra["skipped_images"]
        start_step = state.step if state else 0
        self._bad_steps = state.extra["bad_steps"] if state else 0
        self._best = state.extra["best_top1"] if state else 0.0
        self._stalled = 0.0
        self._elapsed_before = state.extra["elapsed"] if state else 0.0
        self._monitor = Monitor(
            run.folder,
            self._name,
            self._total,
            start_step,
            enabled=run.is_main,
            on_error=run.config.checkpoints.on_error,
        )
        self._announce(start_step, passed_over)
        self._started = self._saved = time.perf_counter()
        self._writer = self._make_writer()
        try:
            if state is None and self._training.on_bad_step == "rollback":
                self._save(0)  # something to go back to
            if state is not None and not state.extra.get("looked", True):
                self._look(start_step)
                self._save(start_step)
            steps = self._train_on(start_step)
            self._report_bad_images(steps)
            self._monitor.event("stage", status="end", step=steps)
            if self._writer is not None:
                self._writer.wait()
        finally:
            if self._writer is not None:
                self._writer.close()
            self._monitor.close()
            run.accelerator.free_memory()
        assert self._accuracy is not None  # the last step is always evaluated
        if self._method.plan is not None:
            save_plan(run, self._name, self._method.plan)
        if run.is_main:
            save_network(run, self._name, self._folder / MODEL_FILE, self._network, self._accuracy)
        return {
            **self._accuracy.to_dict(),
            **run.count_fields(counts),
            "start": self._start,
            "steps": steps,
            "epochs": steps * self._epochs_per_step,
            "wall_seconds": self._elapsed(),
        }

    def _make_writer(self) -> CheckpointWriter | None:
        if not self._run.is_main:
            return None
        return CheckpointWriter(
            self._checkpoints, self._run.config.checkpoints, say=self._monitor.say
        )

    def _find_state(self) -> tuple[TrainingState | None, list[str]]:
        """The newest whole checkpoint, the same on every rank, and why others were passed over."""

        def look() -> tuple[tuple[int | None, list[str]], TrainingState | None]:
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

        (_, passed_over), state = led_by_main_rank(self._run.accelerator, look, read)
        return state, passed_over

    def _check_state(self, state: TrainingState) -> None:
        """Check that a checkpoint is of this run, stage and network."""
        run, name = self._run, self._name
        check_same_settings(run, name, state.extra["settings"])
        check_same_images(run, name, state.extra["images"])
        mine = {key: tensor.shape for key, tensor in self._network.state_dict().items()}
        if mine != {key: tensor.shape for key, tensor in state.model.items()}:
            raise EveryRankError(
                f"{self._checkpoints}: holds a checkpoint of another network than the one that "
                f"stage {name!r} begins with; delete the folder to run the stage again"
            )

    def _take_up(self, state: TrainingState) -> None:
        """Go on from a checkpoint: all but the weights."""
        self._method.load_state_dict(state.extra["method"])
        self._engine.load_state_dict(state.optimizer)
        if self._run.accelerator.scaler is not None and state.extra["scaler"] is not None:
            self._run.accelerator.scaler.load_state_dict(state.extra["scaler"])

    def _train_on(self, start_step: int) -> int:
        """Train to the end; returns the number of steps."""
        left_out = start_step
        while True:
            try:
                return self._loop(start_step, left_out)
            except _BadStepError as request:
                left_out = request.bad.step
            start_step = self._roll_back(left_out)

    def _roll_back(self, left_out: int) -> int:
        """Take up the weights of the newest checkpoint; returns its step."""
        if self._writer is not None:
            self._writer.wait()
        state, _ = self._find_state()
        if state is None:
            raise EveryRankError(f"{self._checkpoints}: no whole checkpoint to go back to")
        self._network.load_state_dict(state.model)
        self._take_up(state)
        self._monitor.say(
            f"{self._name}: back to the weights after {state.step} steps; steps "
            f"{state.step + 1} to {left_out} are left out"
        )
        return state.step

    def _loop(self, start_step: int, first_step: int) -> int:
        """Train on after ``start_step`` steps, without making those up to ``first_step``."""
        run, training = self._run, self._training
        rank = run.accelerator.process_index
        batches = run.data.train_batches(
            self._name,
            first_step,
            sys.maxsize if self._total is None else max(self._total - first_step, 0),
        )
        settings = LoopSettings(
            lr=self._learning_rate,
            finished=self._finished,
            accumulation=training.accumulation,
            label_smoothing=self._stage.label_smoothing,
            log_every=training.log_every,
            # Far apart, so that neighbouring ranks do not share dropout masks some steps later.
            seed=(run.config.seed * 1_000_003 + rank * 2**40) % 2**62,
            first_step=first_step,
        )
        self._check = StepCheck(
            self._network,
            max_norm=training.max_gradient_norm,
            at_once=training.on_bad_step != "stop",
            scaled=run.accelerator.scaler is not None,
        )
        try:
            return train(
                self._engine,
                batches,
                self._method,
                settings,
                check=self._check,
                start_step=start_step,
                on_bad_step=self._on_bad_step,
                on_report=self._on_report,
                on_step=self._on_step,
            )
        finally:
            batches.close()

    def _measure_start(self) -> dict[str, float] | None:
        """Accuracy before the first step: of the stage before, or measured; None for none."""
        if self._stage.input is None:
            given = self._run.config.model.checkpoint is not None
            return evaluate_network(self._run, self._network).to_dict() if given else None
        before = self._run.done[self._stage.input]
        if before["top1"] is not None:
            return {key: before[key] for key in ("top1", "top5", "loss")}
        return evaluate_network(self._run, self._network).to_dict()  # it was pruned, without data

    def _announce(self, start_step: int, passed_over: list[str]) -> None:
        for reason in passed_over:
            self._monitor.say(f"{self._name}: passed over a damaged checkpoint: {reason}")
        if start_step:
            self._monitor.say(f"{self._name}: resumed after {start_step} steps")
        else:
            length = (
                "as long as the method takes" if self._total is None else f"{self._total} steps"
            )
            way = f" of {self._method.title}" if self._stage.kind == "regularize" else ""
            before = f", from top-1 {self._start['top1']:.2f}%" if self._start else ""
            self._monitor.say(f"{self._name}: {length}{way}{before}")
            if self._start:
                self._monitor.scalars("evaluate", 0, self._start, prefix="val/")
        rule = describe(self._run.config, self._name, self._length)
        if rule is not None:
            self._monitor.say(f"{self._name}: {rule}")
        self._monitor.event("stage", status="start", step=start_step)
        if start_step == 0:
            self._monitor.layers(0, self._method.statistics())
            self._measure_trainability(0)

    def _finished(self, step: int) -> bool:
        return self._method.finished(step) if self._total is None else step >= self._total

    def _learning_rate(self, step: int) -> float:
        return learning_rate(self._optim, step * self._epochs_per_step, self._length)

    def _on_report(self, step: int, report: Report) -> None:
        loss = sum(report.loss_terms.values())
        values = {
            "loss": loss,
            **{f"loss/{term}": value for term, value in report.loss_terms.items()},
            "top1": report.top1,
            "lr": report.lr,
            "gradient_norm": report.gradient_norm,
            **self._method.scalars(step - 1),
            "images_per_second": report.images_per_second,
            "step_time": report.step_time,
            "data_wait": report.data_wait,
            # Seconds that the steps since the last report stood still for checkpoints.
            "checkpoint_stall": self._stalled,
        }
        self._stalled = 0.0
        self._monitor.scalars("train", step, values, prefix="train/")
        self._report_bad_images(step)
        task = report.loss_terms["task"]
        self._monitor.advance(step, f"loss {task:.3f}  top-1 {report.top1:.1f}%")

    def _on_step(self, step: int) -> bool:
        """Measure and save what is due after ``step`` steps; whether that took time."""
        self._monitor.advance(step)
        self._run.at(f"stage {self._name}", step)
        signal = None if self._finished(step) else self._run.stop.agreed(step)
        if signal is not None:
            self._stop(step, signal)
        evaluated, took_time = self._look(step)
        # Last, so that all that was logged up to this step is on the disk with it.
        saves = self._writer is not None or self._engine.saves_together
        saved = saves and not self._finished(step) and self._saves(step, evaluated)
        return evaluated or took_time or saved

    def _look(self, step: int) -> tuple[bool, bool]:
        """Log what is due after ``step`` steps; whether it evaluated, and measured the Jacobian."""
        last = self._finished(step)
        if last or step % self._training.statistics_every == 0:
            self._monitor.layers(step, self._method.statistics())
        every = self._training.trainability_every
        measures = every is not None and (last or step % every == 0)
        if measures:
            self._measure_trainability(step)
        evaluates = last or step % self._evaluate_steps == 0
        if evaluates:
            self._accuracy = evaluate_network(self._run, self._network)
            self._monitor.scalars("evaluate", step, self._accuracy.to_dict(), prefix="val/")
            self._monitor.say(
                f"{self._name}: step {step}, epoch {step * self._epochs_per_step:.2f}: "
                f"top-1 {self._accuracy.top1:.2f}%, loss {self._accuracy.loss:.4f}"
            )
        return evaluates, measures

    def _stop(self, step: int, signal: str) -> None:
        """Save, and end the run; what is due at this step is measured when it goes on.

        There are seconds for it, and an evaluation may take a minute.
        """
        if (bad := self._check.first_bad()) is not None:
            self._on_bad_step(bad)
        self._save(step, looked=False)
        if self._writer is not None:
            self._writer.wait()
        self._monitor.event("stopped", step=step, signal=signal)
        raise Stopped(message_of(signal, f"after step {step} of stage {self._name}"))

    def _saves(self, step: int, evaluated: bool) -> bool:
        """Write a checkpoint if one is due and the weights are sound; whether it did."""
        if self._writer is not None:
            self._writer.check()
        top1 = self._accuracy.top1 if evaluated and self._accuracy else None
        best = self._run.config.checkpoints.keep_best and top1 is not None and top1 > self._best
        if top1 is not None:
            self._best = max(self._best, top1)
        # A bad step ends the run at the next report; what came after it is not worth keeping.
        if not (self._is_due(step) or best) or self._is_spoilt():
            return False
        self._save(step, top1)
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

    def _on_bad_step(self, bad: BadStep) -> None:
        """Write down which images it was; then stop, go back, or return to go on without it."""
        training = self._training
        lr = self._learning_rate(bad.step - 1)
        reason = bad.reason(training.max_gradient_norm)
        path = self._folder / f"bad_step-{bad.step:08d}.json"
        # JSON has no numbers that are not finite.
        found = {k: v if math.isfinite(v) else str(v) for k, v in vars(bad).items()}
        if self._run.is_main:
            images = self._run.data.images_of(self._name, bad.step - 1)
            content = {"stage": self._name, **found, "learning_rate": lr, "images": images}
            write_whole(path, json.dumps(content, indent=1) + "\n")
        what = f"stage {self._name}: step {bad.step}: {reason} (learning rate {lr:g})"
        self._monitor.event("bad_step", **found)
        self._bad_steps += 1
        if training.on_bad_step == "stop" or self._bad_steps > training.max_bad_steps:
            if self._writer is not None:
                self._writer.wait()
            newest = next(iter(state_folders(self._checkpoints)), None)
            often = (
                ""
                if training.on_bad_step == "stop"
                else f"; training.max_bad_steps allows {training.max_bad_steps} of them"
            )
            raise EveryRankError(
                f"{what}{often}; its images are named in {path}; "
                + (f"the last good checkpoint is {newest}" if newest else "there is no checkpoint")
            )
        self._monitor.say(f"{what}; left out, its images are named in {path}")
        if training.on_bad_step == "rollback":
            raise _BadStepError(bad)

    def _report_bad_images(self, step: int) -> None:
        """Show the images that were skipped since the last time, each one once."""
        new = self._run.data.take_new_bad()
        for path, reason in new:
            self._monitor.event("skipped", step=step, file=path, reason=reason)
        say_bad_images(new, self._monitor.say)
        if new:
            count = len(self._run.data.skipped)
            self._monitor.scalars("skipped_images", step, {"skipped_images": count}, prefix="data/")

    def _make_probe(self) -> TrainabilityProbe | None:
        """On the main rank, if asked for: the others train on, and meet it at the next step."""
        run, training = self._run, self._training
        if training.trainability_every is None or not run.is_main:
            return None
        return TrainabilityProbe(
            run.data.val.index,
            image_transform(run.config),
            count=training.trainability_images,
            loader=run.data.loader,
            device=run.accelerator.device,
        )

    def _measure_trainability(self, step: int) -> None:
        if self._probe is not None:
            self._monitor.trainability(step, self._probe(self._network))

    def _save(self, step: int, top1: float | None = None, *, looked: bool = True) -> None:
        optimizer = self._engine.state_dict()  # of all ranks
        if self._writer is None:
            return
        scaler = self._run.accelerator.scaler
        extra = {
            "settings": stage_settings(self._run.config, self._name),
            "images": self._run.data.train.index.fingerprint,
            "method": self._method.state_dict(),
            "scaler": scaler.state_dict() if scaler is not None else None,
            "start": self._start,
            "elapsed": self._elapsed(),
            "bad_steps": self._bad_steps,
            "best_top1": self._best,
            "looked": looked,
            "skipped_images": self._run.data.skipped,
        }
        model, network = self._network.state_dict(), architecture_of(self._network)
        state = TrainingState(step, model, optimizer, extra, network.to_dict() if network else None)
        self._stalled += self._writer.save(state, score=top1, also_sync=self._monitor.flush())
        self._saved = time.perf_counter()

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started
