"""Whether what a stage has left behind was made with the settings and images of now."""

import json
from collections.abc import Iterator
from typing import Any

from tpp.common.errors import UserError
from tpp.common.reading import read_json
from train.config.config import Config
from train.config.sections import TRAINING_KINDS
from train.run import MOST_NAMED, Run

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
        more = f", and {len(found) - MOST_NAMED} more" if len(found) > MOST_NAMED else ""
        raise UserError(
            f"{run.folder}: stage {name!r} was run with other settings: "
            f"{', '.join(found[:MOST_NAMED])}{more}; choose another folder with output=..., or delete "
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


def _differences(old: Any, new: Any, key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for part in [*old, *(k for k in new if k not in old)]:
            yield from _differences(old.get(part), new.get(part), f"{key}.{part}".strip("."))
    elif old != new:
        yield f"{key} was {old!r} and is {new!r}"
