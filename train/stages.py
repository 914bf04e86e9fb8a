"""The stages of a run: each turns one checkpoint into the next, and is skipped when done."""

import time
from typing import Any

from accelerate import Accelerator

from tpp.checkpoint import load_model, network_of, read_metadata, save_model
from tpp.describe import count
from tpp.errors import UserError
from tpp.models import build_on_meta
from tpp.prune import prune_checkpoint
from tpp.selection import prunable_layers
from train.checkpoint import remove_leftovers
from train.config import TRAINING_KINDS, Config, StageSection, save_config
from train.distributed import from_main_rank
from train.monitor import say
from train.preflight import Preflight
from train.run import (
    MODEL_FILE,
    Run,
    choose_plan,
    evaluate_network,
    finish_stage,
    load_input,
    place,
    save_network,
    say_bad_images,
    take_up_done,
    write_results,
)
from train.stopping import Stopped, StopRequest, message_of
from train.training import TrainingStage, clean_up
from train.watchdog import Watchdog


def open_run(
    config: Config,
    accelerator: Accelerator,
    found: Preflight,
    watchdog: Watchdog,
    stop: StopRequest,
) -> Run:
    """Take up what the run folder holds already, and remove what a killed process left half-made.

    The main rank holds the folder's lock.

    Raises:
        UserError: a stage was done with other settings.
    """
    run = Run(
        config=config,
        accelerator=accelerator,
        watchdog=watchdog,
        stop=stop,
        images=found.images,
        architecture=found.architecture,
        dense=count(build_on_meta(found.architecture)),
    )

    def look() -> dict[str, dict[str, Any]]:
        remove_leftovers(run.folder)
        for name in config.stages:
            take_up_done(run, name)
        return run.done

    # All ranks have to skip the same stages, also where a node sees new files late.
    run.done = from_main_rank(accelerator, look)
    return run


def stages_until(config: Config, until: str | None) -> list[str]:
    """The names of a configuration's stages up to one of them, or of all.

    Raises:
        UserError: there is no such stage.
    """
    names = list(config.stages)
    if until is None:
        return names
    if until not in names:
        raise UserError(f"--until: there is no stage {until!r}; there are {', '.join(names)}")
    return names[: names.index(until) + 1]


def run_stages(run: Run, until: str | None = None) -> None:
    """Run every stage that is not done yet.

    Args:
        run: the run.
        until: the last stage to run; None for all.

    Raises:
        UserError: a stage was broken off with other settings, or an image cannot be read.
        Stopped: a signal asked for it; all that is done is kept.
    """
    config = run.config
    run.accelerator.wait_for_everyone()
    if run.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        save_config(config, run.folder / "config.yaml")
        write_results(run, "running")
    for name in stages_until(config, until):
        stage = config.stages[name]
        trains = stage.kind in TRAINING_KINDS
        if name in run.done:
            if run.is_main:
                say(f"{name}: done before, skipped")
            if trains:
                clean_up(run, name)  # it may have been killed just before
            continue
        if (signal := run.stop.agreed_now()) is not None:
            raise Stopped(message_of(signal, f"before stage {name}"))
        if trains:
            finish_stage(run, name, TrainingStage(run, name).train())
            clean_up(run, name)
            continue
        started = time.perf_counter()
        do = _prune_stage if stage.kind == "prune" else _evaluate_stage
        results = do(run, name, stage)
        finish_stage(run, name, {**results, "wall_seconds": time.perf_counter() - started})
    if run.is_main:
        all_done = len(run.done) == len(config.stages)
        write_results(run, "finished" if all_done else "stopped")


def _prune_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    """Remove the planned filters from the input checkpoint: no data, no GPU, one rank."""
    folder = run.stage_folder(name)
    output = folder / MODEL_FILE
    method = run.config.stage_method(name)
    if run.is_main:
        folder.mkdir(parents=True, exist_ok=True)
    model = load_input(run, stage)
    plan = choose_plan(run, name, model, method)
    assert plan is not None
    if run.is_main:
        if stage.input is not None:
            source = run.stage_folder(stage.input) / MODEL_FILE
        else:  # straight from the starting weights, whatever kind of file they came in
            source = folder / "dense.safetensors"
            save_network(run, name, source, model, None)
        prune_checkpoint(source, plan, output)
        pruned = load_model(output)
        if method.after_removal(pruned, run.config.seed):
            save_model(output, pruned, extra=read_metadata(output).extra)
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
        **run.count_fields(count(network_of(read_metadata(output), source=str(output)))),
        "removed_magnitude": max(removed, default=0.0),
    }


def _evaluate_stage(run: Run, name: str, stage: StageSection) -> dict[str, Any]:
    model = place(run, load_input(run, stage))
    accuracy = evaluate_network(run, model)
    say_bad_images(run.data.take_new_bad(), say)
    return {
        **accuracy.to_dict(),
        **run.count_fields(count(model)),
    }
