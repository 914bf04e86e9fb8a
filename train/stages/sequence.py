"""The stages of a run: each turns one checkpoint into the next, and is skipped when done."""

import time
from collections.abc import Callable
from typing import Any

from accelerate import Accelerator

from tpp.measure.counts import count
from tpp.models.architecture import build_on_meta, set_preprocessing
from train.config.config import Config, save_config, stages_until, step_until
from train.copies import RunCopies
from train.distributed.accelerator import engine_name
from train.distributed.collectives import from_main_rank
from train.distributed.stopping import Stopped, StopRequest, message_of
from train.distributed.watchdog import Watchdog
from train.opening import Where, opening
from train.preflight import Preflight
from train.run import Run
from train.run_folder.checkpoints import remove_leftovers
from train.run_folder.log import say
from train.run_folder.networks import evaluate_network, load_input, place
from train.run_folder.record import finish_stage, write_results
from train.run_folder.same_run import take_up_done
from train.stages.evaluate import evaluate_stage
from train.stages.prune import prune_stage
from train.stages.sparsify import sparsify_stage
from train.stages.training import TrainingStage, clean_up
from train.trackers.trackers import tracked
from train.weights import note_on_classes, notes_on_images

# What a stage of a kind does, where it does not train; a new kind is a line here.
_DO: dict[str, Callable[[Run, str], dict[str, Any]]] = {
    "prune": prune_stage,
    "sparsify": sparsify_stage,
    "evaluate": evaluate_stage,
}


def open_run(
    config: Config,
    accelerator: Accelerator,
    found: Preflight,
    watchdog: Watchdog,
    stop: StopRequest,
) -> Run:
    """Take up what the run folder holds already, and remove what a killed process left half-made.

    The main rank holds the folder's lock. With ``checkpoints.copy_to`` an empty run folder becomes
    what its copy is.

    Raises:
        UserError: a stage was done with other settings, or the copy cannot be taken up.
    """
    dense = build_on_meta(found.architecture)
    set_preprocessing(dense, config.data.preprocessing())
    run = Run(
        config=config,
        accelerator=accelerator,
        watchdog=watchdog,
        stop=stop,
        images=found.images,
        architecture=found.architecture,
        dense=count(dense),
    )

    copy_to = config.checkpoints.copy_to
    if run.is_main and copy_to is not None:
        run.copies = RunCopies(run.folder, copy_to)

    def look() -> dict[str, dict[str, Any]]:
        if run.copies is not None:
            for line in run.copies.take_up():
                say(line)
        remove_leftovers(run.folder)
        for name in config.stages:
            take_up_done(run, name)
        return run.done

    # All ranks have to skip the same stages, also where a node sees new files late.
    run.done = from_main_rank(accelerator, look)
    return run


def _opening(run: Run) -> list[str]:
    images, accelerator = run.images, run.accelerator
    return opening(
        run.config,
        run.dense,
        images=(images.train.index, images.val.index) if images is not None else None,
        where=Where(accelerator.device.type, accelerator.num_processes, engine_name(accelerator)),
    )


def _before(run: Run, name: str) -> dict[str, Any]:
    """What the dense network scores, where a run takes something from it before anything else.

    Nothing is known of random weights, and without images nothing can be.
    """
    stage = run.config.stages[name]
    first = stage.input is None and stage.does.makes_network
    measured = any(done[run.task.score.name] is not None for done in run.done.values())
    if not first or measured or run.images is None or run.config.model.checkpoint is None:
        return {}
    scores = evaluate_network(run, place(run, load_input(run, None)))
    if run.is_main:
        say(f"{name}: before it, {run.task.say(scores.values)}")
    return {"start": scores.to_dict()}


def run_stages(run: Run, until: str | None = None) -> None:
    """Run every stage that is not done yet.

    Args:
        run: the run.
        until: the last stage to run, or ``STAGE:STEP``; None for all.

    Raises:
        UserError: a stage was broken off with other settings, or an image cannot be read.
        Stopped: a signal or ``until`` asked for it; all that is done is kept.
    """
    run.accelerator.wait_for_everyone()
    if run.is_main:
        _begin(run)
    with tracked(run):
        for name in stages_until(run.config, until):
            stage = run.config.stages[name]
            trains = stage.does.trains
            if name in run.done:
                if run.is_main:
                    say(f"{name}: done before, skipped")
                if trains:
                    clean_up(run, name)  # it may have been killed just before
                continue
            if (signal := run.stop.agreed_now()) is not None:
                raise Stopped(message_of(signal, f"before stage {name}"))
            if trains:
                stage_of_run = TrainingStage(run, name, until=step_until(until, name))
                finish_stage(run, name, stage_of_run.train())
                clean_up(run, name)
                offer_copy(run, f"stage {name}")
                continue
            started = time.perf_counter()
            before = _before(run, name)
            results = {**_DO[stage.kind](run, name), **before}
            finish_stage(run, name, {**results, "wall_seconds": time.perf_counter() - started})
            offer_copy(run, f"stage {name}")
        if run.is_main:
            all_done = len(run.done) == len(run.config.stages)
            write_results(run, "finished" if all_done else "stopped")


def _begin(run: Run) -> None:
    """Make the run folder, and say what the run is."""
    config = run.config
    run.folder.mkdir(parents=True, exist_ok=True)
    save_config(config, run.folder / "config.yaml")
    write_results(run, "running")
    for line in _opening(run):
        say(line)
    if run.images is not None and not run.done:
        note = note_on_classes(config.model, run.images.train.index.classes)
        for remark in (note, *notes_on_images(config.model, config.data)):
            if remark is not None:
                say(remark)


def offer_copy(run: Run, what: str) -> None:
    """Have the run folder copied as it is now, where copies are made; ``what`` is new in it."""
    if run.copies is not None:
        for line in run.copies.take_lines():
            say(line)
        run.copies.offer(f"{run.folder}: {what}")
