"""The teachers of a run that are none of its own networks."""

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from tpp.checkpoints.model_file import find_metadata, load_model, network_of
from tpp.checkpoints.sources import load_weights
from tpp.common.class_names import note_on_order
from tpp.common.errors import UserError
from tpp.models.architecture import (
    Architecture,
    build_model,
    build_on_meta,
    example_input_for,
    set_preprocessing,
)
from train.config.config import Config
from train.distillation.distillation import Distillation
from train.distillation.settings import DENSE, LOGITS, DistillSection
from train.public_weights import is_public, load_public, missing_here, outline


def teachers_exist(config: Config) -> None:
    """Check that the teachers are there, without loading anything.

    Raises:
        UserError: names the stage's key.
    """
    for missing in _missing(config, downloads=False):
        raise UserError(missing)


def open_teachers(
    config: Config, architecture: Architecture, *, download: bool = False
) -> list[str]:
    """Load the teachers that are there, for their mistakes; returns what has yet to be fetched.

    Args:
        config: of the run.
        architecture: of its dense network.
        download: fetch public weights that are not there.

    Raises:
        UserError: a file is damaged, or holds no network, or weights cannot be fetched.
    """
    for name, settings in _distilled(config):
        source, key = settings.teacher, f"{_key(name)}.teacher"
        public = is_public(source) and (download or missing_here(source, key) is None)
        if public or (not is_public(source) and source != DENSE and Path(source).exists()):
            load_teacher(source, architecture, [], key=key)
    return [*_missing(config, downloads=True)]


def _missing(config: Config, *, downloads: bool) -> Iterator[str]:
    for name, settings in _distilled(config):
        key = f"{_key(name)}.teacher"
        if is_public(settings.teacher):
            outline(settings.teacher, key)
            fetched = missing_here(settings.teacher, key) if downloads else None
            if fetched is not None:
                yield fetched
            continue
        if settings.teacher != DENSE:
            if not Path(settings.teacher).exists():
                yield f"{key}: {settings.teacher}: no such file"
            continue
        dense = config.dense_stage(config.stages[name].input)
        if dense is None and config.model.checkpoint is None:
            yield f"{key}: no dense stage comes before this one, and model.checkpoint is null"
        elif dense is None and config.model.head == "new" and settings.kind == LOGITS:
            yield (
                f"{key}: no dense stage comes before this one, and with model.head: new nobody has "
                "trained the classifier of the starting weights; train it in a dense stage first"
            )


def _distilled(config: Config) -> Iterator[tuple[str, DistillSection]]:
    """The stages that have a teacher."""
    for name, stage in config.stages.items():
        if stage.distill is not None:
            yield name, stage.distill


def _key(stage: str) -> str:
    return f"stages.{stage}.distill"


def check_teachers(config: Config, architecture: Architecture) -> None:
    """Check that the teachers go together with the network that they are to teach.

    What is not there is passed over.

    Args:
        config: of the run.
        architecture: of the dense network.

    Raises:
        UserError: names the stage's key.
    """
    for name, settings in _distilled(config):
        key = _key(name)
        student = build_on_meta(architecture)
        teacher = _outline(settings.teacher, architecture, f"{key}.teacher")
        set_preprocessing(student, config.data.preprocessing())
        if teacher is None or not (_runs_on_meta(student) and _runs_on_meta(teacher)):
            continue  # it will be seen when it is read
        Distillation(
            settings,
            student,
            teacher.eval().requires_grad_(False),
            example=example_input_for(student, "meta", side=config.data.train_size),
            preprocessing=config.data.preprocessing(),
            key=key,
        )


def _outline(source: str, architecture: Architecture, key: str) -> nn.Module | None:
    """A teacher without its weights, on the meta device; None where it is not there."""
    if source == DENSE:
        return build_on_meta(architecture)
    if is_public(source):
        return outline(source, key)
    if not Path(source).exists():
        return None
    info = find_metadata(source)
    return build_on_meta(architecture) if info is None else network_of(info, source=source)


def _runs_on_meta(network: nn.Module) -> bool:
    try:
        with torch.no_grad():
            network.eval()(example_input_for(network, "meta"))
    except Exception:  # a few networks of timm look at values
        return False
    return True


def load_teacher(
    source: str,
    architecture: Architecture,
    folders: list[str],
    *,
    key: str,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """A teacher of a file or of public weights, on the CPU in float32.

    Args:
        source: public weights, which may be downloaded; one of our files, which may hold any
            network; or a state_dict of somebody else's for the run's own network, whose images are
            then prepared as the run's.
        architecture: of the run's dense network.
        folders: names of the class folders, sorted as text.
        key: of the teacher in the configuration.
        say: told what a user should know of it.

    Raises:
        UserError: there is none, it fits no such network, or cannot be fetched.
    """
    if is_public(source):
        return load_public(source, key=key, say=say).float()
    info = find_metadata(source)
    if info is None:
        network = build_model(architecture.name, architecture.num_classes, **architecture.args)
        for note in load_weights(network, source):
            say(f"{key}: {source}: {note}")
        return network.float()
    other_order = note_on_order(info.extra.get("classes"), folders, f"{key}: {source}")
    if other_order is not None:
        say(other_order)
    return load_model(source).float()
