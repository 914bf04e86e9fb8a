"""Intervals as people write them: ``1000 steps``, ``0.5 epochs``, ``30 minutes``."""

import re
from dataclasses import dataclass
from typing import Literal

from tpp.common.errors import UserError

Unit = Literal["steps", "epochs", "minutes"]
_WRITTEN = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*(step|epoch|minute)s?\s*")


@dataclass(frozen=True)
class Interval:
    """Every so many steps, epochs or minutes."""

    count: float
    unit: Unit

    @classmethod
    def parse(cls, text: str) -> "Interval":
        """Read ``1000 steps``, ``1 epoch``, ``7.5 minutes``.

        Raises:
            UserError: it is none of these, nothing, or a fraction of a step.
        """
        match = _WRITTEN.fullmatch(text)
        if match is None or not (count := float(match[1])):
            raise UserError(f"expected '1000 steps', '0.5 epochs' or '30 minutes', not {text!r}")
        unit: Unit = f"{match[2]}s"  # type: ignore[assignment]
        if unit == "steps" and not count.is_integer():
            raise UserError(f"a whole number of steps is needed, not {text!r}")
        return cls(count, unit)

    def due(self, step: int, *, steps_per_epoch: float, seconds_since: float) -> bool:
        """Whether it is over after ``step`` steps.

        Steps and epochs are counted from the start of the stage, so that a resumed stage saves at
        the same steps.

        Args:
            step: steps done, in this stage.
            steps_per_epoch: may be a fraction.
            seconds_since: since the last time, or since the start.
        """
        if self.unit == "minutes":
            return seconds_since >= 60 * self.count
        every = self.count * (steps_per_epoch if self.unit == "epochs" else 1)
        return int(step / every + 1e-9) > int((step - 1) / every + 1e-9)
