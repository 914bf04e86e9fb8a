"""A run's folder: done markers that let stages be skipped, and results.json."""

import functools
import json
import platform
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from tpp.checkpoint import load_model, save_model
from tpp.describe import Counts
from tpp.errors import UserError
from tpp.files import write_whole
from tpp.methods.base import Method
from tpp.models import Architecture, example_input_for
from tpp.plan import PruningPlan
from tpp.reading import read_json
from tpp.selection import same_on_all_ranks
from train.config import TRAINING_KINDS, Config, StageSection
from train.data import RunData
from train.distributed import broadcast_buffers
from train.engine import engine_name
from train.evaluate import Accuracy, evaluate
from train.monitor import say
from train.stopping import StopRequest
from train.watchdog import Watchdog
from train.weights import load_starting_weights

MODEL_FILE = "model.safetensors"
PLAN_FILE = "plan.json"
# Bad images, or settings that differ, that are named at once; log.jsonl has all of the images.
_NAMED = 10


@dataclass
class Run:
    """A run under way: its configuration, data, ranks and folder."""

    config: Config
    accelerator: Accelerator
    watchdog: Watchdog
    stop: StopRequest
    images: RunData | None
    architecture: Architecture
    dense: Counts
    done: dict[str, dict[str, Any]] = field(default_factory=dict)
    step: int = 0

    @property
    def data(self) -> RunData:
        """The images; there for all but the removal of filters alone."""
        assert self.images is not None
        return self.images

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.config.output)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes."""
        return bool(self.accelerator.is_main_process)

    def at(self, phase: str, step: int | None = None) -> None:
        """Let the watchdog know where this rank is; all ranks say so at the same places."""
        self.step = self.step if step is None else step
        self.watchdog.at(self.step, phase)

    def stage_folder(self, stage: str) -> Path:
        """Where a stage keeps its files."""
        return self.folder / stage

    def count_fields(self, counts: Counts) -> dict[str, Any]:
        """A network's size, and its speedup over the dense one, for its stage's results."""
        return {
            "parameters": counts.parameters,
            "macs": counts.macs,
            "speedup": self.dense.macs / counts.macs,
        }


def load_input(run: Run, stage: StageSection) -> nn.Module:
    """The network that a stage starts from, on the CPU."""
    if stage.input is not None:
        return load_model(run.stage_folder(stage.input) / MODEL_FILE)
    with run.accelerator.local_main_process_first():  # one download per node, not one per rank
        return load_starting_weights(run.config.model, run.architecture, run.config.seed)


def place(run: Run, model: nn.Module) -> nn.Module:
    """Move a network to this rank's device, in the memory format that the run computes in."""
    model.to(run.accelerator.device)
    if run.config.training.channels_last:
        model.to(memory_format=torch.channels_last)
    return model


def choose_plan(run: Run, name: str, model: nn.Module, method: Method) -> PruningPlan | None:
    """The plan of a stage that begins: what its input was regularised for, or chosen now.

    None for a stage that begins without one: its method picks the filters later.
    """
    stage = run.config.stages[name]
    if stage.kind not in ("regularize", "prune"):
        return None
    if stage.kind == "regularize" and method.picks != "before":
        return None
    if stage.input is not None and _regularizes_for_a_plan(run.config, stage.input):
        plan = load_plan(run, stage.input)
    else:
        example = example_input_for(model)
        plan = method.select(model, run.config.selection(), example_input=example)
        plan = same_on_all_ranks(plan)
    save_plan(run, name, plan)
    return plan


def save_plan(run: Run, name: str, plan: PruningPlan) -> None:
    """Write down a stage's plan; that of the run's first stage that has one is also the run's."""
    if run.is_main:
        plan.save(run.stage_folder(name) / PLAN_FILE)
        config = run.config
        with_plan = (
            other
            for other, stage in config.stages.items()
            if stage.kind == "prune" or _regularizes_for_a_plan(config, other)
        )
        if name == next(with_plan):
            plan.save(run.folder / PLAN_FILE)


def _regularizes_for_a_plan(config: Config, name: str) -> bool:
    """Whether a stage readies the network for the removal of filters that it knows."""
    kind = config.stages[name].kind
    return kind == "regularize" and config.stage_method(name).picks != "after"


def load_plan(run: Run, name: str) -> PruningPlan:
    """The plan that a stage wrote down."""
    return PruningPlan.load(run.stage_folder(name) / PLAN_FILE)


def evaluate_network(run: Run, model: nn.Module) -> Accuracy:
    """Evaluate over the validation images, shared over the ranks."""
    run.at("evaluation")
    # Each rank has normalised its own batches; what is measured must be what is saved.
    broadcast_buffers(model)
    training, accelerator = run.config.training, run.accelerator
    local_batch = training.batch_size // (accelerator.num_processes * training.accumulation)
    batches = run.data.eval_batches(training.evaluate_batch_size or local_batch)
    return evaluate(model, batches, accelerator)


def save_network(
    run: Run, name: str, path: Path, model: nn.Module, accuracy: Accuracy | None
) -> None:
    """Write a self-describing checkpoint of ``model``."""
    extra: dict[str, Any] = {
        "run": run.config.name,
        "stage": name,
        "classes": run.data.train.index.classes,
    }
    if accuracy is not None:
        extra["accuracy"] = accuracy.to_dict()
    save_model(path, model, preprocessing=run.config.data.preprocessing(), extra=extra)


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


# What may differ between a stage's run and its resumption without making it another run.
_HARMLESS = {
    "data": {"root", "threads", "index", "on_error", "max_skipped", "prefetch"},
    "training": {
        "log_every",
        "statistics_every",
        "trainability_every",
        "trainability_images",
        "evaluate_batch_size",
        "evaluate_every",
        "on_bad_step",
        "max_bad_steps",
        "max_gradient_norm",
        "deepspeed",
        "rank_timeout",
    },
}


def stage_settings(config: Config, name: str) -> dict[str, Any]:
    """All that decides a stage's outcome: its own settings, and those of the stages before it.

    Of newer settings, those that are as it always was are left out: a run begun before they
    existed goes on.
    """
    stages: dict[str, Any] = {}
    current: str | None = name
    while current is not None:
        stages[current] = config.stages[current].model_dump()
        stages[current].pop("method")
        stages[current].pop("augment")
        if (optimizer := stages[current]["optimizer"]) and not optimizer["warmup_from"]:
            optimizer.pop("warmup_from")
        if config.stages[current].kind in TRAINING_KINDS:
            augment = config.stage_augment(current).model_dump(exclude_defaults=True)
            stages[current] |= {"augment": augment} if augment else {}
        if stages[current]["kind"] != "dense":
            method = config.stage_method(current, as_given=True)
            stages[current]["method"] = {"name": method.name, **method.settings.model_dump()}
        current = config.stages[current].input
    settings = config.model_dump(include={"seed", "model", "data", "training"})
    for section, keys in _HARMLESS.items():
        settings[section] = {k: v for k, v in settings[section].items() if k not in keys}
    settings["data"].pop("augment")
    if config.data.shuffle_window is None:
        settings["data"].pop("shuffle_window")
    if config.training.clip_gradient_norm is None:
        settings["training"].pop("clip_gradient_norm")
    if config.training.batch_factor == 1:
        for key in ("batch", "reference_batch_size", "batch_warmup_epochs"):
            settings["training"].pop(key)
    if any(stage["kind"] in ("regularize", "prune") for stage in stages.values()):
        settings["pruning"] = config.pruning.model_dump(exclude_defaults=True)
    return {**settings, "stages": stages}


def take_up_done(run: Run, name: str) -> None:
    """Take up the results of a stage that was done before, if with the same settings."""
    path = run.stage_folder(name) / "done.json"
    if not path.exists():
        return
    marker = read_json(path, "the done marker")
    try:
        settings, results = dict(marker["settings"]), dict(marker["results"])
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path}: not a done marker; delete it to run the stage again") from None
    check_same_settings(run, name, settings)
    run.done[name] = results


def check_same_settings(run: Run, name: str, settings: dict[str, Any]) -> None:
    """Check that what a stage has left behind was made with the settings of now.

    Raises:
        UserError: names what differs, and what to do.
    """
    now = json.loads(json.dumps(stage_settings(run.config, name)))
    found = list(_differences(settings, now))
    if found:
        more = f", and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise UserError(
            f"{run.folder}: stage {name!r} was run with other settings: "
            f"{', '.join(found[:_NAMED])}{more}; choose another folder with output=..., or delete "
            f"{run.stage_folder(name)} to run it again"
        )


def check_same_images(run: Run, name: str, fingerprint: str | None) -> None:
    """Check that a stage goes on with the images that it began with; None: not written down.

    Raises:
        UserError: they are others.
    """
    index = run.data.train.index
    if fingerprint not in (None, index.fingerprint):
        raise UserError(
            f"{run.folder}: stage {name!r} was begun with other images: the fingerprint of "
            f"{index.root} was {fingerprint} and is {index.fingerprint}; give it the same images, "
            f"or delete {run.stage_folder(name)} to run it again"
        )


def say_bad_images(new: list[tuple[str, str]], tell: Callable[[str], None]) -> None:
    """Name images that are skipped; of many, the first ones."""
    for path, reason in new[:_NAMED]:
        tell(f"skipped: {path} ({reason})")
    if len(new) > _NAMED:
        tell(f"skipped: {len(new) - _NAMED:,} more images")


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in [*old, *(k for k in new if k not in old)]:
            yield from _differences(old.get(part), new.get(part), f"{key}.{part}".strip("."))
    elif old != new:
        yield f"{key} was {old!r} and is {new!r}"


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
