"""The teachers of a run that are none of its own networks."""

from collections.abc import Callable, Iterator
from pathlib import Path

from torch import nn

from tpp.checkpoints.model_file import find_metadata, load_model
from tpp.checkpoints.sources import load_weights
from tpp.common.errors import UserError
from tpp.models.architecture import Architecture, build_model
from train.config.config import Config
from train.distillation.settings import DENSE
from train.tasks.class_names import few


def check_teachers(config: Config, classes: int | None = None) -> None:
    """Check that the teachers' files are there, and tell as many classes apart as the run.

    Args:
        config: of the run.
        classes: how many class folders there are; None where nobody has looked yet.

    Raises:
        UserError: names the stage's key.
    """
    for key, source in _teachers(config):
        if not Path(source).exists():
            raise UserError(f"{key}: {source}: no such file")


def load_teacher(
    source: str,
    architecture: Architecture,
    folders: list[str],
    *,
    key: str,
    say: Callable[[str], None] = lambda _: None,
) -> nn.Module:
    """A teacher of a file, on the CPU in float32.

    Args:
        source: one of our files, which may hold any network; or a state_dict of somebody else's
            for the run's own network, whose images are then prepared as the run's.
        architecture: of the run's dense network.
        folders: names of the class folders, sorted as text.
        key: of the teacher in the configuration.
        say: told what a user should know of it.

    Raises:
        UserError: there is none, or it fits no such network.
    """
    info = find_metadata(source)
    if info is None:
        network = build_model(architecture.name, architecture.num_classes, **architecture.args)
        for note in load_weights(network, source):
            say(f"{key}: {source}: {note}")
        return network.float()
    names = info.extra.get("classes")
    if isinstance(names, list) and len(names) == len(folders) and names != folders:
        say(
            f"{key}: {source} is of the classes {few(names)}, the class folders are "
            f"{few(folders)}: its outputs are taken for them in this order"
        )
    return load_model(source).float()


def _teachers(config: Config) -> Iterator[tuple[str, str]]:
    """Key and value of every teacher but the run's own dense network."""
    for name, stage in config.stages.items():
        if stage.distill is not None and stage.distill.teacher != DENSE:
            yield f"stages.{name}.distill.teacher", stage.distill.teacher
