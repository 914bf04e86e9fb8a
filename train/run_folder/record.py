"""Marking stages as done, and writing results.json."""

import functools
import json
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tpp.common.files import write_whole
from train.config.stage_kinds import stage_kind
from train.distributed.accelerator import engine_name
from train.run import Run
from train.run_folder.log import say
from train.run_folder.results import NetworkResult, Results, StageResult
from train.run_folder.same_run import stage_settings
from train.tasks.base import Task


def finish_stage(run: Run, name: str, results: dict[str, Any]) -> None:
    """Mark a stage as done, with what it found."""
    stage = run.config.stages[name]
    method = run.config.stage_method(name) if run.config.has_method(name) else None
    said = {
        "kind": stage.kind,
        "method": method.name if method else None,
        "title": method.title if method else None,
        "input": stage.input,
        # What only training stages have.
        "start": None,
        "steps": None,
        "epochs": None,
        **results,
    }
    result = StageResult.from_dict(said, run.task.metrics)
    run.done[name] = result.to_dict()
    assert run.done[name].keys() >= results.keys()  # nothing that results.json has no place for
    if run.is_main:
        folder = run.stage_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        marker = {"settings": stage_settings(run.config, name), "results": run.done[name]}
        write_whole(folder / "done.json", json.dumps(marker, indent=1) + "\n")
        write_results(run, "running")
        say(f"{name}: {_summary(run, result)}")
    run.accelerator.wait_for_everyone()


def _summary(run: Run, result: StageResult) -> str:
    parts = []
    if result.score is not None:
        parts.append(run.task.say(result.scores))
    parts.append(f"{result.parameters:,} parameters")
    if result.speedup != 1:
        parts.append(f"{result.speedup:.4f}x fewer MACs")
    if result.sparsity is not None:
        parts.append(f"{result.nonzero_parameters:,} not masked ({result.sparsity:.2%} sparse)")
    if result.removed_magnitude is not None:
        parts.append(f"largest weight removed {result.removed_magnitude:.3g}")
    return ", ".join((*parts, f"{result.wall_seconds:.0f} s"))


def write_results(run: Run, status: str) -> None:
    """Write results.json from what the stages have reported."""
    stages = {
        name: StageResult.from_dict(run.done[name], run.task.metrics)
        for name in run.config.stages
        if name in run.done
    }
    for stage in stages.values():
        before = stages.get(stage.input) if stage.input else None
        if before and before.score is None and stage.input and stage.start:
            # Pruning needs no data, so what it cost is measured when finetuning begins.
            stages[stage.input] = before.measured(stage.start)
    results = Results(
        name=run.config.name,
        seed=run.config.seed,
        status=status,
        model=run.config.model.network,
        task=run.task.kind,
        versions=versions(),
        git_commit=git_commit(),
        device=_device(run.accelerator),
        ranks=run.accelerator.num_processes,
        engine=engine_name(run.accelerator),
        published=run.config.published,
        image=list(run.dense.image),
        started_in=str(Path.cwd()),
        dense=NetworkResult(
            scores=_dense_scores(run.task, stages.values()),
            parameters=run.dense.parameters,
            macs=run.dense.macs,
        ),
        stages=stages,
    )
    # Unchecked, as a sum of nothing stays the 0 that it was in this file from the beginning.
    results.wall_seconds = sum(
        stage.wall_seconds for stage in stages.values() if stage.wall_seconds is not None
    )
    write_whole(run.folder / "results.json", json.dumps(results.to_dict(), indent=1) + "\n")


def _dense_scores(task: Task, stages: Iterable[StageResult]) -> dict[str, float | None]:
    """Of the dense network: where it was trained, or first measured before it was pruned."""
    scores: dict[str, float | None] = {metric.name: None for metric in task.metrics}
    for stage in stages:
        kind = stage_kind(stage.kind)
        if kind.is_dense:
            scores = stage.scores
        elif scores[task.score.name] is None and stage.input is None:
            measured = stage.start if kind.makes_network else stage
            scores = measured.scores if measured else scores
    return scores


def versions() -> dict[str, str]:
    """Of Python and of the packages that decide what comes out."""
    dali = ("nvidia-dali-cuda130", "nvidia-dali-cuda120")
    names = ("torch", "torchvision", "accelerate", *dali, "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def git_commit() -> str | None:
    """The commit of the code that runs: asked for once, as the checkout may move on meanwhile."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(
            command,
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _device(accelerator: Accelerator) -> str:
    if accelerator.device.type == "cuda":
        return torch.cuda.get_device_name(accelerator.device)
    return f"CPU, {torch.get_num_threads()} thread(s)"
