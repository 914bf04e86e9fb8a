"""Stages that several runs of a sweep have in common: trained once, and taken up by each.

What is common follows from the settings. Two stages are the same as far as all that decides their
outcome is the same, ratios left out for as many steps as their method says that they do not matter
(:meth:`tpp.methods.base.Method.steps_before_picking`). Finetuning is each run's own.

A shared stage is trained in a run folder of its own, by ``train/main.py --until``, under that
folder's lock. Each run then takes up its files as if it had trained the stage itself.
"""

import hashlib
import json
import math
import shutil
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from tpp.checkpoints.model_file import load_model, read_checkpoint, save_model
from tpp.checkpoints.training_state import (
    DamagedState,
    read_state,
    state_folder,
    state_folders,
    write_state,
)
from tpp.common.errors import UserError
from tpp.common.files import write_whole
from tpp.models.architecture import build_on_meta, example_input_for, set_preprocessing
from train.config.config import Config, load_config
from train.config.sections import MODEL_FILE
from train.data import look_at_images
from train.grid import MAIN, SweepRun
from train.run_folder.carried import is_carried
from train.run_folder.checkpoints import CHECKPOINTS
from train.run_folder.lock import RunLock
from train.run_folder.log import drop_later_entries
from train.run_folder.plans import PLAN_FILE
from train.run_folder.results import Results
from train.run_folder.same_run import results_of_done, stage_settings

_EVENTS = "events.out.tfevents.*"


@dataclass(frozen=True)
class SharedStage:
    """A stage, or the first steps of one, that several runs have in common.

    Attributes:
        number: from 1 on, in the order of the first run that has it.
        stage: its name, in each of the runs.
        until: the step up to which it is common; None for the whole stage.
        runs: the numbers of these runs.
        folder: the run folder in which it is trained.
        config: the configuration, to which ``overrides`` are applied.
        before: stages of this folder that are themselves shared.
        starts_from: the dense run's checkpoint, or None.
    """

    number: int
    stage: str
    until: int | None
    runs: tuple[int, ...]
    folder: Path
    config: Path
    overrides: tuple[str, ...]
    before: "tuple[SharedStage, ...]"
    starts_from: Path | None

    @property
    def label(self) -> str:
        """What it is called in a line."""
        part = "" if self.until is None else f", {self.until} steps"
        numbers = ", ".join(map(str, self.runs))
        return f"shared s{self.number} ({self.stage}{part}, of runs {numbers})"

    @property
    def done(self) -> bool:
        """Whether it is trained as far as it is common."""
        folder = self.folder / self.stage
        if self.until is None:
            return (folder / "done.json").exists()
        return state_folder(folder / CHECKPOINTS, self.until).exists()

    def resolved(self) -> Config:
        """Its configuration."""
        return load_config(self.config, self.overrides)

    def command(self, launcher: Sequence[str]) -> list[str]:
        """The command that trains it."""
        end = self.stage if self.until is None else f"{self.stage}:{self.until}"
        main = (*launcher, str(MAIN), "--config", str(self.config), "--until", end)
        # Services are shown the runs, of which this is a part.
        return [*main, *self.overrides, "trackers=[]"]


class SweepConfigs:
    """The resolved configurations of a sweep's runs, each read once."""

    def __init__(self) -> None:
        self._known: dict[int, Config] = {}

    def of(self, run: SweepRun) -> Config:
        """The configuration of a run.

        Raises:
            UserError: it is not valid.
        """
        if run.number not in self._known:
            self._known[run.number] = load_config(run.config, run.overrides)
        return self._known[run.number]


def shared_stages(runs: Sequence[SweepRun], configs: SweepConfigs) -> list[SharedStage]:
    """The stages that at least two runs of a sweep have in common.

    Args:
        runs: all runs of the sweep, whichever of them are to be run now: what is shared, and
            where it lies, must not depend on that.
        configs: their configurations.

    Raises:
        UserError: a configuration is not valid.
    """
    having: dict[str, list[tuple[SweepRun, str, int | None]]] = defaultdict(list)
    layers: dict[str, list[str] | None] = {}
    for run in runs:
        if run.method is None:
            continue
        config = configs.of(run)
        for part in _common_parts(config):
            key = _key(config, part, layers)
            if key is not None:
                having[key].append((run, part.stage, part.until))
    found: list[SharedStage] = []
    for members in having.values():
        first, name, until = members[0]
        if len(members) == 1:
            continue
        config = configs.of(first)
        settings = json.dumps(stage_settings(config, name), sort_keys=True)
        carried = " carried" * is_carried(config, name)
        digest = hashlib.sha256(f"{settings} {until}{carried}".encode()).hexdigest()
        parent = first.folder.parent / "shared"
        folder = parent / f"{name}-{digest[:12]}"
        own = {"name": f"{config.name}_shared", "output": str(folder), "published": None}
        found.append(
            SharedStage(
                number=len(found) + 1,
                stage=name,
                until=until,
                runs=tuple(run.number for run, _, _ in members),
                folder=folder,
                config=first.config,
                overrides=(*first.overrides, *(f"{k}={json.dumps(v)}" for k, v in own.items())),
                before=tuple(
                    other
                    for other in found
                    if first.number in other.runs and other.stage in config.inputs_of(name)
                ),
                starts_from=first.starts_from,
            )
        )
    return found


class _Part(NamedTuple):
    """What other runs may have, too: a stage up to a step (None: its end)."""

    stage: str
    until: int | None
    whatever_ratios: bool


def _common_parts(config: Config) -> list[_Part]:
    """The training stages, as far as they are common where all that they depend on is."""
    parts: list[_Part] = []
    # Stages whose network is known, by whether ratios have a part in it.
    whole: dict[str | None, bool] = {None: True}
    for name, stage in config.stages.items():
        if not stage.does.trains or stage.does.is_final or stage.input not in whole:
            continue
        planned = config.needs_plan(name)
        # Where a stretched stage's filters are picked is not known without the images.
        if planned and config.is_stretched(name):
            parts.append(_Part(name, None, False))
            continue
        steps = config.stage_method(name).steps_before_picking() if planned else None
        whatever = whole[stage.input] and (steps is None or math.isinf(steps))
        if steps is not None and 1 <= steps < math.inf and whole[stage.input]:
            parts.append(_Part(name, int(steps), True))
        else:
            parts.append(_Part(name, None, whatever))
            whole[name] = whatever
    return parts


def _key(config: Config, part: _Part, known: dict[str, list[str] | None]) -> str | None:
    """The same for two stages just if they are common; None for one that cannot be shared."""
    name = part.stage
    settings = stage_settings(config, name)
    layers: list[str] | None = []
    if part.whatever_ratios:
        settings.pop("pruning", None)
        for stage in settings["stages"].values():
            stage.pop("pruning", None)
        for planned in (name, *config.inputs_of(name)):
            if config.needs_plan(planned):
                asked = (config.stages[planned].pruning or config.pruning).model_dump_json()
                place = f"{config.model.model_dump_json()} {config.task} {asked}"
                if place not in known:
                    known[place] = _layers(config, planned)
                if (layers := known[place]) is None:
                    return None
    # What may differ when one run goes on is still the same in runs that share.
    sections = (config.data, config.training, config.checkpoints)
    rest = [section.model_dump() for section in sections]
    # With the optimiser's state the file is another, whatever the stage's own settings are.
    parts = [settings, part.until, layers, rest, is_carried(config, name)]
    return json.dumps(parts, sort_keys=True, default=str)


def _layers(config: Config, name: str) -> list[str] | None:
    """The layers that lose filters; None where the network is known only with its images."""
    architecture = config.make_task().architecture(config.model)
    if architecture is None:
        return None
    model = build_on_meta(architecture)
    set_preprocessing(model, config.data.preprocessing())
    return config.selection(name).layers(model, example_input=example_input_for(model, "meta"))


def needs(folder: Path, number: int, shared: Sequence[SharedStage]) -> list[SharedStage]:
    """The shared stages that a run has yet to take up: those that it has not begun itself.

    Args:
        folder: the run folder.
        number: of the run.
        shared: of the sweep.
    """
    return not_begun(folder, [one for one in shared if number in one.runs])


def not_begun(folder: Path, shared: Sequence[SharedStage]) -> list[SharedStage]:
    """Those of shared stages of which a run folder holds nothing yet."""
    return [one for one in shared if not _begun(folder / one.stage)]


def still_needed(shared: Sequence[SharedStage], runs: Sequence[SweepRun]) -> list[SharedStage]:
    """Those that are not done and that one of all runs of the sweep has yet to take up."""
    return [
        one
        for one in shared
        if not one.done
        and any(run.number in one.runs and not _begun(run.folder / one.stage) for run in runs)
    ]


def _begun(stage: Path) -> bool:
    return (stage / "done.json").exists() or bool(state_folders(stage / CHECKPOINTS))


def take_up(shared: SharedStage, folder: Path, config: Config) -> None:
    """Give a run what it would have, had it trained a shared stage itself.

    Network and plan, or the checkpoint that it goes on from; events and the log's lines. What
    says that the stage is done or begun comes last: one that is broken off is done again.

    Args:
        shared: it is done.
        folder: the run folder.
        config: of the run.

    Raises:
        UserError: it was trained with other settings, or is damaged; or another process has the
            run's folder.
    """
    with RunLock(folder):
        source, target = shared.folder / shared.stage, folder / shared.stage
        if _begun(target):
            return
        target.mkdir(parents=True, exist_ok=True)
        for events in source.glob(_EVENTS):
            shutil.copyfile(events, target / events.name)
        _copy_log(shared, folder)
        settings = stage_settings(config, shared.stage)
        if shared.until is None:
            results = results_of_done(shared.resolved(), shared.stage)
            _copy_model(source / MODEL_FILE, target / MODEL_FILE, config.name)
            for plan, copy in ((source, target), (shared.folder, folder)):
                if (plan / PLAN_FILE).exists():
                    shutil.copyfile(plan / PLAN_FILE, copy / PLAN_FILE)
            marker = json.dumps({"settings": settings, "results": results}, indent=1)
            write_whole(target / "done.json", marker + "\n")
            return
        try:
            state = read_state(state_folder(source / CHECKPOINTS, shared.until))
        except DamagedState as error:
            raise UserError(f"{error}; delete {shared.folder} to train it again") from None
        (target / CHECKPOINTS).mkdir(exist_ok=True)
        state = replace(state, extra={**state.extra, "settings": settings})
        write_state(state_folder(target / CHECKPOINTS, shared.until), state)


def _copy_model(source: Path, target: Path, run: str) -> None:
    """The same file, with the run's own name in it."""
    model = load_model(source)
    _, companions, info = read_checkpoint(source)
    order = model.state_dict()
    save_model(
        target,
        model,
        preprocessing=info.preprocessing,
        extra={**info.extra, "run": run},
        companions={
            name: {key: members[key] for key in order if key in members}
            for name, members in companions.items()
        },
    )


def _copy_log(shared: SharedStage, folder: Path) -> None:
    source, target = (place / "log.jsonl" for place in (shared.folder, folder))
    drop_later_entries(target, shared.stage, 0)
    before = target.read_text() if target.exists() else ""
    lines = source.read_text().splitlines() if source.exists() else []
    ours = [line for line in lines if json.loads(line).get("stage") == shared.stage]
    write_whole(target, before + "".join(f"{line}\n" for line in ours))


@dataclass(frozen=True)
class Steps:
    """What a sweep trains, in optimiser steps.

    Attributes:
        alone: of all runs, each on its own.
        saved: that sharing makes unnecessary.
        without_images: whether there are stages besides whose length is in epochs of images that
            are not there to be counted.
    """

    alone: int
    saved: int
    without_images: bool


def count_steps(
    runs: Sequence[SweepRun],
    shared: Sequence[SharedStage],
    configs: SweepConfigs,
    results: Sequence[Results | None],
) -> Steps:
    """Count the steps of runs, and those of them that are shared.

    Args:
        runs: those to count.
        shared: stages of the whole sweep.
        configs: their configurations.
        results: what is known of runs of the sweep; tells how many images there are.
    """
    numbers = {run.number: run for run in runs}
    images: dict[str, int | None] = {}
    alone, unknown = 0, False

    def length(config: Config, name: str) -> int:
        nonlocal unknown
        if config.stages[name].epochs is None:
            return config.steps_of(name, None) or 0
        place = config.data.model_dump_json()
        if place not in images:
            images[place] = _count_images(config, results)
        count = images[place]
        unknown |= count is None
        return config.steps_of(name, count) or 0

    for run in runs:
        config = configs.of(run)
        trained = [name for name, stage in config.stages.items() if stage.does.trains]
        alone += sum(length(config, name) for name in trained)
    saved = 0
    for one in shared:
        members = [numbers[number] for number in one.runs if number in numbers]
        if members:
            steps = one.until or length(configs.of(members[0]), one.stage)
            saved += (len(members) - 1) * steps
    return Steps(alone, saved, unknown)


def _count_images(config: Config, results: Sequence[Results | None]) -> int | None:
    for found in results:
        for stage in found.stages.values() if found else ():
            if stage.steps and stage.epochs:
                return round(stage.steps * config.training.batch_size / stage.epochs)
    if config.data.demo:
        return config.data.demo.classes * config.data.demo.train_per_class
    try:
        return len(look_at_images(config)[0])
    except UserError:
        return None
