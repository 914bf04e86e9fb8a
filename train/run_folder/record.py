"""Marking stages as done, and writing results.json."""

import functools
import json
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from tpp.common.files import write_whole
from train.distributed.accelerator import engine_name
from train.run import Run
from train.run_folder.log import say
from train.run_folder.same_run import stage_settings


def finish_stage(run: Run, name: str, results: dict[str, Any]) -> None:
    """Mark a stage as done, with what it found."""
    stage = run.config.stages[name]
    # Dense training is what every method starts from; none has a say in it.
    method = run.config.stage_method(name) if stage.kind != "dense" else None
    run.done[name] = {
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
    if run.is_main:
        folder = run.stage_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        marker = {"settings": stage_settings(run.config, name), "results": run.done[name]}
        write_whole(folder / "done.json", json.dumps(marker, indent=1) + "\n")
        write_results(run, "running")
        say(f"{name}: {_summary(run.done[name])}")
    run.accelerator.wait_for_everyone()


def _summary(results: dict[str, Any]) -> str:
    parts = []
    if results.get("top1") is not None:
        parts.append(f"top-1 {results['top1']:.2f}%, loss {results['loss']:.4f}")
    parts.append(f"{results['parameters']:,} parameters")
    if results["speedup"] != 1:
        parts.append(f"{results['speedup']:.4f}x fewer MACs")
    if results.get("removed_magnitude") is not None:
        parts.append(f"largest weight removed {results['removed_magnitude']:.3g}")
    return ", ".join((*parts, f"{results['wall_seconds']:.0f} s"))


def write_results(run: Run, status: str) -> None:
    """Write results.json from what the stages have reported."""
    stages = {name: dict(run.done[name]) for name in run.config.stages if name in run.done}
    dense: dict[str, Any] = {"top1": None, "top5": None, "loss": None}
    for stage in stages.values():
        if stage["kind"] == "dense":
            dense = {key: stage[key] for key in dense}
        elif dense["top1"] is None and stage["input"] is None:
            measured = stage if stage["kind"] == "evaluate" else stage["start"]
            dense = {key: measured[key] for key in dense} if measured else dense
        if stage["start"] and stage["input"] and stages[stage["input"]]["top1"] is None:
            # Pruning needs no data, so what it cost is measured when finetuning begins.
            stages[stage["input"]].update(stage["start"])
    results = {
        "name": run.config.name,
        "seed": run.config.seed,
        "status": status,
        "model": run.config.model.name,
        "wall_seconds": sum(stage["wall_seconds"] for stage in stages.values()),
        "versions": _versions(),
        "git_commit": _git_commit(),
        "device": _device(run.accelerator),
        "ranks": run.accelerator.num_processes,
        "engine": engine_name(run.accelerator),
        "published": run.config.published.model_dump() if run.config.published else None,
        "dense": {**dense, "parameters": run.dense.parameters, "macs": run.dense.macs},
        "stages": stages,
    }
    write_whole(run.folder / "results.json", json.dumps(results, indent=1) + "\n")


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "accelerate", "nvidia-dali-cuda130", "safetensors")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


@functools.cache
def _git_commit() -> str | None:
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
