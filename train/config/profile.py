"""Which steps of a run are profiled."""

from typing import Annotated

from pydantic import ConfigDict, Field

from tpp.common.settings import PositiveInt, Section


class ProfileSection(Section):
    """A profile of some steps of the training stages, on the main rank (docs/profile.md).

    Attributes:
        start: ``from`` in a file: the first step that is profiled, as logs count them: 1 is the
            first of the stage. Those before it warm up.
        steps: how many. A trace is kept in memory until it is written.
        stage: of this stage alone; null for each one that trains.
    """

    model_config = ConfigDict(serialize_by_alias=True)

    start: Annotated[PositiveInt, Field(alias="from")] = 20
    steps: Annotated[int, Field(ge=1, le=100)] = 5
    stage: str | None = None

    @property
    def last(self) -> int:
        """The last step that is profiled."""
        return self.start + self.steps - 1
