"""A training stage: the loop with everything around it that a run needs.

Dense training, the regularised stage and finetuning differ in their settings and in what their
method does, not in code.
"""

import math
import shutil
import sys
import time
from typing import Any

from tpp.describe import count
from tpp.errors import UserError
from tpp.methods.base import Method, Settings, TrainingContext
from tpp.models import architecture_of, example_input_for
from train.checkpoint import TrainingState, newest_state, save_state
from train.config import StageSection, steps_for
from train.data import image_transform
from train.distributed import convert_sync_batchnorm
from train.evaluate import Accuracy
from train.loop import LoopSettings, Report, train
from train.monitor import Monitor
from train.optim import learning_rate, make_optimizer
from train.run import (
    MODEL_FILE,
    Run,
    check_same_images,
    check_same_settings,
    choose_plan,
    evaluate_network,
    load_input,
    load_plan,
    place,
    save_network,
    save_plan,
    say_bad_images,
    stage_settings,
)
from train.trainability_log import TrainabilityProbe


class TrainingStage:
    """One dense, regularize or finetune stage, from its input or its newest checkpoint on."""

    def __init__(self, run: Run, name: str) -> None:
        self._run, self._name = run, name
        self._stage: StageSection = run.config.stages[name]
        self._training = run.config.training
        assert self._stage.optimizer is not None
        self._optim = self._stage.optimizer
        self._folder = run.stage_folder(name)
        # Dense training is what every method starts from; none has a say in it.
        dense = self._stage.kind == "dense"
        self._method = Method(Settings()) if dense else run.config.stage_method(name)

        images, batch = len(run.data.train.index), self._training.batch_size
        epochs = self._stage.epochs
        self._epochs_per_step = batch / images
        self._evaluate_steps = steps_for(self._training.evaluate_every, images, batch)
        self._total = steps_for(epochs, images, batch) if epochs else self._method.steps()
        self._accuracy: Accuracy | None = None
        self._probe = self._make_probe()

    def train(self) -> dict[str, Any]:
        """Train to the end, save the network, and return the stage's results."""
        run, stage = self._run, self._stage
        if run.is_main:
            self._folder.mkdir(parents=True, exist_ok=True)
        self._network = load_input(run, stage)
        counts = count(self._network)
        state, passed_over = newest_state(self._folder / "checkpoints")
        if state is None:
            plan = choose_plan(run, self._name, self._network, self._method)
        else:
            check_same_settings(run, self._name, state.extra["settings"])
            check_same_images(run, self._name, state.extra.get("images"))
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
        self._optimizer = make_optimizer(self._network, self._optim)
        if state is not None:
            self._method.load_state_dict(state.extra["method"])
            self._optimizer.load_state_dict(state.optimizer)

        start_step = state.step if state else 0
        self._elapsed_before = state.extra["elapsed"] if state else 0.0
        self._monitor = Monitor(
            run.folder, self._name, self._total, start_step, enabled=run.is_main
        )
        self._announce(start_step, passed_over)
        self._started = time.perf_counter()
        try:
            steps = self._loop(start_step)
            self._report_bad_images(steps)
            self._monitor.event("stage", status="end", step=steps)
        finally:
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

    def clean_up(self) -> None:
        """Remove the checkpoints of a stage that is done: nothing resumes from them any more."""
        if self._run.is_main:
            shutil.rmtree(self._folder / "checkpoints", ignore_errors=True)

    def _loop(self, start_step: int) -> int:
        run, training = self._run, self._training
        rank = run.accelerator.process_index
        model, optimizer = run.accelerator.prepare(self._network, self._optimizer)
        batches = run.data.train_batches(
            self._name,
            start_step,
            sys.maxsize if self._total is None else self._total - start_step,
        )
        settings = LoopSettings(
            lr=self._learning_rate,
            finished=self._finished,
            accumulation=training.accumulation,
            label_smoothing=self._stage.label_smoothing,
            log_every=training.log_every,
            # Far apart, so that neighbouring ranks do not share dropout masks some steps later.
            seed=(run.config.seed * 1_000_003 + rank * 2**40) % 2**62,
        )
        try:
            return train(
                model,
                optimizer,
                batches,
                self._method,
                settings,
                run.accelerator,
                start_step=start_step,
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
        self._monitor.event("stage", status="start", step=start_step)
        self._monitor.layers(start_step, self._method.statistics())
        if start_step == 0:
            self._measure_trainability(0)

    def _finished(self, step: int) -> bool:
        return self._method.finished(step) if self._total is None else step >= self._total

    def _learning_rate(self, step: int) -> float:
        total = self._stage.epochs or (self._total or 0) * self._epochs_per_step
        return learning_rate(self._optim, step * self._epochs_per_step, total)

    def _on_report(self, step: int, report: Report) -> None:
        loss = sum(report.loss_terms.values())
        if not math.isfinite(loss):
            raise UserError(
                f"stage {self._name}: the loss is {loss} at step {step} (learning rate "
                f"{report.lr:g}); the last good checkpoint is in {self._folder / 'checkpoints'}"
            )
        values = {
            "loss": loss,
            **{f"loss/{term}": value for term, value in report.loss_terms.items()},
            "top1": report.top1,
            "lr": report.lr,
            **self._method.scalars(step - 1),
            "images_per_second": report.images_per_second,
            "step_time": report.step_time,
            "data_wait": report.data_wait,
        }
        self._monitor.scalars("train", step, values, prefix="train/")
        self._report_bad_images(step)
        task = report.loss_terms["task"]
        self._monitor.advance(step, f"loss {task:.3f}  top-1 {report.top1:.1f}%")

    def _on_step(self, step: int) -> bool:
        """Evaluate, save and show what is due after ``step`` steps; whether that took time."""
        self._monitor.advance(step)
        last = self._finished(step)
        if last or step % self._training.statistics_every == 0:
            self._monitor.layers(step, self._method.statistics())
        every = self._training.trainability_every
        measures = every is not None and (last or step % every == 0)
        if measures:
            self._measure_trainability(step)
        evaluates = last or step % self._evaluate_steps == 0
        saves = not last and step % self._training.checkpoint_every == 0
        if evaluates:
            self._accuracy = evaluate_network(self._run, self._network)
            self._monitor.scalars("evaluate", step, self._accuracy.to_dict(), prefix="val/")
            self._monitor.say(
                f"{self._name}: step {step}, epoch {step * self._epochs_per_step:.2f}: "
                f"top-1 {self._accuracy.top1:.2f}%, loss {self._accuracy.loss:.4f}"
            )
        if saves and self._run.is_main:
            self._save(step)
        return evaluates or saves or measures

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

    def _save(self, step: int) -> None:
        extra = {
            "settings": stage_settings(self._run.config, self._name),
            "images": self._run.data.train.index.fingerprint,
            "method": self._method.state_dict(),
            "start": self._start,
            "elapsed": self._elapsed(),
        }
        model, optimizer = self._network.state_dict(), self._optimizer.state_dict()
        network = architecture_of(self._network)
        state = TrainingState(step, model, optimizer, extra, network.to_dict() if network else None)
        save_state(self._folder / "checkpoints", state, keep=self._training.keep_checkpoints)

    def _elapsed(self) -> float:
        return self._elapsed_before + time.perf_counter() - self._started
