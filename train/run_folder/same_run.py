"""Whether what a stage has left behind was made with the settings and images of now.

A stage is compared by what it depends on, through the stages before it: an evaluation of the dense
network by no method's settings, and by none of training's where the network came from a file.

A setting that may differ when a run goes on says so at its key
(:data:`tpp.common.settings.MAY_DIFFER`). One at its default is not written down, and one that is
not there counts as its default: a run that began before a setting existed goes on.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from data_pipelines.settings import AugmentSection
from tpp.common.errors import UserError
from tpp.common.reading import read_json
from tpp.common.settings import MAY_DIFFER, OF_TRAINING
from tpp.selection.settings import PruningSection
from train.config.config import Config
from train.run import MOST_NAMED, Run
from train.run_folder.results import StageResult

# What a stage says in words of its own, rather than as it is written.
_RESOLVED = ("method", "augment", "pruning")
# Without a reference batch that differs from the batch, these change nothing.
_OF_THE_BATCH = ("batch", "reference_batch_size", "batch_warmup_epochs")


@dataclass(frozen=True)
class _Setting:
    """A setting, and what it was before it could be set."""

    value: Any
    default: Any = None


_UNUSED = _Setting(None)  # the stage does not depend on it, whatever it was


def stage_settings(config: Config, name: str) -> dict[str, Any]:
    """All that decides a stage's outcome: its own settings, and those of the stages before it."""
    found: dict[str, Any] = plain(_decisive(config, name))
    return found


def _decisive(config: Config, name: str) -> dict[str, Any]:
    stages: dict[str, Any] = {}
    plan_of_run = trains = needs_images = False
    current: str | None = name
    while current is not None:
        stage = config.stages[current]
        own: dict[str, Any] = {**_entries(stage, leave_out=_RESOLVED)}
        own["pruning"] = _Setting(stage.pruning)
        if stage.does.trains:
            own["augment"] = _Setting(config.stage_augment(current), AugmentSection())
        if config.has_method(current) and not stage.does.makes_network:
            own["method"] = _UNUSED
        elif config.has_method(current):
            method = config.stage_method(current, as_given=True)
            own["method"] = {"name": method.name, **_entries(method.settings)}
        stages[current] = own
        plan_of_run |= config.needs_plan(current) and stage.pruning is None
        needs_images |= config.needs_images(current)
        # A stage that removes filters looks at batches of training, if at any images.
        trains |= stage.does.trains or (stage.does.removes and config.needs_images(current))
        current = stage.input
    task = config.make_task()
    unused = _OF_THE_BATCH if config.training.batch_factor == 1 else ()
    training: Any = _entries(config.training, leave_out=unused)
    data = _entries(config.data, leave_out=("augment",))
    if not trains:
        for section, values in ((config.training, training), (config.data, data)):
            fields = type(section).model_fields
            values |= {key: _UNUSED for key in values if OF_TRAINING in fields[key].metadata}
    found = {
        "seed": config.seed,
        "task": _Setting(
            {"kind": task.kind, **_entries(task.settings)}, {"kind": "classification"}
        ),
        "model": {**_entries(config.model), "name": config.model.network},
        "data": data,
        "training": training if needs_images else _UNUSED,
        "stages": stages,
    }
    found["pruning"] = _Setting(config.pruning, PruningSection()) if plan_of_run else _UNUSED
    return found


def _entries(section: BaseModel, leave_out: tuple[str, ...] = ()) -> dict[str, _Setting]:
    """The settings of a section that decide an outcome."""
    return {
        name: _Setting(
            getattr(section, name),
            None if field.is_required() else field.get_default(call_default_factory=True),
        )
        for name, field in type(section).model_fields.items()
        if name not in leave_out and MAY_DIFFER not in field.metadata
    }


def plain(value: Any) -> Any:
    """Settings as JSON has them: of sections what decides an outcome, without defaults."""
    if isinstance(value, _Setting):
        return plain(value.value)
    if isinstance(value, BaseModel):
        return plain(_entries(value))
    if isinstance(value, Mapping):
        return {
            key: plain(inner)
            for key, inner in value.items()
            if inner is not _UNUSED and not _is_default(inner)
        }
    return json.loads(json.dumps(value))


def _is_default(value: Any) -> bool:
    return isinstance(value, _Setting) and plain(value.value) == plain(value.default)


def differences(old: Any, now: Any, key: str = "") -> Iterator[str]:
    """What differs of settings as a file has them and those of now."""
    if isinstance(now, BaseModel):
        now = _entries(now)
    if not isinstance(old, dict) or not isinstance(now, Mapping):
        if old != plain(now):
            yield f"{key} was {old!r} and is {plain(now)!r}"
        return
    for part in [*old, *(name for name in now if name not in old)]:
        entry = now.get(part)
        if entry is _UNUSED:
            continue
        setting = entry if isinstance(entry, _Setting) else _Setting(entry)
        was = old[part] if part in old else plain(setting.default)
        yield from differences(was, setting.value, f"{key}.{part}".strip("."))


def take_up_done(run: Run, name: str) -> None:
    """Take up the results of a stage that was done before, if with the same settings."""
    results = results_of_done(run.config, name)
    if results is not None:
        run.done[name] = results


def results_of_done(config: Config, name: str) -> dict[str, Any] | None:
    """The results of a stage that was done before; None of one that was not.

    Raises:
        UserError: it was done with other settings, or its marker is broken.
    """
    path = Path(config.output) / name / "done.json"
    if not path.exists():
        return None
    marker = read_json(path, "the done marker")
    try:
        settings, results = dict(marker["settings"]), dict(marker["results"])
        StageResult.from_dict(results, config.make_task().metrics)
    except (ValueError, KeyError, TypeError):  # ValidationError of pydantic is a ValueError
        raise UserError(f"{path}: not a done marker; delete it to run the stage again") from None
    check_same_settings(config, name, settings)
    return results


def check_same_settings(config: Config, name: str, settings: dict[str, Any]) -> None:
    """Check that what a stage has left behind was made with the settings of now.

    Raises:
        UserError: names what differs, and what to do.
    """
    found = list(differences(settings, _decisive(config, name)))
    if found:
        more = f", and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise UserError(
            f"{config.output}: stage {name!r} was run with other settings: "
            f"{', '.join(found[:MOST_NAMED])}{more}; choose another folder with output=..., or "
            f"delete {Path(config.output) / name} to run it again"
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
            f"{index.place} was {fingerprint} and is {index.fingerprint}; give it the same images, "
            f"or delete {run.stage_folder(name)} to run it again"
        )
