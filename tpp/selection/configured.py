"""What a run's configuration says of a network and of what goes; the rest is not looked at."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from tpp.common.errors import UserError
from tpp.common.images import ImagesSection
from tpp.common.own_code import is_own
from tpp.common.settings import Section, Seed, mistakes
from tpp.common.yaml_files import Merging, read_yaml
from tpp.models.architecture import Architecture, gives_images
from tpp.models.own import take_up
from tpp.models.settings import MODEL_ANCHORED, MODEL_REPLACED, ModelSection
from tpp.selection.selection import Selection
from tpp.selection.settings import PRUNING_REPLACED, PruningSection, another_budget


def network_named(
    name: str | None,
    image_size: int | None = None,
    args: Sequence[tuple[str, Any]] | None = None,
) -> Architecture | None:
    """The network that ``--model`` names; how many classes it has is for its weights to say.

    Args:
        name: of a class of the user's own ``FILE.py:CLASS``, which runs that file; None where the
            option is not given.
        image_size: side of the images that it is for, in pixels, where it does not say that.
        args: names and values of what it is called with, of ``--model-arg``.

    Raises:
        UserError: there is no such class, or arguments are given for none.
    """
    if name is None:
        if args:
            raise UserError(f"--model-arg {args[0][0]}: goes with --model only")
        return None
    if is_own(name):
        name = take_up(name, "--model", (3, image_size, image_size) if image_size else None)
    return _of_classes(name, args=dict(args or ()))


def _of_classes(
    name: str, num_classes: int | None = None, args: Mapping[str, Any] | None = None
) -> Architecture:
    if num_classes is None and not gives_images(name):
        num_classes = 1000
    return Architecture(name, num_classes, args or {})


class Configured(Section):
    """What a run's configuration says of the network and of what goes; the rest is not looked at.

    Attributes:
        seed: of the run.
        data: how images are prepared; None where there is no such section.
    """

    seed: Seed = 0
    data: ImagesSection | None = None
    model: ModelSection
    pruning: PruningSection = PruningSection()

    @model_validator(mode="after")
    def _something_goes(self) -> "Configured":
        if not self.pruning.ratios and not self.pruning.budget:
            raise ValueError(
                "pruning.ratios says of no layer what goes, and there is no pruning.budget"
            )
        return self

    def architecture(self) -> Architecture:
        """The network."""
        return _of_classes(self.model.network, self.model.num_classes, self.model.args)

    def selection(self) -> Selection:
        """How the filters that go are chosen."""
        return self.pruning.selection(self.seed)


def read_configured(path: Path) -> Configured:
    """Read a configuration's sections of the network and of what goes.

    A network of the user's own that it names is taken up.

    Raises:
        UserError: it cannot be read, or there is a mistake in these sections.
    """
    whole = (*MODEL_REPLACED, *PRUNING_REPLACED)
    data = read_yaml(path, Merging(whole, (another_budget,), MODEL_ANCHORED))
    known = {key: value for key, value in data.items() if key in Configured.model_fields}
    if isinstance(images := known.get("data"), dict):
        known["data"] = {k: v for k, v in images.items() if k in ImagesSection.model_fields}
    try:
        found = Configured.model_validate(known)
    except ValidationError as error:
        lines = mistakes(error, Configured)
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None
    if is_own(found.model.name):
        images = found.data or ImagesSection()
        take_up(found.model.name, f"{path}: model.name", images.shape)
    return found
