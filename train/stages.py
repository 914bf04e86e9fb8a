"""The stages of a run: each turns one checkpoint into the next, and is skipped when done."""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from data_pipelines.loaders import ImageTransform, eval_batches, resolve_loader, train_batches
from tpp.checkpoint import load_model, read_metadata, save_model
from tpp.describe import Counts, count
from tpp.errors import UserError
from tpp.methods.base import Method, TrainingContext
from tpp.models import architecture_of, build_on_meta, example_input_for
from tpp.plan import PruningPlan
from tpp.prune import prune_checkpoint
from tpp.selection import prunable_layers
from train.checkpoint import TrainingState, newest_state, optimizer_to_cpu, save_state
from train.config import TRAINING_KINDS, Config, StageSection, save_config, steps_for
from train.distributed import convert_sync_batchnorm
from train.evaluate import Accuracy, evaluate
from train.loop import LoopSettings, Report, train
from train.monitor import Monitor, say
from train.optim import learning_rate, make_optimizer
from train.preflight import Preflight
from train.run import (
    MODEL_FILE,
    Run,
    check_same_settings,
    finish_stage,
    stage_settings,
    take_up_done,
    write_results,
)
from train.weights import load_starting_weights


def run_stages(config: Config, accelerator: Accelerator, found: Preflight) -> Run:
    """Run every stage that is not done yet.

    Raises:
        UserError: a stage was done with other settings, or its input is missing.
    """
    data = config.data
    run = Run(
        config=config,
        accelerator=accelerator,
        train_index=found.train_index,
        val_index=found.val_index,
        transform=ImageTransform(
            image_size=data.image_size,
            resize=data.resize,
            augmentation=data.augmentation,
            mean=tuple(data.mean),
            std=tuple(data.std),
            channels=data.channels,
        ),
        loader=resolve_loader(data.loader),
        architecture=found.architecture,
        dense=count(build_on_meta(found.architecture)),
    )
    for name in config.stages:
        take_up_done(run, name)
    accelerator.wait_for_everyone()
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, run.folder / "config.yaml")
        write_results(run, "running")
    for name, stage in config.stages.items():
        if name in run.done:
            if run.is_main:
                say(f"{name}: done before, skipped")
            continue
        started = time.perf_counter()
        if stage.kind in TRAINING_KINDS:
            results = _train_stage(run, name, stage)
        elif stage.kind == "prune":
            results = _prune_stage(run, name, stage)
        else:
            results = _evaluate_stage(run, name, stage)
        results.setdefault("wall_seconds", time.perf_counter() - started)
        finish_stage(run, name, results)
    if run.is_main:
        write_results(run, "finished")
    return run


def _train_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    assert stage.optimizer is not None
    config, accelerator, optim = run.config, run.accelerator, stage.optimizer
    training = config.training
    folder = run.stage_folder(name)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    model = _load_input(run, stage)
    method = config.stage_method(name)
    plan = _plan(run, name, stage, model, method)
    counts = count(model)
    model.to(accelerator.device)
    if training.channels_last:
        model.to(memory_format=torch.channels_last)
    if training.sync_batchnorm:
        model = convert_sync_batchnorm(model)

    start = _known_accuracy(run, stage)
    state, passed_over = newest_state(folder / "checkpoints")
    if start is None and state is None and (stage.input or config.model.checkpoint):
        start = _evaluate(run, model).to_dict()
    if state is not None:
        check_same_settings(run, name, state.extra["settings"])
        model.load_state_dict(state.model)
        start = state.extra["start"]
    method.prepare(
        model,
        TrainingContext(
            stage=stage.kind,
            plan=plan,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            example_input=example_input_for(model),
        ),
    )
    if state is not None:
        method.load_state_dict(state.extra["method"])
    optimizer = make_optimizer(model, optim)
    if state is not None:
        optimizer.load_state_dict(state.optimizer)
    bare = model
    model, optimizer = accelerator.prepare(model, optimizer)

    images, batch = len(run.train_index.files), training.batch_size
    total = method.steps() if stage.epochs is None else steps_for(stage.epochs, images, batch)
    start_step = state.step if state else 0
    elapsed_before = state.extra["elapsed"] if state else 0.0
    evaluate_steps = steps_for(training.evaluate_every, images, batch)

    def finished(step: int) -> bool:
        return step >= total if total is not None else method.finished(step)

    def lr(step: int) -> float:
        epochs = stage.epochs or (total or 0) * batch / images
        return learning_rate(optim, step * batch / images, epochs)

    monitor = Monitor(run.folder, name, total, start_step, enabled=run.is_main)
    for reason in passed_over:
        monitor.say(f"{name}: passed over a damaged checkpoint: {reason}")
    if state is not None:
        monitor.say(f"{name}: resumed after {start_step} steps")
    else:
        length = f"{total} steps" if total is not None else "as long as it takes"
        before = f", starts from top-1 {start['top1']:.2f}%" if start else ""
        monitor.say(f"{name}: {length} ({method.title}{before})")
    monitor.event("stage", status="start", step=start_step)
    if start and state is None:
        monitor.scalars("evaluate", 0, start, prefix="val/")
    monitor.layers(start_step, method.statistics())
    started = time.perf_counter()
    accuracy: Accuracy | None = None

    def save(step: int) -> None:
        if run.is_main:
            extra = {
                "settings": stage_settings(config, name),
                "method": method.state_dict(),
                "start": start,
                "elapsed": elapsed_before + time.perf_counter() - started,
            }
            tensors = {key: value.cpu() for key, value in bare.state_dict().items()}
            save_state(
                folder / "checkpoints",
                TrainingState(step, tensors, optimizer_to_cpu(optimizer), extra),
                keep=training.keep_checkpoints,
            )

    def on_report(step: int, report: Report) -> None:
        loss = sum(report.loss_terms.values())
        if not torch.isfinite(torch.tensor(loss)):
            raise UserError(
                f"stage {name}: the loss is {loss} at step {step} (learning rate {report.lr:g}); "
                f"the last good checkpoint is in {folder / 'checkpoints'}"
            )
        monitor.scalars(
            "train",
            step,
            {
                "loss": loss,
                **{f"loss/{term}": value for term, value in report.loss_terms.items()},
                "top1": report.top1,
                "lr": report.lr,
                **method.scalars(step - 1),
                "images_per_second": report.images_per_second,
                "step_time": report.step_time,
                "data_wait": report.data_wait,
            },
            prefix="train/",
        )
        monitor.advance(step, f"loss {loss:.3f}  top-1 {report.top1:.1f}%")

    def on_step(step: int) -> bool:
        nonlocal accuracy
        monitor.advance(step)
        last = finished(step)
        if last or step % training.statistics_every == 0:
            monitor.layers(step, method.statistics())
        if last or step % evaluate_steps == 0:
            accuracy = _evaluate(run, bare)
            monitor.scalars("evaluate", step, accuracy.to_dict(), prefix="val/")
            monitor.say(
                f"{name}: step {step}, epoch {step * batch / images:.2f}: "
                f"top-1 {accuracy.top1:.2f}%, loss {accuracy.loss:.4f}"
            )
        if not last and step % training.checkpoint_every == 0:
            save(step)
        return last or step % evaluate_steps == 0 or step % training.checkpoint_every == 0

    batches = train_batches(
        run.train_index,
        run.transform,
        loader=run.loader,
        global_batch=batch,
        accumulation=training.accumulation,
        seed=config.seed,
        start_step=start_step,
        steps=(total - start_step) if total is not None else sys.maxsize,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        threads=config.data.threads,
        device=accelerator.device,
    )
    try:
        steps = train(
            model,
            optimizer,
            batches,
            method,
            LoopSettings(
                lr=lr,
                finished=finished,
                accumulation=training.accumulation,
                label_smoothing=stage.label_smoothing,
                channels_last=training.channels_last,
                log_every=training.log_every,
                seed=_dropout_seed(config.seed, accelerator.process_index),
            ),
            accelerator,
            start_step=start_step,
            on_report=on_report,
            on_step=on_step,
        )
        monitor.event("stage", status="end", step=steps)
    finally:
        monitor.close()
        batches.close()
        accelerator.free_memory()
    if accuracy is None:  # resumed from a checkpoint of the last step
        accuracy = _evaluate(run, bare)
    if run.is_main:
        _save_model(run, name, folder / MODEL_FILE, bare, accuracy)
    return {
        **_accuracy_fields(accuracy.to_dict()),
        **_count_fields(run, counts),
        "start": start,
        "steps": steps,
        "epochs": steps * batch / images,
        "wall_seconds": elapsed_before + time.perf_counter() - started,
    }


def _prune_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    """Remove the planned filters from the input checkpoint: no data, no GPU, one rank."""
    folder = run.stage_folder(name)
    output = folder / MODEL_FILE
    method = run.config.stage_method(name)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    model = _load_input(run, stage)
    plan = _plan(run, name, stage, model, method)
    assert plan is not None
    if run.is_main:
        plan.save(folder / "plan.json")
        if stage.input is not None:
            source = run.stage_folder(stage.input) / MODEL_FILE
        else:  # straight from the starting weights, whatever kind of file they came in
            source = folder / "dense.safetensors"
            _save_model(run, name, source, model, None)
        prune_checkpoint(source, plan, output)
        pruned = load_model(output)
        method.after_removal(pruned, run.config.seed)
        info = read_metadata(output)
        save_model(
            output,
            pruned,
            architecture=info.architecture,
            preprocessing=info.preprocessing,
            extra=info.extra,
        )
    run.accelerator.wait_for_everyone()
    layers = prunable_layers(model)
    removed = [
        layers[layer].weight.detach()[plan.pruned[layer]].abs().max().item()
        for layer in plan.active_layers
    ]
    return {
        "top1": None,
        "top5": None,
        "loss": None,
        **_count_fields(run, count(load_model(output))),
        "removed_magnitude": max(removed, default=0.0),
        "start": None,
        "steps": None,
        "epochs": None,
    }


def _evaluate_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    model = _load_input(run, stage).to(run.accelerator.device)
    accuracy = _evaluate(run, model).to_dict()
    return {
        **_accuracy_fields(accuracy),
        **_count_fields(run, count(model)),
        "start": None,
        "steps": None,
        "epochs": None,
    }


def _load_input(run: Run, stage: StageSection) -> nn.Module:
    """The network that a stage starts from, on the CPU."""
    if stage.input is not None:
        return load_model(run.stage_folder(stage.input) / MODEL_FILE)
    with run.accelerator.local_main_process_first():  # one download per node, not one per rank
        return load_starting_weights(run.config.model, run.architecture, run.config.seed)


def _plan(
    run: Run, name: str, stage: StageSection, model: nn.Module, method: Method
) -> PruningPlan | None:
    """The stage's plan: its own from before, its input's, or one chosen now and written down."""
    if stage.kind not in ("regularize", "prune"):
        return None
    for owner in (name, stage.input):
        if owner is not None and (run.stage_folder(owner) / "plan.json").exists():
            return PruningPlan.load(run.stage_folder(owner) / "plan.json")
    plan = method.select(model, run.config.pruning.ratios, example_input=example_input_for(model))
    run.accelerator.wait_for_everyone()
    if run.is_main:
        plan.save(run.stage_folder(name) / "plan.json")
        if not (run.folder / "plan.json").exists():
            plan.save(run.folder / "plan.json")
    return plan


def _known_accuracy(run: Run, stage: StageSection) -> dict[str, Any] | None:
    """Accuracy of a stage's input where the stage before has just measured it."""
    if stage.input is None or run.done[stage.input].get("top1") is None:
        return None
    before = run.done[stage.input]
    return {key: before[key] for key in ("top1", "top5", "loss")}


def _evaluate(run: Run, model: nn.Module) -> Accuracy:
    training, accelerator = run.config.training, run.accelerator
    local_batch = training.batch_size // (accelerator.num_processes * training.accumulation)
    batches = eval_batches(
        run.val_index,
        run.transform,
        loader=run.loader,
        batch_size=training.evaluate_batch_size or local_batch,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        threads=run.config.data.threads,
        device=accelerator.device,
    )
    return evaluate(model, batches, accelerator, channels_last=training.channels_last)


def _save_model(
    run: Run, name: str, path: Path, model: nn.Module, accuracy: Accuracy | None
) -> None:
    extra = {"run": run.config.name, "stage": name, "classes": run.train_index.classes}
    if accuracy is not None:
        extra["accuracy"] = accuracy.to_dict()
    save_model(
        path,
        {key: value.cpu() for key, value in model.state_dict().items()},
        architecture=architecture_of(model),
        preprocessing=run.config.data.preprocessing(),
        extra=extra,
    )


def _accuracy_fields(accuracy: dict[str, float]) -> dict[str, float]:
    return {key: accuracy[key] for key in ("top1", "top5", "loss")}


def _count_fields(run: Run, counts: Counts) -> dict[str, Any]:
    return {
        "parameters": counts.parameters,
        "macs": counts.macs,
        "speedup": run.dense.macs / counts.macs,
    }


def _dropout_seed(seed: int, rank: int) -> int:
    # Far apart, so that neighbouring ranks do not share masks some steps later.
    return (seed * 1_000_003 + rank * 2**40) % 2**62
