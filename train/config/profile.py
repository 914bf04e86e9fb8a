"""Which steps of a run are profiled."""

from typing import Annotated

from pydantic import ConfigDict, Field

from tpp.common.settings import PositiveInt, Section


class ProfileSection(Section):
    """A profile of some steps of the training stages, on the main rank (docs/profile.md). It may
    come, go or change when a run is resumed.

    Attributes:
        start (steps): the first step that is profiled, as logs count them: 1 is the first of the
            stage. Those before it warm up.
        steps (steps): how many steps are profiled. A trace is kept in memory until it is written.
        stage: the name of the one stage to profile; null for each one that trains.

    Example:
        {from: 100, steps: 10, stage: finetune}
    """

    model_config = ConfigDict(serialize_by_alias=True)

    start: Annotated[PositiveInt, Field(alias="from")] = 20
    steps: Annotated[int, Field(ge=1, le=100)] = 5
    stage: str | None = None

    @property
    def last(self) -> int:
        """The last step that is profiled."""
        return self.start + self.steps - 1
