"""What a run's configuration says of a network and of what goes; the rest is not looked at."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError, model_validator

from tpp.common.errors import UserError
from tpp.common.images import ImagesSection
from tpp.common.settings import Section, Seed, mistakes
from tpp.common.yaml_files import Merging, read_yaml
from tpp.models.architecture import Architecture, gives_images
from tpp.models.settings import MODEL_REPLACED, ModelSection
from tpp.selection.selection import Selection
from tpp.selection.settings import PRUNING_REPLACED, PruningSection, another_budget


def network_named(
    name: str, num_classes: int | None = None, args: Mapping[str, Any] | None = None
) -> Architecture:
    """A network of which it need not be known how many classes it has: its weights say that."""
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
        return network_named(self.model.name, self.model.num_classes, self.model.args)

    def selection(self) -> Selection:
        """How the filters that go are chosen."""
        return self.pruning.selection(self.seed)


def read_configured(path: Path) -> Configured:
    """Read a configuration's sections of the network and of what goes.

    Raises:
        UserError: it cannot be read, or there is a mistake in these sections.
    """
    data = read_yaml(path, Merging((*MODEL_REPLACED, *PRUNING_REPLACED), (another_budget,)))
    known = {key: value for key, value in data.items() if key in Configured.model_fields}
    if isinstance(images := known.get("data"), dict):
        known["data"] = {k: v for k, v in images.items() if k in ImagesSection.model_fields}
    try:
        return Configured.model_validate(known)
    except ValidationError as error:
        lines = mistakes(error, Configured)
        raise UserError("\n".join(f"{path}: {line}" for line in lines)) from None
