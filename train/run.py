"""A run's folder: done markers that let stages be skipped, and results.json."""

import json
import platform
import subprocess
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from data_pipelines.index import ImageIndex
from data_pipelines.loaders import ImageTransform
from tpp.describe import Counts
from tpp.errors import UserError
from tpp.models import Architecture
from train.checkpoint import write_json
from train.config import Config
from train.monitor import say

MODEL_FILE = "model.safetensors"


@dataclass
class Run:
    """A run under way: its configuration, data, ranks and folder."""

    config: Config
    accelerator: Accelerator
    train_index: ImageIndex
    val_index: ImageIndex
    transform: ImageTransform
    loader: str
    architecture: Architecture
    dense: Counts
    done: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return bool(self.accelerator.is_main_process)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.folder / stage


def finish_stage(run: Run, name: str, results: dict[str, Any]) -> None:
    """Mark a stage as done, with what it found."""
    stage = run.config.stages[name]
    method = run.config.stage_method(name)
    head = {"kind": stage.kind, "method": method.name, "title": method.title, "input": stage.input}
    run.done[name] = {**head, **results}
    if run.is_main:
        folder = run.stage_folder(name)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(
            folder / "done.json",
            {"settings": stage_settings(run.config, name), "results": run.done[name]},
        )
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


# What may differ between a stage's run and its resumption without making it another run.
_HARMLESS = {
    "data": {"root", "threads"},
    "training": {
        "log_every",
        "statistics_every",
        "checkpoint_every",
        "keep_checkpoints",
        "evaluate_batch_size",
        "evaluate_every",
    },
}


def stage_settings(config: Config, name: str) -> dict[str, Any]:
    """All that decides a stage's outcome: its own settings, and those of the stages before it."""
    stages: dict[str, Any] = {}
    current: str | None = name
    while current is not None:
        stages[current] = config.stages[current].model_dump()
        method = config.stage_method(current)
        stages[current]["method"] = {"name": method.name, **method.settings.model_dump()}
        current = config.stages[current].input
    settings = config.model_dump(include={"seed", "model", "data", "training"})
    for section, keys in _HARMLESS.items():
        settings[section] = {k: v for k, v in settings[section].items() if k not in keys}
    if any(stage["kind"] in ("regularize", "prune") for stage in stages.values()):
        settings["pruning"] = config.pruning.model_dump()
    return {**settings, "stages": stages}


def take_up_done(run: Run, name: str) -> None:
    """Take up the results of a stage that was done before, if with the same settings."""
    path = run.stage_folder(name) / "done.json"
    if not path.exists():
        return
    try:
        marker = json.loads(path.read_text())
        settings, results = marker["settings"], marker["results"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a done marker; delete it to run the stage again") from None
    check_same_settings(run, name, settings)
    run.done[name] = results


def check_same_settings(run: Run, name: str, settings: dict[str, Any]) -> None:
    """Check that what a stage has left behind was made with the settings of now.

    Raises:
        UserError: names the first setting that differs, and what to do.
    """
    now = json.loads(json.dumps(stage_settings(run.config, name)))
    difference = _first_difference(settings, now)
    if difference:
        raise UserError(
            f"{run.folder}: stage {name!r} was run with other settings: {difference}; choose "
            f"another folder with output=..., or delete {run.stage_folder(name)} to run it again"
        )


def _first_difference(old: Any, new: Any, key: str = "") -> str | None:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in [*old, *(k for k in new if k not in old)]:
            found = _first_difference(old.get(part), new.get(part), f"{key}.{part}".strip("."))
            if found:
                return found
        return None
    return None if old == new else f"{key} was {old!r} and is {new!r}"


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
    write_json(
        run.folder / "results.json",
        {
            "name": run.config.name,
            "seed": run.config.seed,
            "status": status,
            "model": run.config.model.name,
            "wall_seconds": sum(stage["wall_seconds"] for stage in stages.values()),
            "versions": _versions(),
            "git_commit": _git_commit(),
            "device": _device(run.accelerator),
            "ranks": run.accelerator.num_processes,
            "published": run.config.published.model_dump() if run.config.published else None,
            "dense": {**dense, "parameters": run.dense.parameters, "macs": run.dense.macs},
            "stages": stages,
        },
    )


def _versions() -> dict[str, str]:
    names = ("torch", "torchvision", "accelerate", "nvidia-dali-cuda130", "torch-pruning")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _git_commit() -> str | None:
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
    return f"CPU ({torch.get_num_threads()} threads)"
